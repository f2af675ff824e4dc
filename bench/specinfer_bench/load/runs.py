"""One run of a load against one cluster, from the first connection to the report.

A report's "trusted" says whether its numbers may be believed: outputs equal in every arm of a
sweep, and the router's counts and first tokens the same as those that clients were told.
"times_agree" says it of the clients' own clocks too: on a machine without a free core a client sees
an event later than the router sent it, and both are right. This module starts nothing.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from specinfer import AsyncClient
from specinfer_bench.load.agreement import COUNTS, EXACT, agreement, scraped, scraped_after
from specinfer_bench.load.arrivals import Arrival, from_trace, poisson, read_trace
from specinfer_bench.load.asking import (
    NO_RETRY,
    SPECULATION,
    asking,
    characters_a_token,
    empty_call_seconds,
)
from specinfer_bench.load.cluster import Cluster
from specinfer_bench.load.observation import Observation
from specinfer_bench.load.open_loop import Ask, OpenLoopOptions, run_open_loop
from specinfer_bench.load.rates import RatesOptions, run_rates
from specinfer_bench.load.summary import Objective, summary
from specinfer_bench.load.sweep import ARMS, SweepOptions, run_sweep


@dataclass(frozen=True)
class OpenRun:
    """What an open-loop run is asked to do.

    Attributes:
        objective: what a request is promised.
        speculation: an arm of `asking.SPECULATION`.
        rate, requests, max_tokens: of a Poisson process; not looked at with a trace.
        trace: file of arrivals and lengths, or None.
        trace_speed: how many times as fast as it was recorded.
        sessions: most requests in flight.
        max_wait: longest wait in the client, in seconds.
        temperature: 0 is greedy.
        seed: decides arrivals and noise.
    """

    objective: Objective
    speculation: str
    rate: float = 1.0
    requests: int = 60
    max_tokens: int = 64
    trace: Path | None = None
    trace_speed: float = 1.0
    sessions: int = 64
    max_wait: float = 30.0
    temperature: float = 0.0
    seed: int = 1


async def open_report(cluster: Cluster, prompts: Sequence[str], run: OpenRun) -> dict[str, object]:
    """Send the requests when they are due; the summary, the agreement and every request.

    Raises:
        InvalidRequest: when an option is out of its range.
        Unavailable: when the router's metrics do not answer.
    """
    options = OpenLoopOptions(run.sessions, run.max_wait)
    async with AsyncClient(cluster["router"], retry=NO_RETRY) as client:
        chat = (await client.capabilities()).chat
        arrivals = await _arrivals(client, prompts, run)
        ask = asking(
            client,
            chat=chat,
            temperature=run.temperature,
            speculation=SPECULATION[run.speculation],
        )
        # A connection and the first step's lazy set-up are nobody's waiting time.
        earlier = await scraped(cluster["gateway"])
        warm_up = await run_open_loop([Arrival(0.0, prompts[0], 2, run.seed)], ask, options)
        before = await scraped_after(cluster["gateway"], earlier, warm_up)
        seen = await run_open_loop(arrivals, ask, options)
        after = await scraped_after(cluster["gateway"], before, seen)
        empty_call = await empty_call_seconds(client)
    found = agreement(before, after, seen)
    return {
        "objective": asdict(run.objective),
        "speculation": run.speculation,
        "offered_per_second": len(arrivals) / max(arrivals[-1].offset, 1e-9),
        "max_sessions": run.sessions,
        "summary": asdict(summary(seen, run.objective)),
        "empty_call_ms": 1e3 * empty_call,
        "prometheus": {name: asdict(each) for name, each in found.items()},
        "trusted": all(found[name].same for name in EXACT) and found["requests"].client > 0,
        "times_agree": all(each.agrees for name, each in found.items() if name not in COUNTS),
        "requests": [_row(one) for one in seen],
    }


async def _arrivals(
    client: AsyncClient, prompts: Sequence[str], run: OpenRun
) -> tuple[Arrival, ...]:
    if run.trace is None:
        return poisson(
            prompts,
            rate=run.rate,
            num_requests=run.requests,
            max_tokens=run.max_tokens,
            seed=run.seed,
        )
    return from_trace(
        read_trace(run.trace),
        prompts,
        characters_a_token=await characters_a_token(client, "\n".join(prompts[:16])),
        speed=run.trace_speed,
        seed=run.seed,
    )


def _row(seen: Observation) -> dict[str, object]:
    """One request for the file, times in seconds after the start of the run; told ones as told."""
    first = seen.events[0][0] if seen.events else None
    return {
        "scheduled": round(seen.scheduled, 4),
        "sent": None if seen.sent is None else round(seen.sent, 4),
        "first_token": None if first is None else round(first, 4),
        "ended": round(seen.ended, 4),
        "told_first_token_seconds": round(seen.told_first_token_seconds, 4),
        "told_seconds": round(seen.told_seconds, 4),
        "prompt_tokens": seen.num_prompt_tokens,
        "tokens": seen.num_tokens,
        "outcome": seen.outcome,
    }


async def rates_report(
    cluster: Cluster,
    prompts: Sequence[str],
    options: RatesOptions,
    objective: Objective,
    temperature: float,
) -> dict[str, object]:
    """Sweep the arrival rate; raises what `run_rates` does."""
    async with AsyncClient(cluster["router"], retry=NO_RETRY) as client:
        asks = await _asks(client, temperature)
        cells = await run_rates(asks, prompts, options, objective, progress=_say)
    return {
        "options": {**asdict(options), "temperature": temperature},
        "objective": asdict(objective),
        "cells": [asdict(cell) for cell in cells],
        "trusted": all(cell.identical for cell in cells),
    }


async def _asks(client: AsyncClient, temperature: float) -> dict[str, Ask]:
    """A way to ask for each arm."""
    chat = (await client.capabilities()).chat
    return {
        arm: asking(client, chat=chat, temperature=temperature, speculation=SPECULATION[arm])
        for arm in ARMS
    }


async def sweep_report(
    cluster: Cluster, prompts: Sequence[str], options: SweepOptions, temperature: float
) -> dict[str, object]:
    """Sweep the load; raises what `run_sweep` does."""
    async with AsyncClient(cluster["router"], retry=NO_RETRY) as client:
        asks = await _asks(client, temperature)
        report = await run_sweep(asks, prompts, options, progress=_say)
    return {
        "options": {
            # JSON has no infinity.
            **{name: value for name, value in asdict(options).items() if value != math.inf},
            "temperature": temperature,
        },
        "static_widths": SPECULATION[ARMS[1]].widths,
        **asdict(report),
        "trusted": report.identical,
    }


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
