"""How many sessions share a target of late: a moment in which some are away does not count."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specinfer.messages import ShapeQuery, SpeculationOptions, StepCost
from specinfer.step_curve import StepCurve
from specinfer_router import crowd
from specinfer_router.calibration import Calibration
from specinfer_router.crowd import DIP_SECONDS, RecentMost
from specinfer_router.goodput import AdaptiveShape
from specinfer_router.opening import SeatLimits
from specinfer_router.policy import StaticShape
from specinfer_router.round_history import RoundHistory, RoundLoad
from specinfer_router.router import RouterLimits
from tests.kit.fake_workers import FakeVerifier, info_of
from tests.kit.router import request_of, running_router
from tests.kit.simulated_rounds import Simulation, World


class Clock:
    """Seconds that pass when they are told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_those_who_left_a_moment_ago_are_still_counted(clock: Clock) -> None:
    recent = RecentMost(clock)
    assert recent.most(3) == 3
    for number in (32, 31, 30):
        recent.note(number)
    assert recent.most(29) == 32
    clock.now = 0.9 * DIP_SECONDS
    assert recent.most(2) == 32
    assert recent.most(40) == 40, "more are more at once"
    clock.now = 1.1 * DIP_SECONDS
    assert recent.most(2) == 2


def test_each_fall_counts_for_as_long_as_any_other(clock: Clock) -> None:
    recent = RecentMost(clock)
    recent.note(9)
    clock.now = 0.6 * DIP_SECONDS
    recent.note(5)
    clock.now = 1.2 * DIP_SECONDS
    assert recent.most(1) == 5


@given(st.lists(st.tuples(st.sampled_from((-1, 1)), st.integers(0, 12)), max_size=60))
def test_it_is_the_most_of_the_window_and_keeps_little(moves: list[tuple[int, int]]) -> None:
    clock, number, seen = Clock(), 0, list[tuple[float, int]]()
    recent = RecentMost(clock)
    for change, steps in moves:
        clock.now += steps * DIP_SECONDS / 10.5
        if number + change >= 0:
            if change < 0:
                # Until now there were as many.
                seen.append((clock.now, number))
                recent.note(number)
            number += change
        within = [most for at, most in seen if at >= clock.now - DIP_SECONDS]
        assert recent.most(number) == max([number, *within])
        assert len(recent._before) <= max((most for _, most in seen), default=0)


class Listening(StaticShape):
    """One shape for all, and what is told of the load: sessions of late, and those there are."""

    def __init__(self, max_nodes: int = 4) -> None:
        super().__init__(ShapeQuery(max_nodes=max_nodes, max_depth=2))
        self.told: list[tuple[int, int]] = []

    def plan(
        self,
        options: SpeculationOptions,
        history: RoundHistory,
        num_sessions: int,
        of_late: int = 0,
    ) -> ShapeQuery:
        self.told.append((of_late, num_sessions))
        return super().plan(options, history, num_sessions, of_late)


@pytest.mark.parametrize(("seconds", "counted"), [(60.0, True), (0.0, False)])
async def test_a_session_that_goes_on_is_told_of_who_left(
    seconds: float, counted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crowd, "DIP_SECONDS", seconds)
    policy = Listening()
    async with running_router(policy=policy) as bench:
        requests = (request_of(max_tokens=400), request_of(max_tokens=10))
        await asyncio.gather(*(bench.generate(request) for request in requests))
    assert (2, 2) in policy.told
    assert ((2, 1) in policy.told) is counted
    assert ((1, 1) in policy.told[-10:]) is not counted


class Waiting(Listening):
    """Guesses nothing for now, and may another time."""

    def __init__(self) -> None:
        super().__init__(max_nodes=0)

    def never_guesses(self, options: SpeculationOptions) -> bool:
        return False


