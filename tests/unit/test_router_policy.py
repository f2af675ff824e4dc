"""How large a tree is asked for, and that it fits into the room that is left."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specinfer.messages import ShapeQuery, SpeculationOptions, StepCost
from specinfer.step_curve import StepCurve
from specinfer_router.policy import (
    PROBE_ROUNDS,
    AdaptiveShape,
    RoundHistory,
    StaticShape,
    clip,
    num_nodes,
)

FLAT = StepCurve([StepCost(1, 0, 0.010), StepCost(12, 0, 0.010), StepCost(64, 0, 0.100)])
STEEP = StepCurve([StepCost(1, 0, 0.010), StepCost(64, 0, 0.100)])
ANY = SpeculationOptions()


def planned(
    curve: StepCurve, acceptance: float, *, sessions: int = 1, draft: float = 0.0005, idle: int = 0
) -> ShapeQuery:
    history = RoundHistory(acceptance=acceptance, draft_seconds=draft, num_idle_rounds=idle)
    policy = AdaptiveShape(ShapeQuery(max_nodes=12, max_depth=8), curve)
    return policy.plan(ANY, history, sessions)


def test_static_shapes_follow_the_request_and_else_the_cluster() -> None:
    policy, history = StaticShape(ShapeQuery(max_nodes=8, max_depth=4)), RoundHistory()
    assert policy.plan(ANY, history, 1) == ShapeQuery(max_nodes=8, max_depth=4)
    assert policy.plan(SpeculationOptions(enabled=False), history, 1).max_nodes == 0
    assert policy.plan(SpeculationOptions(max_nodes=3), history, 1).max_nodes == 3
    assert policy.plan(SpeculationOptions(widths=(2, 2)), history, 1) == ShapeQuery(
        max_nodes=6, max_depth=2, widths=(2, 2)
    )


def test_a_good_drafter_gets_depth_and_a_bad_one_nothing() -> None:
    assert planned(FLAT, 0.95).max_depth == 8
    assert planned(FLAT, 0.05).max_nodes == 0
    depths = [planned(FLAT, acceptance).max_depth for acceptance in (0.3, 0.6, 0.9)]
    assert depths == sorted(depths)


def test_rows_that_cost_nothing_are_used() -> None:
    assert planned(FLAT, 0.8).max_nodes >= 11
    steep = planned(STEEP, 0.95)
    assert steep.max_nodes == steep.max_depth > 0


def test_many_sessions_leave_no_room_for_guesses() -> None:
    assert planned(FLAT, 0.8, sessions=1).max_nodes > 0
    assert planned(FLAT, 0.8, sessions=64).max_nodes == 0


def test_a_slow_drafter_is_not_waited_for() -> None:
    assert planned(FLAT, 0.8, draft=0.05).max_nodes == 0


def test_while_speculation_does_not_pay_it_is_tried_now_and_then() -> None:
    assert planned(FLAT, 0.05, idle=PROBE_ROUNDS - 1).max_nodes == 0
    assert planned(FLAT, 0.05, idle=PROBE_ROUNDS).max_nodes == 1


@pytest.mark.parametrize("acceptance", [0.2, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("sessions", [1, 4, 16])
def test_the_choice_is_the_best_by_the_documented_formula(acceptance: float, sessions: int) -> None:
    shape = planned(STEEP, acceptance, sessions=sessions)

    def goodput(depth: int) -> float:
        tokens = sum(acceptance**level for level in range(depth + 1))
        return tokens / (STEEP.at(sessions * (depth + 1)) + depth * 0.0005)

    best = max(range(1, 9), key=goodput)
    expected = best if goodput(best) > 1.1 / STEEP.at(sessions) else 0
    assert (shape.max_depth if shape.max_nodes else 0) == expected


def test_planning_is_cheap() -> None:
    start = time.perf_counter()
    for _ in range(200):
        planned(FLAT, 0.8)
    assert (time.perf_counter() - start) / 200 < 0.002


def test_acceptance_is_learnt_from_trials_not_from_rounds() -> None:
    history = RoundHistory(acceptance=0.5)
    for _ in range(200):
        history.observe(depth=4, num_accepted=4, seconds=0.004)
    assert history.acceptance > 0.95
    assert history.draft_seconds == pytest.approx(0.001)
    for _ in range(200):
        history.observe(depth=4, num_accepted=0, seconds=0.004)
    assert history.acceptance < 0.05
    history.observe(depth=0, num_accepted=0, seconds=0.0)
    assert history.num_idle_rounds == 1


@pytest.mark.parametrize(
    ("rows", "seconds"), [(1, 0.010), (12, 0.010), (38, 0.055), (64, 0.1), (116, 0.19), (0, 0.010)]
)
def test_costs_between_and_beyond_measurements_lie_on_a_line(rows: int, seconds: float) -> None:
    assert FLAT.at(rows) == pytest.approx(seconds)


def test_costs_that_shrink_with_rows_are_noise_and_none_is_one() -> None:
    noisy = StepCurve([StepCost(1, 0, 0.02), StepCost(8, 0, 0.01), StepCost(1, 512, 9.0)])
    assert [noisy.at(rows) for rows in (1, 8, 16)] == [0.02, 0.02, 0.02]
    assert StepCurve([]).at(5) == 1.0


@given(
    st.lists(st.integers(1, 4), max_size=4),
    st.integers(0, 40),
    st.integers(0, 10),
    st.integers(-1, 30),
    st.integers(-1, 10),
)
def test_a_clipped_shape_always_fits(
    widths: list[int], nodes: int, depth: int, max_nodes: int, max_depth: int
) -> None:
    shape = ShapeQuery(max_nodes=nodes, max_depth=depth, widths=tuple(widths))
    clipped = clip(shape, max_nodes=max_nodes, max_depth=max_depth)
    assert 0 <= clipped.max_nodes <= max(0, min(nodes, max_nodes))
    assert 0 <= clipped.max_depth <= max(0, min(depth, max_depth))
    assert num_nodes(clipped.widths) <= clipped.max_nodes
    assert clipped.widths == shape.widths[: len(clipped.widths)]
    assert (clipped.max_nodes == 0) == (clipped.max_depth == 0)


def test_a_first_answer_after_a_prompt_says_nothing_of_a_level() -> None:
    history = RoundHistory()
    history.observe(depth=4, num_accepted=4, seconds=None)
    assert history.draft_seconds == 0.0
    assert history.acceptance > 0.7
    history.observe(depth=4, num_accepted=4, seconds=0.004)
    assert history.draft_seconds == pytest.approx(0.001)


def test_a_drafter_that_was_slow_once_is_soon_trusted_again() -> None:
    history = RoundHistory()
    history.observe(depth=1, num_accepted=1, seconds=0.5)
    for _ in range(5):
        history.observe(depth=0, num_accepted=0, seconds=0.0)
        history.observe(depth=1, num_accepted=1, seconds=0.001)
    assert history.draft_seconds < 0.02
    # While guesses are made in every round one slow answer counts for little.
    steady = RoundHistory(draft_seconds=0.001)
    steady.observe(depth=1, num_accepted=1, seconds=0.011)
    assert steady.draft_seconds == pytest.approx(0.0025)
