"""What rounds teach: chances by rank and depth without survivor bias, and what answers cost."""

from __future__ import annotations

import random
from typing import Any

import pytest

from specinfer.messages import StepCost, VerifyResult
from specinfer.step_curve import StepCurve
from specinfer.tree import TokenTree
from specinfer_router.calibration import (
    MAX_RECORDS,
    SNAPSHOT_ROUNDS,
    AcceptanceCounts,
    Calibration,
    DraftCost,
    Snapshot,
)
from specinfer_router.crowd import CROWD, tellers
from specinfer_router.live_costs import LiveCosts
from specinfer_router.round_history import RoundHistory, RoundLoad
from specinfer_router.seats import Checked, Guess

#        root
#       /    \
#      1      2
#     / \      \
#    3   4      5
TREE = TokenTree((0, 11, 12, 13, 14, 15), (-1, 0, 0, 1, 1, 2))


def test_only_children_of_confirmed_nodes_are_counted() -> None:
    counts = AcceptanceCounts()
    assert counts.observe(TREE, (), 6) == [False]
    assert counts.observe(TREE, (1, 4), 6) == [True, True]
    assert counts.observe(TREE, (2,), 6) == [True, False]
    assert counts.observe(TREE, (1,), 6) == [True, False]


def test_what_the_drafter_did_not_bring_is_not_its_merit() -> None:
    counts = AcceptanceCounts()
    assert counts.observe(TREE, (1, 4), 4) == [True, False], "node 4 was predicted by the caller"
    assert counts.observe(TREE, (2, 5), 3) == [True], "nothing of its own below node 2"
    assert counts.observe(TokenTree.root_only(0), (), 1) == [False], "asked, and no guess came"


def rounds(chances: tuple[tuple[float, ...], ...], num_rounds: int) -> AcceptanceCounts:
    draw, counts = random.Random(3), AcceptanceCounts()
    for _ in range(num_rounds):
        path: list[int] = []
        for row, children in zip(chances, ((1, 2), (3, 4)), strict=True):
            (node,) = draw.choices((*children, 0), (*row, 1 - sum(row)))
            if not node or (path and path != [1]):
                break
            path.append(node)
        counts.observe(TREE, path, 6)
    return counts


def test_chances_are_learnt_by_rank_and_depth() -> None:
    acceptance = rounds(((0.6, 0.2), (0.4, 0.3)), 3000).snapshot().acceptance
    assert acceptance[0][:2] == pytest.approx((0.6, 0.2), abs=0.08)
    # Counted by all rounds, survivors or not, they would be 0.24 and 0.18.
    assert acceptance[1][:2] == pytest.approx((0.4, 0.3), abs=0.1)
    assert acceptance[7][0] == pytest.approx(acceptance[5][0]), "never reached: as all together"


def test_the_old_is_forgotten_and_rows_stay_chances() -> None:
    counts = AcceptanceCounts()
    for _ in range(1500):
        counts.observe(TREE, (1, 3), 6)
    assert counts.snapshot().acceptance[0][0] > 0.9
    for _ in range(1500):
        counts.observe(TREE, (2, 5), 6)
    snapshot = counts.snapshot()
    assert snapshot.acceptance[0][0] < 0.2
    for row in snapshot.acceptance:
        assert sum(row) <= 0.99 + 1e-9
        assert sorted(row, reverse=True) == list(row)
    assert 0.9 < snapshot.overall <= 1.0


def test_a_draft_has_a_fixed_part_and_a_part_for_each_level() -> None:
    cost = DraftCost()
    assert cost.parts() == (0.0, 0.0)
    for levels in (1, 4, 8, 2, 6) * 12:
        cost.observe(levels, 0.003 + 0.001 * levels, after_pause=False)
    assert cost.parts() == pytest.approx((0.003, 0.001), rel=0.05)


def test_probes_of_one_level_do_not_make_deep_trees_look_dear() -> None:
    cost = DraftCost(level_seconds=0.001)
    assert cost.parts() == (0.0, 0.001)
    for _ in range(20):
        cost.observe(1, 0.004, after_pause=True)
    assert cost.parts() == pytest.approx((0.003, 0.001))


