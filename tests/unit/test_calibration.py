"""What rounds teach: chances by rank and depth without survivor bias, and what answers cost."""

from __future__ import annotations

import random

import pytest

from specinfer.messages import StepCost, VerifyResult
from specinfer.step_curve import StepCurve
from specinfer.tree import TokenTree
from specinfer_router.calibration import (
    MAX_RECORDS,
    AcceptanceCounts,
    Calibration,
    DraftCost,
)
from specinfer_router.live_costs import LiveCosts
from specinfer_router.round_history import RoundHistory
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
