"""Speculation off, on and by cost beside each other: sweeps of load, and goodput by rate."""

from __future__ import annotations

import asyncio

import pytest

from specinfer.errors import InvalidRequest
from specinfer_bench.load.arrivals import Arrival
from specinfer_bench.load.asking import BY_COST, OFF, STATIC
from specinfer_bench.load.observation import Observation
from specinfer_bench.load.open_loop import Ask, Clock
from specinfer_bench.load.rates import RateCell, RatesOptions, run_rates
from specinfer_bench.load.summary import Objective
from specinfer_bench.load.sweep import ARMS, SweepOptions, run_sweep
from tests.kit.virtual_time import run_in_virtual_time

PROMPTS = ("a", "b", "c")
OBJECTIVE = Objective(first_token_seconds=0.5, token_seconds=0.15)


def simulated(costs: dict[str, float], lies: str = "") -> dict[str, Ask]:
    """Ways to ask that take a stated time for a token."""

    def ask_of(arm: str) -> Ask:
        async def ask(arrival: Arrival, seen: Observation, clock: Clock) -> None:
            await asyncio.sleep(costs[arm] * arrival.max_tokens)
            seen.events.append((clock(), arrival.max_tokens))
            seen.token_ids.extend([arrival.seed, 1 if arm == lies else 0])

        return ask

    return {arm: ask_of(arm) for arm in ARMS}


def test_a_sweep_says_how_much_faster_each_arm_is() -> None:
    asks = simulated({OFF: 0.02, "static": 0.01, BY_COST: 0.005})
    options = SweepOptions(sessions=(1, 8), max_tokens=10, repeats=3)
    report = run_in_virtual_time(run_sweep(asks, PROMPTS, options))
    assert report.identical
    assert [cell.requests for cell in report.cells] == [4, 16]
    assert report.lowest_by_cost == pytest.approx(4.0)
    assert report.lowest_by_cost_low_load == pytest.approx(4.0)
    eight = report.cells[1].arms
    assert eight[OFF].tokens_per_second == pytest.approx(8 / 0.02)
    assert eight["static"].ratio == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("max_seconds", "turns"), [(0.0, [1, 1]), (2.7, [1, 2]), (3.5, [2, 2]), (100.0, [3, 3])]
)
def test_a_sweep_begins_no_turn_that_would_end_too_late(
    max_seconds: float, turns: list[int]
) -> None:
    asks = simulated(dict.fromkeys(ARMS, 0.01))
    # The first turn of one session takes three times four requests of a tenth of a second, that of
    # eight sessions three times two, and a little more to warm up; others two thirds of it.
    options = SweepOptions((1, 8), max_tokens=10, repeats=3, max_seconds=max_seconds)
    report = run_in_virtual_time(run_sweep(asks, PROMPTS, options))
    assert [cell.turns for cell in report.cells] == turns
    tellers = [report.cells[0].arms[arm].first_token_ms.count for arm in ARMS]
    assert tellers == [4 * turns[0], 4, 4 * turns[0]]


def test_later_turns_have_the_arms_of_the_goals_alone_and_change_their_order() -> None:
    asked: list[str] = []

    def ask_of(arm: str) -> Ask:
        async def ask(arrival: Arrival, seen: Observation, clock: Clock) -> None:
            asked.append(arm)
            await asyncio.sleep(0.01)
            seen.events.append((clock(), arrival.max_tokens))

        return ask

    options = SweepOptions((1,), max_tokens=10, repeats=3)
    asks = {arm: ask_of(arm) for arm in ARMS}
    run_in_virtual_time(run_sweep(asks, PROMPTS, options))
    # What ends a turn begins the next one.
    runs = [arm for arm, before in zip(asked, ["", *asked], strict=False) if arm != before]
    assert runs == [*ARMS, OFF, BY_COST]
    assert [asked.count(arm) for arm in (OFF, STATIC, BY_COST)] == [12 + 3, 4, 12]