def test_a_drafter_that_was_slow_once_is_soon_trusted_again() -> None:
    cost = DraftCost()
    cost.observe(1, 0.5, after_pause=False)
    for _ in range(6):
        cost.observe(1, 0.001, after_pause=True)
    assert sum(cost.parts()) < 0.02
    for _ in range(40):
        cost.observe(1, 0.001, after_pause=False)
    usual = sum(cost.parts())
    cost.observe(1, 0.011, after_pause=False)
    assert sum(cost.parts()) < usual + 0.001, "one slow answer among many counts for little"


def test_a_drafter_that_is_only_ever_asked_to_read_a_prompt_is_trusted_again_too() -> None:
    calibration = Calibration(StepCurve(()), lambda: (StepCost(1, 0, 0.5),))
    histories = [RoundHistory(calibration, temperature=0.0, context_len=40) for _ in range(12)]
    for history in histories:
        observed(history, accepted=(1,), after_prefill=True)
    assert sum(histories[-1].record.cost.parts()) < 0.01, "said 0.5, took 0.004"


def test_passes_correct_what_was_measured_for_their_number_of_rows() -> None:
    live = LiveCosts(StepCurve([StepCost(1, 0, 0.01), StepCost(64, 0, 0.01)]))
    assert live.at(9, 0) == 0.01
    for _ in range(50):
        live.observe(1, 100, 0.01)
        live.observe(9, 100, 0.02)
    assert live.at(1, 0) == pytest.approx(0.01, rel=0.1)
    assert live.at(9, 0) == pytest.approx(0.02, rel=0.1)
    live.observe(9, 100, 10.0)
    assert live.at(9, 0) < 0.03, "one pass that the machine was away from"


def test_a_machine_that_is_slow_for_a_while_is_slow_for_all_passes() -> None:
    live = LiveCosts(StepCurve([StepCost(1, 0, 0.01), StepCost(64, 0, 0.02)]))
    for _ in range(50):
        live.observe(1, 100, 0.010)
        live.observe(64, 100, 0.030)
    assert live.at(64, 0) / live.at(1, 0) == pytest.approx(3.0, rel=0.1)
    for _ in range(100):
        live.observe(64, 100, 0.060)
    assert live.at(64, 0) == pytest.approx(0.06, rel=0.1)
    assert live.at(1, 0) == pytest.approx(0.02, rel=0.25), "though none was seen since"


def test_the_first_passes_say_how_fast_the_machine_is() -> None:
    live = LiveCosts(StepCurve([StepCost(1, 0, 0.01), StepCost(64, 0, 0.02)]))
    for _ in range(20):
        live.observe(64, 100, 0.04)
    assert live.at(64, 0) == pytest.approx(0.04, rel=0.1)
    assert live.at(1, 0) == 0.01, "hoped: who is never tried is never learnt of"
    for _ in range(20):
        live.observe(1, 100, 0.02)
    assert live.at(1, 0) == pytest.approx(0.02, rel=0.1)


def test_passes_of_more_rows_than_any_has_cost_as_the_largest_do() -> None:
    live = LiveCosts(StepCurve([StepCost(1, 0, 0.01), StepCost(64, 0, 0.64)]))
    for _ in range(30):
        live.observe(256, 100, 5.12)
    assert live.at(576, 0) == pytest.approx(2 * 5.76, rel=0.1)


def test_a_drafter_that_many_ask_is_slower_than_a_probe_says() -> None:
    calibration = Calibration(StepCurve(()), lambda: (StepCost(1, 0, 0.002), StepCost(64, 0, 0.02)))
    record = calibration.record("a", 0.0)
    assert (record.slowness(1), record.slowness(64)) == pytest.approx((1.0, 10.0))
    assert Calibration(StepCurve(())).record("a", 0.0).slowness(64) == 1.0, "not known"


def test_drafters_and_temperatures_are_told_apart_and_bounded() -> None:
    calibration = Calibration(StepCurve(()), lambda: (StepCost(1, 0, 0.002),))
    first = calibration.record("a", 0.0)
    assert first.cost.known_level == 0.002
    assert calibration.record("", 0.0) is first, "whichever was heard of last"
    assert calibration.record("a", 0.8) is not first
    assert calibration.record("a", 0.6) is calibration.record("a", 1.0)
    assert calibration.record("a", 7.0) is calibration.record("a", 99.0)
    for index in range(3 * MAX_RECORDS):
        calibration.record(f"drafter-{index}", 0.0)
    assert calibration.record("a", 0.0) is not first