@pytest.mark.parametrize(("seconds", "together"), [(60.0, True), (0.0, False)])
async def test_tokens_come_together_while_who_left_still_counts(
    seconds: float, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crowd, "DIP_SECONDS", seconds)
    policy = Waiting()
    verifiers = [FakeVerifier(info_of("verify"), most_plain_tokens=16)]
    limits = RouterLimits(max_tree_nodes=32, seats=SeatLimits(plain_seconds=1000.0))
    async with running_router(policy=policy, verifiers=verifiers, limits=limits) as bench:
        requests = [request_of(max_tokens=40, seed=seed) for seed in range(crowd.CROWD)]
        longest = bench.generate(request_of(max_tokens=400))
        made, *_ = await asyncio.gather(longest, *map(bench.generate, requests))
    assert policy.told[-1][1] == 1, "it was the last one"
    *_, before, _ = made.rounds
    assert (len(before.token_ids) > 1) is together


async def test_each_verify_worker_has_a_crowd_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crowd, "DIP_SECONDS", 60.0)
    policy = Listening()
    verifiers = [FakeVerifier(info_of(name)) for name in ("one", "two")]
    async with running_router(policy=policy, verifiers=verifiers) as bench:
        await asyncio.gather(*(bench.generate(request_of(seed=seed)) for seed in range(3)))
        links = bench.cluster.verifiers.links
        assert sorted(link.recent_seats.most(0) for link in links) == [1, 2]
    assert max(policy.told) == (2, 2)


def test_those_who_take_the_places_of_others_are_not_planned_for_on_top_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(crowd, "DIP_SECONDS", 60.0)
    policy = AdaptiveShape(ShapeQuery(max_nodes=8, max_depth=4), Calibration(StepCurve(())))
    straggler = policy.history(0.0, 100)
    policy.plan(SpeculationOptions(), straggler, 1, of_late=16)
    assert straggler.load == RoundLoad(16, 1), "only one is drafted for"
    loads = []
    followers = [policy.history(0.0, 100) for _ in range(20)]
    for follower in followers:
        policy.plan(SpeculationOptions(), follower, 0)
        loads.append(follower.load.num_sessions)
    assert loads == [16] * 15 + [17, 18, 19, 20, 21]
    # Who comes later comes to those who are there.
    monkeypatch.setattr(crowd, "DIP_SECONDS", -1.0)
    follower = policy.history(0.0, 100)
    policy.plan(SpeculationOptions(), straggler, 1, of_late=1)
    policy.plan(SpeculationOptions(), follower, 0)
    assert follower.load == RoundLoad(2, 2)


def test_what_was_in_vain_for_a_crowd_stays_so_while_some_are_away() -> None:
    policy = AdaptiveShape(ShapeQuery(max_nodes=8, max_depth=4), Calibration(StepCurve(())))
    straggler = policy.history(0.0, 100)
    policy.plan(SpeculationOptions(), straggler, 16)
    straggler.record.num_vain_probes = 3
    policy.plan(SpeculationOptions(), straggler, 1, of_late=16)
    assert straggler.record.num_vain_probes == 3
    policy.plan(SpeculationOptions(), straggler, 1, of_late=1)
    assert straggler.record.num_vain_probes == 0


def rounds_until_it_gives_up(lead: int) -> int:
    """Of each of 64 sessions, after the drafter's guesses have gone bad in round `lead`."""
    costs = StepCurve([StepCost(rows, 0, s) for rows, s in ((1, 0.01), (64, 0.012), (256, 0.03))])
    world = World(costs, [[0.9, 0.03]])
    policy = AdaptiveShape(ShapeQuery(12, 12), Calibration(costs))
    simulation = Simulation(world, policy, 64, seed=1, in_turn=True)
    simulation.run(lead)
    assert any(shape.max_nodes for shape in simulation.last_shapes)
    world.acceptance = [[0.15, 0.05]]
    for num_rounds in range(1, 200):
        simulation.run(1)
        if not any(shape.max_nodes for shape in simulation.last_shapes):
            return num_rounds
    raise AssertionError("guessed on for ever")


def test_a_crowd_gives_up_guesses_that_go_bad_soon() -> None:
    """Though few of its rounds are told: chances are made anew after 32 rounds of each."""
    assert max(rounds_until_it_gives_up(lead) for lead in range(40, 72, 8)) <= 40
