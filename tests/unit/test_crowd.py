"""How many sessions share a target of late: a moment in which some are away does not count."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specinfer.messages import ShapeQuery, SpeculationOptions
from specinfer_router import crowd
from specinfer_router.crowd import DIP_SECONDS, RecentMost
from specinfer_router.policy import StaticShape
from specinfer_router.round_history import RoundHistory
from tests.kit.router import Bench, request_of, running_router


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
        recent.falls(number)
    assert recent.most(29) == 32
    clock.now = 0.9 * DIP_SECONDS
    assert recent.most(2) == 32
    assert recent.most(40) == 40, "more are more at once"
    clock.now = 1.1 * DIP_SECONDS
    assert recent.most(2) == 2


def test_each_fall_counts_for_as_long_as_any_other(clock: Clock) -> None:
    recent = RecentMost(clock)
    recent.falls(9)
    clock.now = 0.6 * DIP_SECONDS
    recent.falls(5)
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
                recent.falls(number)
            number += change
        within = [most for at, most in seen if at >= clock.now - DIP_SECONDS]
        assert recent.most(number) == max([number, *within])
        assert len(recent._before) <= max((most for _, most in seen), default=0)


class Listening(StaticShape):
    """One shape for all, and what is told of the load: sessions of late, and those there are."""

    def __init__(self) -> None:
        super().__init__(ShapeQuery(max_nodes=4, max_depth=2))
        self.told: list[tuple[int, int]] = []
        self.bench: Bench | None = None

    def plan(
        self, options: SpeculationOptions, history: RoundHistory, num_sessions: int
    ) -> ShapeQuery:
        assert self.bench is not None
        self.told.append((num_sessions, self.bench.cluster.verifiers.links[0].num_seats))
        return super().plan(options, history, num_sessions)


@pytest.mark.parametrize(("seconds", "counted"), [(60.0, True), (0.0, False)])
async def test_a_session_that_goes_on_is_told_of_who_left(
    seconds: float, counted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crowd, "DIP_SECONDS", seconds)
    policy = Listening()
    async with running_router(policy=policy) as bench:
        policy.bench = bench
        requests = (request_of(max_tokens=400), request_of(max_tokens=10))
        await asyncio.gather(*(bench.generate(request) for request in requests))
    assert (2, 2) in policy.told
    assert ((2, 1) in policy.told) is counted
    assert ((1, 1) in policy.told[-10:]) is not counted