def observed(history: RoundHistory, *, accepted: tuple[int, ...], after_prefill: bool) -> None:
    guess = Guess(
        *(TREE, "", 0.004),
        num_draft_nodes=6,
        draft_depth=2,
        drafter="a",
        after_prefill=after_prefill,
    )
    result = VerifyResult(1, accepted, (1,) * (len(accepted) + 1), num_rows=6, compute_seconds=0.02)
    history.observe(guess, Checked(result, 0.021), context_len=50)


def test_a_round_that_read_a_prompt_says_nothing_of_costs() -> None:
    calibration = Calibration(StepCurve([StepCost(1, 0, 0.01)]), lambda: (StepCost(1, 0, 0.001),))
    history = RoundHistory(calibration, temperature=0.0, context_len=40)
    observed(history, accepted=(1, 3), after_prefill=True)
    assert (history.record.cost.parts(), calibration.num_passes) == ((0.0, 0.001), 0)
    assert history.shift > 0
    observed(history, accepted=(), after_prefill=False)
    assert sum(history.record.cost.parts()) > 0
    assert calibration.costs.at(6, 0) > 0.01
    assert calibration.overhead_seconds.value == pytest.approx(0.001)


class Teller(Calibration):
    """Counts who tells of each pass."""

    def __init__(self) -> None:
        super().__init__(StepCurve([StepCost(1, 0, 0.01)]), lambda: (StepCost(1, 0, 0.001),))
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
    load = RoundLoad(num_sessions, 1 if probe else num_sessions, probe)
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
    assert set(told[1:]) <= {num_sessions // each, -(-num_sessions // each)}
    assert max(told) < 2 * CROWD
    # Those who tell stand for those who do not: a pass weighs as much whoever it is told by.
    assert calibration.num_passes == pytest.approx(num_passes, rel=0.05)


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
        one_of(history, 64, accepted=(), probe=True, after_prefill=not num_idle)
        assert record.snapshot.overall < known.overall
        num_told += calibration.num_told - before
    assert num_told == (2 if num_idle else 0), "of a pass a probe tells in its turn alone"


def test_a_crowd_that_guesses_again_weighs_its_pass_once_and_few_of_its_guesses() -> None:
    calibration = Teller()
    histories = histories_of(calibration, 64)
    costs = DraftCost(0.001)
    calibration.record("a", 0.0).cost = costs
    for drafter in ("", "", "", "a"):
        before = calibration.num_passes
        for history in histories:
            one_of(history, 64, drafter=drafter)
    assert calibration.num_passes == pytest.approx(before + 1.0)
    few = DraftCost(0.001)
    for _ in range(CROWD):
        few.observe(2, 0.004 / calibration.record("a", 0.0).slowness(64), after_pause=True)
    assert vars(costs) == vars(few)


@pytest.mark.parametrize(("num_sessions", "weight"), [(CROWD, 1), (16, 1), (32, 2), (64, 3)])
def test_what_a_guess_of_a_crowd_counts_for(num_sessions: int, weight: int) -> None:
    calibration, expected = Teller(), AcceptanceCounts()
    (history,) = histories_of(calibration, 1)
    for _ in range(tellers(num_sessions)):
        one_of(history, num_sessions, accepted=())
    one_of(history, num_sessions, accepted=(), probe=True)
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


def test_a_round_that_counts_for_several_counts_as_so_many_alike() -> None:
    once, several = AcceptanceCounts(), AcceptanceCounts()
    # Long enough to forget in, and of another kind in the end.
    for accepted in ((1, 3), (1,)) * 60 + ((), (2, 5)) * 20:
        several.observe(TREE, accepted, 6, weight=3)
        for _ in range(3):
            once.observe(TREE, accepted, 6)
    assert several.snapshot().overall == pytest.approx(once.snapshot().overall, abs=0.005)
    for ours, theirs in zip(several.snapshot().acceptance, once.snapshot().acceptance, strict=True):
        assert ours == pytest.approx(theirs, abs=0.005)
