"""The benchmark of overlaps: its arms are what they say, and it sees a token that is wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest

from specinfer.errors import SpecinferError
from specinfer_bench.overlap import OVERLAPS, Overlap, compare, run_turn
from specinfer_bench.stated_engines import StatedRunner, World
from specinfer_bench.suite.tables import overlap_table

TOKENS = 16


@pytest.mark.parametrize("name", OVERLAPS)
def test_both_arms_give_the_targets_tokens(name: str) -> None:
    overlap = OVERLAPS[name]
    for world in (overlap.off, overlap.on):
        assert run_turn(world, overlap.sessions, TOKENS).right


def test_negative_control_a_target_of_another_rule_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    overlap = OVERLAPS["drafting ahead"]
    made = StatedRunner.__init__

    def unsure(self: StatedRunner, seconds: float, acceptance: float = 0.5) -> None:
        made(self, seconds, acceptance)

    monkeypatch.setattr(StatedRunner, "__init__", unsure)
    with pytest.raises(SpecinferError, match="other tokens"):
        compare(overlap, 1, TOKENS)


def test_a_comparison_is_a_row_of_the_page() -> None:
    found = compare(OVERLAPS["drafting ahead"], 1, TOKENS)
    rows = overlap_table({"guesses": 4, "acceptance": 0.9, "overlaps": {"ahead": found}})
    assert "| ahead | 40 | 4 | 0 | " in rows
    assert "| yes |" in rows


def test_an_arm_of_more_rounds_for_as_many_tokens_is_slower() -> None:
    """Guesses that are never right, though quicker to come: more rounds a second, fewer tokens."""
    good = World(verify_seconds=0.02, draft_seconds=0.008)
    found = compare(Overlap(1, good, replace(good, acceptance=0.0, draft_seconds=0.0)), 1, TOKENS)
    rounds_off, rounds_on = found["rounds, off"], found["rounds, on"]
    assert isinstance(rounds_off, int | float)
    assert isinstance(rounds_on, int | float)
    assert rounds_on > 2 * rounds_off
    ratio = found["on over off"]
    assert isinstance(ratio, dict)
    assert ratio["median"] < 0.9


def test_a_propose_beside_a_long_commit_is_not_waited_for() -> None:
    """The switch switches: in line, a commit's time is on top of drafting's in every round."""
    overlap = OVERLAPS["propose beside the commit"]
    off, on = (
        run_turn(
            replace(world, verify_seconds=0.001, draft_seconds=0.02, commit_seconds=0.08), 1, TOKENS
        ).tokens_per_second
        for world in (overlap.off, overlap.on)
    )
    # Every round but the first waits 160 ms in line and 80 ms beside.
    assert on > 1.3 * off
