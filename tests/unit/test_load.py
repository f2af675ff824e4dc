"""The load generator: arrivals, the open loop under a stuck server, and the arithmetic."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from specinfer.errors import InvalidRequest, Unavailable
from specinfer_bench.load.agreement import agreement, read_numbers
from specinfer_bench.load.arrivals import Arrival, from_trace, poisson, read_trace
from specinfer_bench.load.closed_loop import run_closed_loop
from specinfer_bench.load.observation import DONE, DROPPED, FAILED, Observation
from specinfer_bench.load.open_loop import Ask, Clock, OpenLoopOptions, run_open_loop
from specinfer_bench.load.summary import Objective, nearest_rank, percentiles, summary
from tests.kit.virtual_time import run_in_virtual_time

PROMPTS = ("a", "b", "c")
WAY = 0.005
OBJECTIVE = Objective(first_token_seconds=0.5, token_seconds=0.15)
Run = Callable[[Sequence[Arrival], Ask], list[Observation]]


def test_poisson_gaps_have_the_mean_and_the_spread_of_an_exponential() -> None:
    arrivals = poisson(PROMPTS, rate=4.0, num_requests=20_000, max_tokens=8, seed=3)
    offsets = [0.0, *(arrival.offset for arrival in arrivals)]
    gaps = [later - earlier for earlier, later in pairwise(offsets)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert mean == pytest.approx(0.25, rel=0.02)
    assert variance**0.5 == pytest.approx(mean, rel=0.03)
    assert {arrival.prompt for arrival in arrivals} == set(PROMPTS)


def test_a_seed_decides_the_arrivals() -> None:
    first, again, other = (
        poisson(PROMPTS, rate=1.0, num_requests=50, max_tokens=8, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_is_a_positive_number(rate: float) -> None:
    with pytest.raises(InvalidRequest, match="rate"):
        poisson(PROMPTS, rate=rate, num_requests=1, max_tokens=1, seed=1)


def test_a_trace_gives_times_and_lengths(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"offset": 0, "prompt_tokens": 4, "output_tokens": 7}\n'
        '{"offset": 3.0, "prompt_tokens": 2, "output_tokens": 9}\n'
    )
    entries = read_trace(path)
    arrivals = from_trace(entries, ["word"], characters_a_token=3.0, speed=2.0, seed=5)
    assert [arrival.offset for arrival in arrivals] == [0.0, 1.5]
    assert [arrival.max_tokens for arrival in arrivals] == [7, 9]
    assert [arrival.prompt for arrival in arrivals] == ["word word wo", "word w"]


@pytest.mark.parametrize(
    "line",
    [
        "no JSON",
        "[]",
        '{"offset": 0, "prompt_tokens": 4}',
        '{"offset": -1, "prompt_tokens": 4, "output_tokens": 7}',
        '{"offset": NaN, "prompt_tokens": 4, "output_tokens": 7}',
        '{"offset": true, "prompt_tokens": 4, "output_tokens": 7}',
        '{"offset": 0, "prompt_tokens": 0, "output_tokens": 7}',
        '{"offset": 0, "prompt_tokens": 4, "output_tokens": 1.5}',
    ],
)
def test_a_bad_line_of_a_trace_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"offset": 0, "prompt_tokens": 4, "output_tokens": 7}\n' + line + "\n")
    with pytest.raises(InvalidRequest, match=r"trace\.jsonl:2"):
        read_trace(path)


def test_a_trace_is_in_order(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    later = '{"offset": 2, "prompt_tokens": 4, "output_tokens": 7}\n'
    path.write_text(later + later.replace("2", "1"))
    with pytest.raises(InvalidRequest, match="order of time"):
        read_trace(path)


async def stuck_from_1_to_3(arrival: Arrival, seen: Observation, clock: Clock) -> None:
    """A server that answers in 10 ms, but nobody between seconds 1 and 3."""
    if 1.0 <= clock() < 3.0:
        await asyncio.sleep(3.0 - clock())
    await asyncio.sleep(0.01)
    seen.events.append((clock(), arrival.max_tokens))


def every_tenth_second(seconds: float) -> list[Arrival]:
    return [Arrival(index / 10, "a", 4, 1) for index in range(int(seconds * 10))]


def open_loop(max_sessions: int, max_wait: float = 30.0) -> Run:
    def run(arrivals: Sequence[Arrival], ask: Ask) -> list[Observation]:
        options = OpenLoopOptions(max_sessions, max_wait)
        return run_in_virtual_time(run_open_loop(arrivals, ask, options))

    return run


def closed_loop(arrivals: Sequence[Arrival], ask: Ask) -> list[Observation]:
    """Sends the next one when the last one has ended."""
    return run_in_virtual_time(run_closed_loop(arrivals, ask, num_sessions=1))


def counting_from_the_sending(arrivals: Sequence[Arrival], ask: Ask) -> list[Observation]:
    """Forgets how long a request stood in line in the client."""
    seen = open_loop(max_sessions=1)(arrivals, ask)
    return [dataclasses.replace(one, scheduled=one.sent or 0.0) for one in seen]


def check_no_omission(run: Run) -> None:
    """Every user who came in those two seconds waited for their end, and the numbers say so."""
    seen = run(every_tenth_second(5.0), stuck_from_1_to_3)
    waits = [one.first_token_seconds or 0.0 for one in seen]
    assert waits[10:30] == pytest.approx(
        [3.0 - index / 10 + 0.01 for index in range(10, 30)], abs=0.25
    )
    found = summary(seen, OBJECTIVE)
    assert found.first_token_ms.p90 > 1000
    # Those who came in the last half second before the end were served in time.
    assert found.goodput.met <= 50 - 14


@pytest.mark.parametrize("max_sessions", [1, 64])
def test_waits_count_from_the_scheduled_arrival(max_sessions: int) -> None:
    check_no_omission(open_loop(max_sessions))


@pytest.mark.parametrize("planted", [closed_loop, counting_from_the_sending])
def test_coordinated_omission_would_be_caught(planted: Run) -> None:
    with pytest.raises(AssertionError):
        check_no_omission(planted)


def test_requests_are_sent_on_time_whatever_became_of_others() -> None:
    seen = open_loop(max_sessions=64)(every_tenth_second(5.0), stuck_from_1_to_3)
    assert [one.sent for one in seen] == pytest.approx([index / 10 for index in range(50)])


def test_the_bound_holds_and_what_is_over_it_counts_as_late() -> None:
    running, most = 0, 0

    async def ask(arrival: Arrival, seen: Observation, clock: Clock) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await stuck_from_1_to_3(arrival, seen, clock)
        running -= 1

    seen = open_loop(max_sessions=5)(every_tenth_second(5.0), ask)
    assert most == 5
    found = summary(seen, OBJECTIVE)
    assert (found.done, found.dropped) == (50, 0)
    assert found.late == 15


def test_what_waits_too_long_is_dropped_and_counted() -> None:
    seen = open_loop(max_sessions=5, max_wait=1.0)(every_tenth_second(5.0), stuck_from_1_to_3)
    dropped = [one for one in seen if one.outcome == DROPPED]
    # 1.0 to 1.4 hold the places until 3.01; from 2.1 on a second's wait is enough.
    assert [one.scheduled for one in dropped] == pytest.approx([1.5, 1.6, 1.7, 1.8, 1.9, 2.0])
    assert all(one.sent is None for one in dropped)
    found = summary(seen, OBJECTIVE)
    assert found.scheduled == 50
    assert found.goodput.share == found.goodput.met / 50


def test_a_failure_is_an_observation() -> None:
    async def ask(arrival: Arrival, seen: Observation, clock: Clock) -> None:
        raise Unavailable("nobody there")

    seen = open_loop(max_sessions=2)(every_tenth_second(0.3), ask)
    assert [one.outcome for one in seen] == [FAILED] * 3
    found = summary(seen, OBJECTIVE)
    assert found.errors == {"Unavailable: nobody there": 3}
    assert found.goodput.met == 0


def test_percentiles_are_nearest_rank() -> None:
    values = [float(value) for value in range(1, 11)]
    assert [nearest_rank(values, share) for share in (0.5, 0.9, 0.91, 0.99, 1.0)] == [
        *(5.0, 9.0, 10.0, 10.0, 10.0)
    ]
    assert nearest_rank([7.0], 0.5) == 7.0
    found = percentiles([0.003, None, 0.001, 0.002])
    assert (found.count, found.p50, found.p99) == (3, 2.0, 3.0)
    assert found.mean == pytest.approx(2.0)
    assert percentiles([]).count == 0


def observed(first: float, *later: tuple[float, int], outcome: str = DONE) -> Observation:
    events = [(first, 2), *later]
    return Observation(
        *(0.0, 0.0, events),
        ended=events[-1][0],
        outcome=outcome,
        told_first_token_seconds=first - WAY,
        told_seconds=events[-1][0] - WAY,
    )


def test_goodput_wants_both_times_and_an_end() -> None:
    good = observed(0.5, (0.8, 3))
    slow_start = observed(0.6, (0.7, 3))
    slow_tokens = observed(0.1, (0.7, 3))
    failed = observed(0.1, (0.2, 3), outcome=FAILED)
    one_event = observed(0.4)
    seen = [good, slow_start, slow_tokens, failed, one_event, Observation(0.0, outcome=DROPPED)]
    assert [OBJECTIVE.met(one) for one in seen] == [True, False, False, False, True, False]
    found = summary(seen, OBJECTIVE)
    assert found.goodput.met == 2
    assert found.goodput.share == pytest.approx(2 / 6)
    assert found.goodput.per_second == pytest.approx(2 / 0.8)
    assert found.tokens == 22
    assert found.tokens_per_second == pytest.approx(22 / 0.8)
    assert found.token_ms.count == 4
    assert good.token_seconds == pytest.approx(0.1)
    assert good.gaps == pytest.approx([0.3])


PAGE = """# TYPE specinfer_requests counter
specinfer_requests_total{model_name="m",outcome="length"} %d
specinfer_requests_total{model_name="m",outcome="stop"} 1
# TYPE specinfer_generation_tokens counter
specinfer_generation_tokens_total{model_name="m"} %d
# TYPE specinfer_prompt_tokens counter
specinfer_prompt_tokens_total{model_name="m"} 0
# TYPE specinfer_time_to_first_token_seconds histogram
specinfer_time_to_first_token_seconds_bucket{le="+Inf",model_name="m"} %d
specinfer_time_to_first_token_seconds_count{model_name="m"} %d
specinfer_time_to_first_token_seconds_sum{model_name="m"} %f
"""


def test_the_routers_numbers_are_laid_beside_the_clients() -> None:
    before = read_numbers(PAGE % (10, 100, 11, 11, 1.0))
    after = read_numbers(PAGE % (12, 110, 13, 13, 2.0))
    assert before["requests"] == 11
    seen = [observed(0.5, (0.8, 3)), observed(0.51, (0.9, 3))]
    found = agreement(before, after, seen)
    assert found["generation_tokens"].agrees
    assert found["requests"].agrees
    first = found["first_token_seconds"]
    assert (first.difference, first.way_ms) == pytest.approx((0.01, 5.0))
    assert first.told == pytest.approx(1.0)
    assert first.agrees
    assert first.same
    # The page says nothing of whole requests: that is not agreement.
    assert not found["request_seconds"].agrees
    assert not found["request_seconds"].same
    lost_one = agreement(before, after, seen[:1])
    for name in ("requests", "generation_tokens", "first_token_seconds"):
        assert not lost_one[name].same, name


def test_a_way_of_any_length_is_told_apart_from_other_numbers() -> None:
    before = read_numbers(PAGE % (10, 100, 11, 11, 1.0))
    after = read_numbers(PAGE % (12, 110, 13, 13, 2.0))
    seen = [observed(0.5, (0.8, 3)), observed(0.51, (0.9, 3))]
    slow = [dataclasses.replace(one, sent=-0.1) for one in seen]
    first = agreement(before, after, slow)["first_token_seconds"]
    assert first.same
    assert not first.agrees
    assert first.way_ms == pytest.approx(105.0)
    # One whose end never came was told nothing, and nobody makes it up.
    cut = [seen[0], dataclasses.replace(seen[1], outcome=FAILED)]
    found = agreement(before, after, cut)["first_token_seconds"]
    assert found.told is None
    assert not found.same, "what nobody was told is not compared with anything"
    # One that failed before any token has no part in the sum.
    refused = Observation(0.0, sent=0.0, outcome=FAILED)
    found = agreement(before, after, [*seen, refused])["first_token_seconds"]
    assert found.told == pytest.approx(1.0)
    assert found.same
