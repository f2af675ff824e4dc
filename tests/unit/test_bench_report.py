"""The benchmark's arithmetic and its inputs: ratios, depths, prompt files, options."""

import json
from pathlib import Path

import pytest

from specinfer import InvalidRequest, RoundFacts
from specinfer_bench.measure import Sample
from specinfer_bench.options import BenchOptions
from specinfer_bench.prompts import read_prompts
from specinfer_bench.report import IN_PROCESS, OFF, ON, build_report


def sample(seconds: float, *accepted: int, tokens: tuple[int, ...] = (1, 2, 3, 4)) -> Sample:
    rounds = tuple(
        RoundFacts(index, 4, count, verify_seconds=0.5) for index, count in enumerate(accepted)
    )
    return Sample(tokens, seconds, seconds / 2, rounds)


def test_the_speedup_is_the_median_over_repeats() -> None:
    passes = [
        {OFF: [sample(4.0), sample(2.0)], ON: [sample(2.0, 2, 0), sample(1.0, 1)]},
        {OFF: [sample(6.0), sample(6.0)], ON: [sample(2.0, 2), sample(1.0, 2)]},
        {OFF: [sample(1.0), sample(2.0)], ON: [sample(2.0, 0), sample(1.0, 1)]},
    ]
    report = build_report(passes, {})
    assert (report.speedup, report.speedup_min, report.speedup_max) == (2.0, 1.0, 4.0)
    assert report.identical
    assert report.num_prompts == 2
    assert report.num_tokens == 8
    assert report.accepted_by_depth == pytest.approx((5 / 7, 3 / 7))
    assert report.mean_accepted_tokens == pytest.approx(8 / 7)
    assert report.cluster_overhead is None
    assert report.arms[ON].tokens_per_second == pytest.approx(24 / 9)
    assert report.arms[ON].round_ms["verify"] == pytest.approx(500)
    json.dumps(report.as_dict())


def test_one_other_token_is_not_identical() -> None:
    passes = [{OFF: [sample(1.0)], ON: [sample(1.0, 1, tokens=(1, 2, 3, 5))]}]
    assert not build_report(passes, {}).identical


def test_the_clusters_cost_is_measured_against_one_process() -> None:
    passes = [{OFF: [sample(4.0)], ON: [sample(1.05, 1)], IN_PROCESS: [sample(1.0, 1)]}]
    assert build_report(passes, {}).cluster_overhead == pytest.approx(0.05)


def test_prompt_files(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"turns": ["b", "c"]}\n{"prompt": "d"}\n')
    assert read_prompts(path) == ["a", "b", "d"]
    assert read_prompts(path, 2) == ["a", "b"]


def test_only_line_feeds_end_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "a\u2028b\x85c"}\r\n{"prompt": "d"}\n', encoding="utf-8", newline=""
    )
    assert read_prompts(path) == ["a\u2028b\x85c", "d"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1]",
        '{"prompt": ""}',
        '{"prompt": 3}',
        '{"turns": {"a": 1}}',
        '{"turns": []}',
        '{"turns": "abc"}',
        '{"turns": ["a", 1]}',
    ],
)
def test_bad_prompt_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(InvalidRequest) as caught:
        read_prompts(path)
    assert caught.value.field == "prompts"


def test_a_missing_prompt_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="nowhere"):
        read_prompts(tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"num_prompts": 0}, "num_prompts"),
        ({"grow": "70b"}, "grow"),
        ({"router": "127.0.0.1:1", "grow": "1b"}, "router"),
    ],
)
def test_bad_options_name_their_field(options: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        BenchOptions(**options)  # type: ignore[arg-type]
    assert caught.value.field == field
