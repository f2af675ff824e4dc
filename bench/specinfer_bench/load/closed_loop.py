"""Keeps a fixed number of sessions busy until a list of requests is done.

What a server can take at a given number of sessions; what users would see at a given rate is the
open loop's. This module knows nothing of clients or servers: it is told how to ask.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

from specinfer_bench.load.arrivals import Arrival
from specinfer_bench.load.observation import Observation
from specinfer_bench.load.open_loop import Ask, Clock, observe


async def run_closed_loop(
    requests: Sequence[Arrival], ask: Ask, num_sessions: int
) -> list[Observation]:
    """Run all requests, `num_sessions` at once; returns what was seen, in their order.

    A request counts as scheduled when a session is free for it: its `offset` is not looked at.
    """
    loop = asyncio.get_running_loop()
    begun = loop.time()

    def clock() -> float:
        return loop.time() - begun

    observations = [Observation(0.0) for _ in requests]
    left = iter(zip(requests, observations, strict=True))
    async with asyncio.TaskGroup() as sessions:
        for _ in range(num_sessions):
            sessions.create_task(_session(left, ask, clock))
    return observations


async def _session(left: Iterator[tuple[Arrival, Observation]], ask: Ask, clock: Clock) -> None:
    for request, seen in left:
        seen.scheduled = clock()
        await observe(request, seen, ask, clock)
