"""Arrival rates against speculation: how many requests a second get what they were promised.

For each rate the same requests come at the same random times to each arm in turn, whatever became
of those before. Below its limit a server's goodput is the rate; above it, requests wait for each
other and goodput falls. The order of the arms turns from rate to rate. This module starts nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from specinfer.errors import InvalidRequest
from specinfer_bench.load.arrivals import Arrival, poisson
from specinfer_bench.load.asking import OFF
from specinfer_bench.load.observation import DONE, Observation
from specinfer_bench.load.open_loop import Ask, OpenLoopOptions, run_open_loop
from specinfer_bench.load.summary import Objective, summary
from specinfer_bench.load.sweep import ARMS

MIN_REQUESTS = 4


@dataclass(frozen=True)
class RatesOptions:
    """What is swept.

    Attributes:
        rates: requests a second, a cell each.
        seconds: how long requests come; no cell has fewer than MIN_REQUESTS.
        max_tokens: tokens of each answer.
        sending: how requests are sent.
        seed: decides arrivals and noise.

    Raises:
        InvalidRequest: naming the option that is out of its range.
    """

    rates: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    seconds: float = 10.0
    max_tokens: int = 32
    sending: OpenLoopOptions = field(default_factory=lambda: OpenLoopOptions(max_wait_seconds=5.0))
    seed: int = 1

    def __post_init__(self) -> None:
        if not self.rates or not all(0 < rate < math.inf for rate in self.rates):
            raise InvalidRequest("rates are more than 0 requests a second", field="rates")
        if not 0 < self.seconds < math.inf or self.max_tokens < 1:
            raise InvalidRequest("seconds are more than 0, tokens at least 1", field="seconds")


@dataclass(frozen=True)
class ArmAtRate:
    """One arm at one rate.

    Attributes:
        goodput: requests a second that met the objective.
        share: of all that came.
        tokens_per_second: of all requests, until the last one ended.
        first_token_ms_p50, first_token_ms_p99: from the scheduled arrival.
        lost: requests that failed or were dropped.
    """

    goodput: float
    share: float
    tokens_per_second: float
    first_token_ms_p50: float
    first_token_ms_p99: float
    lost: int


@dataclass(frozen=True)
class RateCell:
    """All arms at one rate.

    Attributes:
        rate: requests a second.
        requests: how many.
        arms: by name.
        identical: whether what ended in two arms had the same tokens in both.
    """

    rate: float
    requests: int
    arms: Mapping[str, ArmAtRate]
    identical: bool


async def run_rates(
    asks: Mapping[str, Ask],
    prompts: Sequence[str],
    options: RatesOptions,
    objective: Objective,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[RateCell, ...]:
    """Every arm at every rate, lowest rate first; `asks` has a way to ask for each arm."""
    # A connection and an arm's first step are nobody's waiting time.
    warm = poisson(prompts, rate=1e3, num_requests=1, max_tokens=2, seed=options.seed)
    for arm in ARMS:
        await run_open_loop(warm, asks[arm], options.sending)
    cells = []
    for at, rate in enumerate(sorted(options.rates)):
        number = max(MIN_REQUESTS, round(rate * options.seconds))
        arrivals = _arrivals(prompts, rate, number, options, options.seed + at)
        seen: dict[str, list[Observation]] = {}
        for turn in range(len(ARMS)):
            arm = ARMS[(turn + at) % len(ARMS)]
            progress(f"{rate:g} requests/s, {arm}")
            seen[arm] = await run_open_loop(arrivals, asks[arm], options.sending)
        cells.append(_cell(rate, seen, objective))
    return tuple(cells)


def _arrivals(
    prompts: Sequence[str], rate: float, number: int, options: RatesOptions, seed: int
) -> tuple[Arrival, ...]:
    """Random times, drawn out or together so that few of them come at the rate too."""
    drawn = poisson(
        prompts, rate=rate, num_requests=number, max_tokens=options.max_tokens, seed=seed
    )
    stretch = number / rate / drawn[-1].offset
    return tuple(replace(each, offset=stretch * each.offset) for each in drawn)


def _cell(rate: float, seen: Mapping[str, Sequence[Observation]], objective: Objective) -> RateCell:
    arms = {arm: _arm(rate, seen[arm], objective) for arm in ARMS}
    identical = all(
        one.token_ids == plain.token_ids
        for arm in ARMS
        for one, plain in zip(seen[arm], seen[OFF], strict=True)
        if one.outcome == plain.outcome == DONE
    )
    return RateCell(rate, len(seen[OFF]), arms, identical)


def _arm(rate: float, seen: Sequence[Observation], objective: Objective) -> ArmAtRate:
    found = summary(seen, objective)
    return ArmAtRate(
        # Of the time in which they came: a run's last answer is long after its last arrival.
        goodput=rate * found.goodput.share,
        share=found.goodput.share,
        tokens_per_second=found.tokens_per_second,
        first_token_ms_p50=found.first_token_ms.p50,
        first_token_ms_p99=found.first_token_ms.p99,
        lost=found.failed + found.dropped,
    )
