"""`specinfer explain`: where the time of a request went, in sums, words, and a bar a round."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from specinfer import Client, RequestReport, RoundFacts, RoundReport, Timings
from specinfer.testing import FakeRouter
from specinfer_cli.app import app
from specinfer_cli.timeline import (
    BAR_WIDTH,
    COMMIT,
    IN_ROUNDS,
    ROUTER,
    VERIFY,
    picture,
    totals,
    words,
)


def a_round(offset: int, start: float, *, verify: float = 0.02, reason: str = "") -> RoundReport:
    facts = RoundFacts(
        epoch=offset + 1,
        num_draft_tokens=0 if reason else 4,
        num_accepted_tokens=0 if reason else 2,
        root_only_reason=reason,
        draft_seconds=0.004,
        verify_seconds=verify,
        queue_seconds=0.001,
        network_seconds=0.002,
        router_seconds=0.003,
        commit_seconds=0.001,
    )
    return RoundReport(offset, 1 if reason else 3, start, verify + 0.01, facts)


def report(*rounds: RoundReport, queue: float = 0.005, total: float = 0.1) -> RequestReport:
    timings = Timings(queue, 0.005, 0.04, total)
    return RequestReport("abc", "session", "stop", 1.0, 12, 8, timings, rounds)


def shown(made: RequestReport, max_rounds: int = 40, width: int = 140) -> str:
    console = Console(file=io.StringIO(), width=width, no_color=True)
    console.print(picture(made, max_rounds, wide=width > 80))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_sums_add_up_to_the_whole_time() -> None:
    found = totals(report(a_round(0, 0.01), a_round(3, 0.05)))
    assert sum(seconds for _, seconds in found.parts) == pytest.approx(0.1)
    parts = dict(found.parts)
    assert parts[VERIFY] == pytest.approx(0.04)
    # The store's part is told by itself and not twice.
    assert parts[COMMIT] == pytest.approx(0.002)
    assert parts[ROUTER] == pytest.approx(0.004)
    assert (found.num_tokens, found.num_draft_tokens, found.num_accepted_tokens) == (6, 8, 4)


def test_a_running_request_lasts_to_its_last_round() -> None:
    found = totals(report(a_round(0, 0.01), a_round(3, 0.25), total=0.0))
    assert found.seconds == pytest.approx(0.28)


@pytest.mark.parametrize(
    ("made", "meaning"),
    [
        (report(a_round(0, 0.01), a_round(3, 0.05)), "40%, went to the target's passes"),
        (report(a_round(0, 0.08), queue=0.07, total=0.12), "58%, went to waiting to be admitted"),
        (report(a_round(0, 0.01), total=1.0), "96%, went to waiting between rounds"),
    ],
)
def test_the_dominant_part_is_said(made: RequestReport, meaning: str) -> None:
    assert meaning in words(made)[-1]


def test_the_request_is_told_in_words() -> None:
    lines = words(report(a_round(7, 0.01), a_round(10, 0.05)))
    assert lines[0] == "request abc: stop, 100.0 ms"
    assert lines[1] == "prompt 12 tokens, 8 of them cached"
    assert "admitted after 5.0 ms" in lines[2]
    assert "6 tokens in 2 rounds, 3.00 a round, 4 of 8 guesses confirmed" in lines
    assert "the rounds of the first 7 tokens are not kept" in lines
    assert words(report())[0] == "request abc: stop, 100.0 ms"


def test_every_round_has_a_row_and_a_bar() -> None:
    text = shown(report(a_round(0, 0.01), a_round(3, 0.05, verify=0.05, reason="no_budget")))
    rows = [line for line in text.splitlines() if "█" in line and "verify" not in line]
    assert len(rows) == 2
    marks = "".join(part.mark for part in IN_ROUNDS)
    bars = [sum(row.count(mark) for mark in marks) for row in rows]
    assert bars == [BAR_WIDTH // 2, BAR_WIDTH]
    assert rows[0].split()[:6] == ["0", "10.0", "30.0", "3", "4", "2"]
    assert rows[1].endswith("no budget")
    # Bars can be told apart without colour.
    assert len(set(marks)) == len(IN_ROUNDS)


def test_a_long_request_shows_its_last_rounds() -> None:
    text = shown(report(*(a_round(3 * n, 0.03 * n) for n in range(9))), max_rounds=4)
    assert "5 earlier rounds are left out" in text
    assert [line.split()[0] for line in text.splitlines() if "███" in line] == [
        *("15", "18", "21", "24")
    ]


def test_a_narrow_terminal_keeps_the_bars() -> None:
    text = shown(report(a_round(0, 0.01), a_round(1003, 9.05, reason="drafter_late")), width=80)
    rows = [line for line in text.splitlines() if "███" in line]
    assert rows[0].split()[:6] == ["0", "10.0", "30.0", "3", "4", "2"]
    assert rows[1].endswith("drafter late")
    assert "…" not in text


def explained(router: FakeRouter, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["explain", *arguments, "--router", router.address])


def test_explain_asks_the_router() -> None:
    with FakeRouter("one two three four five six") as router, Client(router.address) as client:
        request_id = client.generate("hello", request_id="mine").request_id
        told = explained(router, request_id)
        assert told.exit_code == 0, told.output
        assert told.stdout.startswith("request mine: ")
        assert "most of the time" in told.stdout
        # Wide where nobody's terminal says how much room there is.
        assert "network" in told.stdout
        assert "…" not in told.stdout
        report = json.loads(explained(router, request_id, "--json").stdout)
        assert report["request_id"] == "mine"
        tokens = sum(each["num_tokens"] for each in report["rounds"])
        assert tokens == 6
        drafted = sum(each["facts"]["draft_seconds"] for each in report["rounds"])
        assert report["totals"]["draft_seconds"] == pytest.approx(drafted)
        last = explained(router, request_id, "--rounds", "1")
        assert f"{len(report['rounds']) - 1} earlier rounds are left out" in last.stdout


def test_explain_says_that_a_request_is_not_known() -> None:
    with FakeRouter("") as router:
        missing = explained(router, "nope")
    assert missing.exit_code == 1
    assert "nope" in missing.stderr
