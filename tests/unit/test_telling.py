"""Of a crowd's rounds a few are told, spread over its passes, and stand for the others."""

from __future__ import annotations

from collections import deque
from itertools import pairwise
from typing import Any

import pytest

from specinfer.messages import StepCost, VerifyResult
from specinfer.step_curve import StepCurve
from specinfer.tree import TokenTree
from specinfer_router.calibration import (
    SNAPSHOT_ROUNDS,
    AcceptanceCounts,
    Calibration,
    DraftCost,
    Snapshot,
)
from specinfer_router.crowd import CROWD, tellers
from specinfer_router.round_history import RoundHistory, RoundLoad
from specinfer_router.seats import Checked, Guess

TREE = TokenTree((0, 11, 12, 13, 14, 15), (-1, 0, 0, 1, 1, 2))


class Teller(Calibration):
    """Counts who tells of each pass."""

    def __init__(self, *draft_costs: StepCost) -> None:
        costs = draft_costs or (StepCost(1, 0, 0.001),)
        super().__init__(StepCurve([StepCost(1, 0, 0.01)]), lambda: costs)
        self.num_told = 0

    def observe_pass(self, *args: Any, **options: Any) -> None:
        self.num_told += 1
        super().observe_pass(*args, **options)


def one_of(
    history: RoundHistory,
    num_sessions: int,
    *,
    drafter: str = "a",
    accepted: tuple[int, ...] = (1, 3),
    num_drafting: int = 0,
    probe: bool = False,
    after_prefill: bool = False,
) -> None:
    """A round of one of so many sessions that share each pass."""
    guess = Guess(
        *(TREE, "", 0.004),
        num_draft_nodes=6,
        draft_depth=2,
        drafter=drafter,
        after_prefill=after_prefill,
    )
    rows = num_sessions * len(TREE)
    tokens = (1,) * (1 + len(accepted))
    result = VerifyResult(1, accepted, tokens, num_rows=rows, compute_seconds=0.02)
    load = RoundLoad(num_sessions, num_drafting or num_sessions, probe=probe)
    history.observe(guess, Checked(result, 0.021), context_len=50, load=load)


def histories_of(calibration: Calibration, num_sessions: int) -> list[RoundHistory]:
    return [RoundHistory(calibration, temperature=0.0, context_len=40) for _ in range(num_sessions)]


@pytest.mark.parametrize("num_sessions", [1, CROWD, 2 * CROWD, 3 * CROWD + 5, 8 * CROWD])
def test_of_each_pass_of_a_crowd_as_many_tell_as_are_no_crowd(num_sessions: int) -> None:
    calibration = Teller()
    histories = histories_of(calibration, num_sessions)
    num_passes, told, each = 24, [], tellers(num_sessions)
    for _ in range(num_passes + 1):
        before = calibration.num_told
        for history in histories:
            one_of(history, num_sessions)
        told.append(calibration.num_told - before)
    assert told[0] == 0, "the first pass reads prompts"
    assert all(abs(number - num_sessions / each) < 2 for number in told[1:])
    assert max(told) < 2 * CROWD
    # Those who tell stand for those who do not: a pass weighs as much whoever it is told by.
    assert calibration.num_passes == pytest.approx(num_passes, rel=0.05)


@pytest.mark.parametrize("num_sessions", [2 * CROWD, 4 * CROWD, 8 * CROWD, 16 * CROWD])
def test_sessions_that_come_one_with_each_pass_do_not_all_tell_of_the_same(
    num_sessions: int,
) -> None:
    calibration, told = Teller(), list[int]()
    going: deque[RoundHistory] = deque(maxlen=num_sessions)
    for num_passes in range(3 * num_sessions):
        going.append(*histories_of(calibration, 1))
        before = calibration.num_told
        for history in going:
            one_of(history, num_sessions)
        if num_passes >= num_sessions:
            told.append(calibration.num_told - before)
    assert max(told) < 2 * CROWD
    # With 128 every second pass is told by nobody; none longer than that.
    assert min(map(sum, pairwise(told))) >= CROWD
    # Of a session's first pass, which read its prompt, it does not tell.
    mean = (num_sessions - 1) / tellers(num_sessions)
    assert sum(told) / len(told) == pytest.approx(mean, rel=0.05)


def test_the_last_of_a_crowd_tells_no_more_of_its_guesses_than_the_others() -> None:
    (history,), expected = histories_of(Teller(), 1), AcceptanceCounts()
    # Alone for a moment, and of late there were 64: no probe.
    for _ in range(4 * tellers(64)):
        one_of(history, 64, accepted=(), num_drafting=1)
    one_of(history, 64, accepted=(), num_drafting=1, probe=True)
    for _ in range(4):
        expected.observe(TREE, (), 6, weight=3)
    expected.observe(TREE, (), 6)
    assert history.record.snapshot.overall == expected.snapshot().overall


