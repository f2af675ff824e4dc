"""What tracing costs: the same request without it, summed up and in detail, in turns.

This module knows nothing of what is in a trace.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from statistics import quantiles

from specinfer import AsyncClient
from specinfer_bench.machine import machine_facts
from specinfer_bench.traces.cluster import traced_cluster
from specinfer_cli.cluster import ClusterSettings

PROMPT = "Count from one to a hundred."
TOKENS = 96


@dataclass(frozen=True)
class Way:
    """One way to ask.

    Attributes:
        name: for people.
        traced: whether the cluster has a collector.
        detail: whether the request asks for the detail of its rounds, which costs by itself.
    """

    name: str
    traced: bool
    detail: bool


WAYS = (
    Way("no collector", traced=False, detail=False),
    Way("traced, rounds summed up", traced=True, detail=False),
    Way("no collector, detail asked for", traced=False, detail=True),
    Way("traced in detail", traced=True, detail=True),
)


async def measured_cost(settings: ClusterSettings, runs: int) -> str:
    """A table of milliseconds a round for each way, over so many turns of one request each."""
    seconds: dict[str, list[float]] = {way.name: [] for way in WAYS}
    async with AsyncExitStack() as stack:
        clients: dict[bool, AsyncClient] = {}
        for traced in (False, True):
            started = await stack.enter_async_context(traced_cluster(settings, traced=traced))
            client = AsyncClient(started.cluster.router)
            clients[traced] = await stack.enter_async_context(client)
        for turn in range(runs + 1):
            for way in WAYS:
                took = await _round_seconds(clients[way.traced], way.detail)
                # The first turn pays for what is built once.
                if turn:
                    seconds[way.name].append(took)
    return _table(seconds)


async def _round_seconds(client: AsyncClient, detail: bool) -> float:
    start = time.perf_counter()
    done = await client.generate(PROMPT, max_tokens=TOKENS, seed=3, detail=detail)
    return (time.perf_counter() - start) / done.speculation.num_rounds


def _table(seconds: dict[str, list[float]]) -> str:
    facts = machine_facts()
    lines = [
        f"{facts['processor']}, {facts['cores']} cores; {len(next(iter(seconds.values())))} "
        f"requests of {TOKENS} tokens each way, in turns; the whole cluster and the collector on "
        "this one machine.",
        "",
        "| way | ms a round, median | quarter below | quarter above |",
        "|---|---|---|---|",
    ]
    for name, values in seconds.items():
        low, middle, high = _quartiles(values)
        lines.append(f"| {name} | {middle:.2f} | {low:.2f} | {high:.2f} |")
    return "\n".join(lines)


def _quartiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    low, middle, high = quantiles([1e3 * value for value in seconds], n=4)
    return low, middle, high
