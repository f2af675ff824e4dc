"""The adaptive shape: the best choice under what is known, and never much slower than plain."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specinfer.messages import ShapeQuery, SpeculationOptions, StepCost
from specinfer.step_curve import StepCurve
from specinfer.tree import TokenTree
from specinfer_router import goodput
from specinfer_router.calibration import Acceptance, Calibration, Snapshot, shift_acceptance
from specinfer_router.goodput import (
    PROBE_ROUNDS,
    AdaptiveShape,
    Choice,
    RoundCosts,
    sizes,
)
from specinfer_router.round_history import RoundLoad
from specinfer_router.sequoia import TokenTable, expected_tokens
from tests.kit.simulated_rounds import Simulation, World

FLAT = StepCurve([StepCost(1, 0, 0.010), StepCost(12, 0, 0.010), StepCost(64, 0, 0.100)])
STEEP = StepCurve([StepCost(1, 0, 0.010), StepCost(64, 0, 0.100)])
# Of a 1.1 B model on two cores, relative to one row.
MEASURED = StepCurve(
    [
        StepCost(rows, 256, seconds)
        for rows, seconds in ((1, 0.05), (8, 0.058), (16, 0.09), (32, 0.17), (64, 0.34))
    ]
)
CURVES = {"flat": FLAT, "steep": STEEP, "measured": MEASURED}
GOOD = ((0.7, 0.12, 0.05, 0.02),)
FADING = ((0.7, 0.1, 0.03), (0.6, 0.1, 0.03), (0.4, 0.1, 0.03), (0.2, 0.05, 0.01))
BAD = ((0.05, 0.02),)
ANY = SpeculationOptions()
CAP = ShapeQuery(max_nodes=12, max_depth=6)


def planned(
    curve: StepCurve,
    acceptance: Sequence[Sequence[float]],
    *,
    sessions: int = 1,
    fixed: float = 0.0,
    level: float = 0.0005,
) -> ShapeQuery:
    """The first plan of a session whose drafter is known to be like this."""
    calibration = Calibration(curve)
    policy = AdaptiveShape(CAP, calibration)
    history = policy.history(0.0, 100)
    tuples = tuple(tuple(row) for row in acceptance)
    history.record.snapshot = Snapshot(tuples, sum(tuples[0]))
    for depth in (1, 2, 4, 8) * 8:
        history.record.cost.observe(depth, fixed + depth * level, after_pause=False)
    return policy.plan(ANY, history, sessions)


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("acceptance", [GOOD, FADING, BAD], ids=["good", "fading", "bad"])
@pytest.mark.parametrize("sessions", [1, 3, 16, 64])
def test_the_choice_is_the_best_of_all_by_the_documented_formula(
    curve: str, acceptance: Sequence[Sequence[float]], sessions: int
) -> None:
    costs, fixed, level = CURVES[curve], 0.001, 0.0005
    table = expected_tokens(acceptance, 12, 6)

    def speed(nodes: int, depth: int) -> float:
        return table[depth][nodes] / (costs.at(sessions * (nodes + 1)) + fixed + depth * level)

    pairs = [(nodes, depth) for nodes in range(1, 13) for depth in range(1, min(nodes, 6) + 1)]
    best, plain = max(pairs, key=lambda pair: speed(*pair)), 1.0 / costs.at(sessions)
    shape = planned(costs, acceptance, sessions=sessions, fixed=fixed, level=level)
    if speed(*best) <= (1.0 + goodput.STAY_MARGIN) * plain:
        assert shape.max_nodes == 0
    else:
        assert speed(shape.max_nodes, shape.max_depth) == pytest.approx(speed(*best), rel=1e-6)


def test_rows_that_are_not_free_leave_no_room_at_64_sessions() -> None:
    assert planned(MEASURED, GOOD, sessions=1).max_nodes > 3
    for curve in CURVES.values():
        assert planned(curve, FADING, sessions=64).max_nodes <= 1
    assert planned(FLAT, BAD, sessions=64).max_nodes == 0


def test_a_slow_drafter_is_not_waited_for() -> None:
    assert planned(FLAT, GOOD, fixed=0.05).max_nodes == 0
    assert planned(FLAT, GOOD, level=0.05).max_nodes == 0


def test_requests_that_name_a_shape_get_it() -> None:
    policy = AdaptiveShape(CAP, Calibration(FLAT))
    history = policy.history(0.0, 100)
    assert policy.plan(SpeculationOptions(widths=(2, 2)), history, 1).widths == (2, 2)
    assert policy.plan(SpeculationOptions(enabled=False), history, 1).max_nodes == 0
    assert policy.plan(SpeculationOptions(max_nodes=3), history, 1).max_nodes <= 3


def simulation(world: World, sessions: int) -> Simulation:
    drafter = (StepCost(1, 0, world.draft_level),)
    policy = AdaptiveShape(CAP, Calibration(world.costs, lambda: drafter))
    return Simulation(world, policy, sessions, seed=sessions)


def plain_speed(world: World, sessions: int) -> float:
    return sessions / world.costs.at(sessions, world.context_len)


@pytest.mark.parametrize("curve", ["steep", "measured"])
@pytest.mark.parametrize("acceptance", [FADING, BAD], ids=["fading", "bad"])
@pytest.mark.parametrize("sessions", [1, 4, 64])
@pytest.mark.parametrize("level", [0.0005, 0.004, 0.2])
def test_it_is_never_much_slower_than_plain_whatever_the_load(
    curve: str, acceptance: Sequence[Sequence[float]], sessions: int, level: float
) -> None:
    world = World(CURVES[curve], acceptance, draft_level=level)
    rounds = {1: 400, 4: 150, 64: 20}[sessions]
    cluster = simulation(world, sessions)
    cluster.run(rounds // 2)
    assert cluster.run(rounds).speed >= 0.97 * plain_speed(world, sessions)


@pytest.mark.parametrize(("sessions", "least"), [(1, 2.0), (4, 1.3)])
def test_it_comes_near_the_best_tree_there_is(sessions: int, least: float) -> None:
    world = World(MEASURED, FADING)
    table = expected_tokens(FADING, 12, 6)
    best = max(
        sessions
        * table[depth][nodes]
        / (MEASURED.at(sessions * (nodes + 1)) + 0.0005 * (1 + depth))
        for nodes in range(1, 13)
        for depth in range(1, min(nodes, 6) + 1)
    )
    cluster = simulation(world, sessions)
    cluster.run(400 // sessions)
    speed = cluster.run(1200 // sessions).speed
    assert speed > 0.93 * best
    assert speed > least * plain_speed(world, sessions)


def test_costs_that_were_told_wrong_are_learnt_from_the_passes_themselves() -> None:
    told, real = FLAT, StepCurve([StepCost(1, 0, 0.010), StepCost(12, 0, 0.060)])
    policy = AdaptiveShape(CAP, Calibration(told))
    cluster = Simulation(World(real, FADING), policy, 1, seed=1)
    assert cluster.run(1).num_nodes > 10, "rows look free"
    cluster.run(300)
    assert cluster.run(900).speed >= 0.97 * plain_speed(cluster.world, 1)


def test_a_drafter_that_is_never_right_costs_its_probes_and_is_found_out_when_it_improves() -> None:
    world = World(MEASURED, ((1e-9, 1e-9),))
    cluster = simulation(world, 1)
    cluster.run(100)
    useless = cluster.run(500)
    assert 0 < useless.num_nodes <= 500 // PROBE_ROUNDS
    assert useless.speed > 0.99 * plain_speed(world, 1)
    world.acceptance = GOOD
    cluster.run(1500)
    assert cluster.run(300).speed > 1.5 * plain_speed(world, 1)


def test_a_session_whose_guesses_are_better_than_usual_gets_a_deeper_tree() -> None:
    policy, rows = AdaptiveShape(CAP, Calibration(STEEP)), (((0.5, 0.1),), ((0.92, 0.05),))
    usual, lucky = (Simulation(World(STEEP, row), policy, 1, seed=2) for row in rows)
    for _ in range(100):
        usual.run(2)
        lucky.run(1)
    assert lucky.last_shapes[0].max_depth > usual.last_shapes[0].max_depth
    assert lucky.run(100).num_tokens > 1.3 * usual.run(100).num_tokens


@pytest.mark.parametrize("sessions", [1, 16])
def test_a_probe_is_said_to_be_one(sessions: int) -> None:
    calibration = Calibration(MEASURED, lambda: (StepCost(1, 0, 0.001),))
    policy = AdaptiveShape(CAP, calibration)
    histories = [policy.history(0.0, 100) for _ in range(sessions)]
    wrong = TokenTree.chain((1, 2, 3))
    for _ in range(300):
        calibration.record("useless", 0.0).observe(wrong, (), 3)
    num_probes = 0
    for _ in range(2000):
        for history in histories:
            shape = policy.plan(SpeculationOptions(), history, sessions)
            probed = shape.max_nodes > 0
            assert history.load == RoundLoad(sessions, 1 if probed else sessions, probe=probed)
            num_probes += probed
    assert num_probes > 0


# A pass that costs what its rows cost, as with many rows it does.
BY_ROW = StepCurve([StepCost(1, 0, 0.040), StepCost(32, 0, 0.040), StepCost(256, 0, 0.320)])


@pytest.mark.parametrize("sessions", [32, 64])
def test_nothing_is_tried_where_not_even_right_guesses_would_pay(sessions: int) -> None:
    world = World(BY_ROW, GOOD, draft_level=0.002, draft_crowding=0.1, gathers=True)
    cluster = simulation(world, sessions)
    totals = cluster.run(100)
    assert totals.num_nodes == 0
    assert totals.speed == pytest.approx(plain_speed(world, sessions))


def test_many_that_begin_at_once_are_not_each_taken_to_be_alone() -> None:
    policy = AdaptiveShape(CAP, Calibration(BY_ROW))
    histories = [policy.history(0.0, 100) for _ in range(64)]
    firsts = [policy.plan(ANY, history, 0).max_nodes for history in histories]
    assert firsts[0] > 4
    assert not any(firsts[32:]), "they have no place yet, and nobody has"
    assert policy.plan(ANY, histories[0], 64).max_nodes == 0
    assert policy.plan(ANY, policy.history(0.0, 100), 0).max_nodes == 0, "one of the next 64"
    assert policy.plan(ANY, histories[0], 1).max_nodes > 4, "alone again"


def test_of_many_that_are_let_in_at_once_the_first_one_knows() -> None:
    policy = AdaptiveShape(CAP, Calibration(BY_ROW))
    histories = [policy.history(0.0, 100) for _ in range(32)]
    assert not any(policy.plan(ANY, history, 0, 32).max_nodes for history in histories)
    assert histories[0].load.num_sessions == 32
    alone = AdaptiveShape(CAP, Calibration(BY_ROW))
    assert alone.plan(ANY, alone.history(0.0, 100), 0, 1).max_nodes > 4


def test_one_client_that_asks_in_sequence_does_not_begin_probing_anew_each_time() -> None:
    """A first plan is made without a place: the guess of one more is no load that was halved."""
    policy = AdaptiveShape(CAP, Calibration(MEASURED, lambda: (StepCost(1, 0, 0.0005),)))
    world = World(MEASURED, ((1e-9, 1e-9),))
    before = Simulation(world, policy, 1, seed=1)
    before.run(100)
    num_rounds = num_probes = 0
    for _ in range(40):
        request = Simulation(world, policy, 1, seed=2)
        for at in range(64):
            num_probes += request.run(1, num_sessions=min(at, 1)).num_nodes
            num_rounds += 1
    assert 0 < num_probes < 0.015 * num_rounds


def test_requests_of_one_round_are_not_taken_to_be_there_for_ever() -> None:
    policy = AdaptiveShape(CAP, Calibration(BY_ROW))
    for _ in range(1000):
        assert policy.plan(ANY, policy.history(0.0, 100), 0).max_nodes > 4, "alone, as before"
    assert policy.num_kept < 10


@pytest.mark.parametrize("sessions", [16, 64])
def test_a_choice_is_made_anew_after_passes_and_not_for_every_session_of_one(
    sessions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, costs = list[int](), StepCurve([StepCost(1, 0, 0.05), StepCost(1024, 0, 0.05)])
    best = goodput.best_choice

    def counted(tokens: TokenTable, costs: goodput.RoundCosts) -> goodput.Choice:
        made.append(costs.num_sessions)
        return best(tokens, costs)

    monkeypatch.setattr(goodput, "best_choice", counted)
    cluster = Simulation(
        World(costs, GOOD), AdaptiveShape(CAP, Calibration(costs)), sessions, seed=1, in_turn=True
    )
    cluster.run(32)
    made.clear()
    assert cluster.run(64).num_nodes == 64 * sessions * CAP.max_nodes
    assert 0 < len(made) <= 20, "of sessions * 64 plans"


@pytest.mark.parametrize("most", [255, 1023])
def test_what_a_request_asks_for_bounds_what_is_looked_at(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    depths = list[int]()

    def counted(acceptance: Acceptance, max_nodes: int, max_depth: int) -> TokenTable:
        depths.append(max_depth)
        return expected_tokens(acceptance, max_nodes, max_depth)

    monkeypatch.setattr(goodput, "expected_tokens", counted)
    policy = AdaptiveShape(CAP, Calibration(FLAT))
    asked = SpeculationOptions(max_nodes=most, max_depth=most)
    assert policy.plan(asked, policy.history(0.0, 100), 1).max_nodes > 4
    assert depths == [goodput.MAX_DEPTH]


def test_what_was_in_vain_under_load_does_not_keep_few_sessions_waiting() -> None:
    policy = AdaptiveShape(CAP, Calibration(MEASURED, lambda: (StepCost(1, 0, 0.0005),)))
    world = World(MEASURED, BAD, gathers=True, contention=1.5)
    Simulation(world, policy, 64, seed=1).run(60)
    few = Simulation(World(MEASURED, GOOD), policy, 2, seed=2)
    few.run(120)
    assert few.run(100).speed > 1.5 * plain_speed(few.world, 2)


@pytest.mark.parametrize("sessions", [1, 4, 64])
@pytest.mark.parametrize("curve", ["flat", "steep", "measured"])
def test_a_machine_that_wanders_a_busy_drafter_and_contention_leave_it_near_plain(
    curve: str, sessions: int
) -> None:
    """Half as fast for some time, more drafting at once than a probe shows, and cores shared."""
    world = World(
        CURVES[curve],
        FADING,
        draft_level=0.001,
        draft_crowding=0.2,
        contention=1.2,
        gathers=True,
        pace=lambda number: 1.0 + (number // 20) % 2,
    )
    cluster = simulation(world, sessions)
    rounds = 80 if sessions > 4 else 400
    cluster.run(rounds)
    speed = cluster.run(rounds).speed
    assert speed >= 0.97 * plain_speed(world, sessions) / 1.5


@given(st.floats(-2, 2))
def test_a_shift_keeps_chances_and_their_order(shift: float) -> None:
    for row, moved in zip(FADING, shift_acceptance(FADING, shift), strict=True):
        assert (sum(moved) > sum(row)) == (shift > 0 and sum(moved) != sum(row))
        assert 0 < sum(moved) < 1
        assert sorted(moved, reverse=True) == list(moved)


@given(st.integers(0, 255))
def test_sizes_end_with_the_largest(largest: int) -> None:
    found = list(sizes(largest))
    assert found == sorted(set(found))
    assert not largest or (found[0], found[-1]) == (1, largest)
    assert len(found) <= 45


def test_planning_is_cheap_and_what_it_keeps_is_bounded() -> None:
    policy = AdaptiveShape(ShapeQuery(max_nodes=63, max_depth=8), Calibration(MEASURED))
    start = time.perf_counter()
    for context in range(3000):
        policy.plan(ANY, policy.history(0.0, context), 1 + context % 64)
    assert (time.perf_counter() - start) / 3000 < 0.002
    assert policy.num_kept <= goodput.MAX_CHOICES + goodput.MAX_TABLES


@pytest.mark.parametrize(
    ("sessions", "gain", "begins"),
    [(4, 1.05, False), (4, 1.2, True), (16, 1.05, False), (16, 1.2, True)],
)
def test_speculation_begins_for_a_clear_gain_and_goes_on_for_less(
    monkeypatch: pytest.MonkeyPatch, sessions: int, gain: float, begins: bool
) -> None:
    choice = Choice(4, 2, gain, least_wait=64, most_wait=64, hopeless=False)
    monkeypatch.setattr(AdaptiveShape, "_choice", lambda *_: choice)
    policy = AdaptiveShape(CAP, Calibration(FLAT))
    history = policy.history(0.0, 100)
    history.speculating, history.record.num_idle_rounds = False, 1
    assert (policy.plan(ANY, history, sessions).max_nodes == 4) is begins
    # Who is at it goes on for less.
    history.speculating, history.record.num_idle_rounds = True, 0
    assert policy.plan(ANY, history, sessions).max_nodes == 4


def test_a_crowd_looks_at_costs_once_in_a_round_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, num_looks = AdaptiveShape(CAP, Calibration(MEASURED)), 0
    look: Callable[..., goodput.Choice] = AdaptiveShape._look

    def counted(*arguments: Any, **shift: int) -> goodput.Choice:
        nonlocal num_looks
        num_looks += 1
        return look(*arguments, **shift)

    monkeypatch.setattr(AdaptiveShape, "_look", counted)
    for sessions, most in ((64, 2), (4, 64)):
        num_looks, histories = 0, [policy.history(0.0, 100) for _ in range(sessions)]
        for planned_round in range(64):
            policy.plan(ANY, histories[planned_round % sessions], sessions)
        assert 1 <= num_looks <= most
    # A few sessions are each other's costs less: every round of theirs looks.
    assert num_looks == 64


def test_a_crowds_plain_tokens_share_what_comes_with_a_round() -> None:
    calibration = Calibration(FLAT)
    for _ in range(200):
        calibration.observe_pass(16, 0, FLAT.at(16), share=1.0, overhead_seconds=0.02)
    alone, together = (
        RoundCosts(calibration, sessions, 0, 0.0, 0.0, 0.0, plain_seconds=10.0).plain()
        for sessions in (8, 16)
    )
    overhead = calibration.overhead_seconds.value
    assert overhead > 0.01
    assert alone == pytest.approx(FLAT.at(8) + overhead, rel=0.05)
    assert together == pytest.approx(FLAT.at(16) + overhead / 8, rel=0.05)
