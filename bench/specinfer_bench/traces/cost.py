"""What tracing costs: the calls of a round by themselves, and the same request in each way.

This module knows nothing of what is in a trace.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from statistics import quantiles

from specinfer import AsyncClient
from specinfer.messages import RoundFacts
from specinfer.telemetry import CLIENT, Telemetry, TraceSettings, current_span
from specinfer.telemetry.export import set_up_tracing
from specinfer_bench.machine import machine_facts
from specinfer_bench.traces.cluster import Models, traced_cluster
from specinfer_router.tracing import SessionTrace

ROUNDS = 1000
REPEATS = 20
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


def round_microseconds(*, traced: bool, detail: bool) -> float:
    """Time of the router's own thread that the tracing of one round takes; the least of some.

    Sending is left to another thread, and the collector is not there.
    """
    settings = TraceSettings("http://127.0.0.1:1")
    telemetry = set_up_tracing("bench", settings) if traced else Telemetry()
    took: list[float] = []
    for _ in range(REPEATS):
        with telemetry.span("chat", detailed=detail):
            trace = SessionTrace()
            start = time.thread_time()
            for epoch in range(ROUNDS):
                _trace_round(trace, RoundFacts(epoch))
            took.append((time.thread_time() - start) / ROUNDS)
            trace.end()
    telemetry.shut_down()
    return 1e6 * min(took)


def _trace_round(trace: SessionTrace, facts: RoundFacts) -> None:
    with trace.round() as span:
        with span.child("propose", kind=CLIENT) as asked:
            trace.asked_drafter(asked, "127.0.0.1:1", hedged=False)
        with span.child("verify", kind=CLIENT) as asked:
            trace.asked_verifier(asked, "127.0.0.1:1")
        with span.child("commit"), current_span().child("redis commit", kind=CLIENT):
            pass
        trace.told(span, facts)


async def measured_cost(models: Models, runs: int) -> str:
    """A table of milliseconds a round for each way, over so many turns of one request each."""
    seconds: dict[str, list[float]] = {way.name: [] for way in WAYS}
    async with AsyncExitStack() as stack:
        clients: dict[bool, AsyncClient] = {}
        for traced in (False, True):
            started = await stack.enter_async_context(traced_cluster(models, traced=traced))
            client = AsyncClient(started.router)
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
    number = len(next(iter(seconds.values())))
    lines = [
        f"{facts['processor']}, {facts['cores']} cores, with the whole cluster and the collector.",
        f"Times of a round are over {number} requests of {TOKENS} tokens each way, in turns.",
        "",
        "| way | tracing, microseconds of the router's thread a round "
        "| ms a round, median | quarter below | quarter above |",
        "|---|---|---|---|---|",
    ]
    for way in WAYS:
        low, middle, high = _quartiles(seconds[way.name])
        own = round_microseconds(traced=way.traced, detail=way.detail)
        lines.append(f"| {way.name} | {own:.1f} | {middle:.2f} | {low:.2f} | {high:.2f} |")
    return "\n".join(lines)


def _quartiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    low, middle, high = quantiles([1e3 * value for value in seconds], n=4)
    return low, middle, high