def test_a_probe_is_drafted_for_alone() -> None:
    """A drafter that is slow for 64 at once is not taken to be fast because one was tried."""
    calibration = Teller(StepCost(1, 0, 0.001), StepCost(64, 0, 0.064))
    (history,) = histories_of(calibration, 1)
    assert calibration.record("a", 0.0).slowness(64) == pytest.approx(64.0)
    one_of(history, 64, num_drafting=1, probe=True)
    alone = DraftCost(0.001)
    alone.observe(2, 0.004, after_pause=True)
    assert history.record.cost.parts() == alone.parts()


def test_every_session_of_a_crowd_tells_in_turn() -> None:
    calibration = Teller()
    for history in histories_of(calibration, 64):
        before = calibration.num_told
        for _ in range(1 + 2 * tellers(64)):
            one_of(history, 64)
        assert calibration.num_told == before + 2


@pytest.mark.parametrize("num_idle", [0, 3])
def test_a_probe_is_told_whosever_turn_it_is(num_idle: int) -> None:
    """What it found is wanted at once, in a session's first round too, which reads the prompt."""
    calibration = Teller()
    for history in histories_of(calibration, 64):
        for _ in range(4 * tellers(64)):
            one_of(history, 64)
    record, num_told = calibration.record("a", 0.0), 0
    for history in histories_of(calibration, 2 * tellers(64)):
        for _ in range(num_idle):
            one_of(history, 64, drafter="")
        known, before = record.snapshot, calibration.num_told
        one_of(*(history, 64), accepted=(), num_drafting=1, probe=True, after_prefill=not num_idle)
        assert record.snapshot.overall < known.overall
        num_told += calibration.num_told - before
    # Of a pass a probe tells in its turn alone, and of its first one not even then.
    fewest, most = (1, 3) if num_idle else (0, 0)
    assert fewest <= num_told <= most


def test_a_crowd_that_guesses_again_weighs_its_pass_once_and_few_of_its_guesses() -> None:
    calibration = Teller()
    histories = histories_of(calibration, 64)
    costs = DraftCost(0.001)
    calibration.record("a", 0.0).cost = costs
    for drafter in ("", "", "", "a"):
        weighed, told = calibration.num_passes, calibration.num_told
        for history in histories:
            one_of(history, 64, drafter=drafter)
    num_told = calibration.num_told - told
    assert num_told == pytest.approx(CROWD, abs=1)
    assert calibration.num_passes == pytest.approx(weighed + num_told / CROWD)
    few = DraftCost(0.001)
    for _ in range(num_told):
        few.observe(2, 0.004 / calibration.record("a", 0.0).slowness(64), after_pause=True)
    assert vars(costs) == vars(few)


@pytest.mark.parametrize(("num_sessions", "weight"), [(CROWD, 1), (16, 1), (32, 2), (64, 3)])
def test_what_a_guess_of_a_crowd_counts_for(num_sessions: int, weight: int) -> None:
    calibration, expected = Teller(), AcceptanceCounts()
    (history,) = histories_of(calibration, 1)
    for _ in range(tellers(num_sessions)):
        one_of(history, num_sessions, accepted=())
    one_of(history, num_sessions, accepted=(), num_drafting=1, probe=True)
    expected.observe(TREE, (), 6, weight=weight)
    expected.observe(TREE, (), 6)
    assert history.record.snapshot.overall == expected.snapshot().overall


def test_a_crowds_chances_are_made_anew_after_as_many_rounds_as_those_of_a_few() -> None:
    def num_snapshots(num_sessions: int) -> int:
        calibration, found = Teller(), set[Snapshot]()
        histories = histories_of(calibration, num_sessions)
        for _ in range(10 * SNAPSHOT_ROUNDS):
            for history in histories:
                one_of(history, num_sessions)
                found.add(history.record.snapshot)
        return len(found)

    few = num_snapshots(CROWD)
    assert 5 <= few <= 40
    assert num_snapshots(64) == pytest.approx(few, abs=3)


def test_idle_rounds_forget_a_sessions_luck_in_a_crowd_too() -> None:
    alone, crowded = histories_of(Teller(), 2)
    for history, num_sessions in ((alone, 1), (crowded, 64)):
        history.observe(
            Guess(TREE, "", 0.004, num_draft_nodes=6, draft_depth=2, drafter="a"),
            Checked(VerifyResult(1, (), (1,), num_rows=6), 0.021),
            context_len=50,
            load=RoundLoad(num_sessions, 1, probe=True),
        )
        assert history.shift < 0
        for _ in range(200):
            one_of(history, num_sessions, drafter="")
    assert abs(crowded.shift) < 0.01
    assert abs(alone.shift) < 0.01