def test_a_speed_counts_every_request_from_the_first_to_the_last() -> None:
    async def ask(arrival: Arrival, seen: Observation, clock: Clock) -> None:
        # The first two are long in coming, and the last one is long in ending.
        await asyncio.sleep(5.0 if arrival.seed <= 2 else 0.0)
        for _ in range(arrival.max_tokens):
            await asyncio.sleep(0.1 if arrival.seed < 6 else 3.0)
            seen.events.append((clock(), 1))

    options = SweepOptions((2,), 3, max_tokens=10, repeats=1)
    report = run_in_virtual_time(run_sweep(dict.fromkeys(ARMS, ask), PROMPTS, options))
    # Two are done after 6 seconds, two more after 7; the sixth begins then and takes 30.
    assert report.cells[0].arms[OFF].tokens_per_second == pytest.approx(60 / 37)


def test_sessions_in_step_are_as_fast_by_few_large_rounds_as_by_many_small_ones() -> None:
    def rounds_of(num_tokens: int) -> Ask:
        async def ask(arrival: Arrival, seen: Observation, clock: Clock) -> None:
            # Nearly in step: the first to end must not take the last round of the others along.
            await asyncio.sleep(1e-4 * arrival.seed)
            for _ in range(arrival.max_tokens // num_tokens):
                await asyncio.sleep(0.1 * num_tokens)
                seen.events.append((clock(), num_tokens))

        return ask

    asks = {OFF: rounds_of(1), "static": rounds_of(8), BY_COST: rounds_of(12)}
    report = run_in_virtual_time(run_sweep(asks, PROMPTS, SweepOptions((4,), 2, max_tokens=24)))
    speeds = [report.cells[0].arms[arm].tokens_per_second for arm in ARMS]
    assert speeds == pytest.approx([40.0, 40.0, 40.0], rel=0.01)


def test_goodput_follows_the_rate_as_far_as_an_arm_can_serve() -> None:
    def one_at_a_time(seconds: float) -> Ask:
        server = asyncio.Lock()

        async def ask(arrival: Arrival, seen: Observation, clock: Clock) -> None:
            async with server:
                await asyncio.sleep(seconds)
            seen.events.append((clock(), arrival.max_tokens))
            seen.token_ids.extend([arrival.seed])

        return ask

    async def run() -> tuple[RateCell, ...]:
        asks = {OFF: one_at_a_time(0.5), "static": one_at_a_time(0.2), BY_COST: one_at_a_time(0.05)}
        options = RatesOptions(rates=(4.0, 0.25), seconds=40.0, max_tokens=8)
        return await run_rates(asks, PROMPTS, options, Objective(1.0, 1.0))

    low, high = run_in_virtual_time(run())
    assert low.identical
    assert low.requests == 10
    assert high.requests == 160
    assert all(arm.share > 0.8 for arm in low.arms.values())
    assert high.arms[OFF].goodput < 0.5 < high.arms["static"].goodput < high.rate
    assert high.arms[BY_COST].goodput == pytest.approx(high.rate)
    assert high.arms[OFF].lost > 0


def test_another_token_at_one_rate_is_not_identical() -> None:
    asks = simulated(dict.fromkeys(ARMS, 0.01), lies=BY_COST)
    options = RatesOptions(rates=(1.0,), seconds=5.0, max_tokens=2)
    (cell,) = run_in_virtual_time(run_rates(asks, PROMPTS, options, OBJECTIVE))
    assert not cell.identical


@pytest.mark.parametrize("rates", [(), (0.0,), (float("nan"),), (float("inf"),)])
def test_rates_are_positive_numbers(rates: tuple[float, ...]) -> None:
    with pytest.raises(InvalidRequest, match="rates"):
        RatesOptions(rates=rates)


def test_another_token_in_one_arm_is_not_identical() -> None:
    asks = simulated(dict.fromkeys(ARMS, 0.01), lies=BY_COST)
    options = SweepOptions(sessions=(2,), max_tokens=2, repeats=1)
    assert not run_in_virtual_time(run_sweep(asks, PROMPTS, options)).identical
