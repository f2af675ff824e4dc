"""The judgement over what was read: it has to see one wrong token, one error, one pause."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from specinfer_bench.chaos.__main__ import main
from specinfer_bench.chaos.container_rows import CONTAINER_ROWS
from specinfer_bench.chaos.matrix import RowResult
from specinfer_bench.chaos.readings import Answer, Case, Reading, judge, percentile
from specinfer_bench.chaos.report import Report, line_of, page
from specinfer_bench.chaos.row import Row
from specinfer_bench.chaos.rows import ROWS, ProcessRow, named

CASE = Case("prompt", 0.0, 1, 4)
RIGHT = {CASE: Answer((1, 2, 3, 4), "abcd")}


def reading(**changes: object) -> Reading:
    whole = Reading("grpc 0", CASE, 10.0, 14.0, [10.5, 11.0, 13.0, 14.0], [1, 2, 3, 4], "abcd")
    return dataclasses.replace(whole, **changes)  # type: ignore[arg-type]


def test_equal_streams_are_clean_and_their_pauses_are_told() -> None:
    verdict = judge([reading(), reading(times=[10.5, 13.9])], RIGHT, 11.5, 12.5)
    assert verdict.clean
    assert verdict.num_running == verdict.num_requests == 2
    assert verdict.pause_p99 == pytest.approx(3.4)
    assert verdict.first_p99 == 0.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"token_ids": [1, 2, 9, 4]},
        {"token_ids": [1, 2, 3]},
        {"token_ids": [1, 2, 3, 4, 4]},
        {"text": "abxd"},
        {"token_ids": None, "text": "abc"},
    ],
)
def test_one_flipped_lost_or_doubled_token_is_seen(wrong: dict[str, object]) -> None:
    verdict = judge([reading(), reading(**wrong)], RIGHT, 11.0, 12.0)
    assert verdict.num_different == 1
    assert not verdict.clean
    assert "another" in verdict.complaints[0]


def test_an_error_is_a_failure_and_nobody_at_all_is_no_success() -> None:
    verdict = judge([reading(error="Unavailable: gone")], RIGHT, 11.0, 12.0)
    assert verdict.num_failed == 1
    assert not verdict.clean
    assert not judge([], RIGHT, 11.0, 12.0).clean


def test_pauses_count_where_they_touch_the_fault_and_firsts_where_requests_begin_in_it() -> None:
    slow = reading(times=[10.5, 13.5, 13.9])
    assert slow.pause(10.6, 10.7) == pytest.approx(3.0)
    assert slow.pause(13.6, 14.0) == pytest.approx(0.4)
    assert slow.pause(15.0, 16.0) == 0.0
    assert not slow.overlaps(15.0, 16.0)
    assert reading(ended=None).overlaps(15.0, 16.0)
    assert judge([slow], RIGHT, 9.0, 16.0).first_p99 == pytest.approx(0.5)


def test_percentiles_of_few_values() -> None:
    assert percentile([], 0.5) == 0.0
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([1.0, 2.0], 0.99) == 2.0


def test_rows_have_names_of_their_own_and_say_what_happens() -> None:
    rows: list[Row[Any]] = [*ROWS, *CONTAINER_ROWS]
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    for row in rows:
        assert re.fullmatch(r"[a-z-]+", row.name)
        assert row.fault
        assert row.left
        assert row.actions
    assert named(ROWS[1].name) is ROWS[1]
    assert named("no such row") is None


def result(row: ProcessRow, *, trouble: str = "") -> RowResult:
    return RowResult(row.name, 1.0, 0.5, trouble, judge([reading()], RIGHT, 11.0, 12.0))


def test_a_report_survives_its_file_and_takes_a_row_again(tmp_path: Path) -> None:
    path = tmp_path / "chaos.json"
    assert Report.read(path) == Report()
    first = Report().with_result(result(ROWS[0], trouble="broken")).with_result(result(ROWS[1]))
    first.write(path)
    assert Report.read(path) == first
    again = Report.read(path).with_result(result(ROWS[0]))
    assert again.results[ROWS[0].name].clean
    assert f"| `{ROWS[0].name}` |" in page(again, Report())
    assert "Not run yet" in page(again, Report())
    assert "FAILED" in line_of(first.results[ROWS[0].name])
    assert "ok" in line_of(again.results[ROWS[0].name])


def test_an_unknown_row_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["chaos", "--row", "nothing-of-that-name"])
    assert main() == 2
    assert "--list" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["chaos", "--list"])
    assert main() == 0
    assert ROWS[0].name in capsys.readouterr().out
