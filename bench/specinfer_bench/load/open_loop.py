"""Sends requests when they are due, whatever became of the ones before.

At most `max_sessions` are in flight. What comes while all are busy waits in the client and counts
as late; what has waited too long is dropped and counts as such. Neither changes when others are
due, and every wait is counted from the scheduled arrival. This module knows nothing of clients or
servers: it is told how to ask.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from specinfer.errors import InvalidRequest, SpecinferError
from specinfer_bench.load.arrivals import Arrival
from specinfer_bench.load.observation import DONE, DROPPED, FAILED, Observation

MAX_SESSIONS = 1024
Clock = Callable[[], float]
"""Seconds since the start of the run."""
Ask = Callable[[Arrival, Observation, Clock], Awaitable[None]]
"""Runs one request to its end and notes its events; raises SpecinferError when it fails."""


@dataclass(frozen=True)
class OpenLoopOptions:
    """How requests are sent.

    Attributes:
        max_sessions: most requests in flight.
        max_wait_seconds: longest wait in the client for one of those places.

    Raises:
        InvalidRequest: naming the option that is out of its range.
    """

    max_sessions: int = 64
    max_wait_seconds: float = 30.0

    def __post_init__(self) -> None:
        if not 1 <= self.max_sessions <= MAX_SESSIONS:
            raise InvalidRequest(f"sessions are 1 to {MAX_SESSIONS}", field="sessions")
        if self.max_wait_seconds < 0:
            raise InvalidRequest("the longest wait is 0 seconds or more", field="max_wait")


async def run_open_loop(
    arrivals: Sequence[Arrival], ask: Ask, options: OpenLoopOptions
) -> list[Observation]:
    """Send every request at its time; returns what was seen, in order of arrival.

    A request that fails is an observation. What else is raised ends the run.
    """
    loop = asyncio.get_running_loop()
    begun = loop.time()

    def clock() -> float:
        return loop.time() - begun

    places = asyncio.Semaphore(options.max_sessions)
    observations = [Observation(arrival.offset) for arrival in arrivals]
    async with asyncio.TaskGroup() as running:
        for arrival, seen in zip(arrivals, observations, strict=True):
            # A negative wait is what is due already; others still get their turn of the loop.
            await asyncio.sleep(max(0.0, arrival.offset - clock()))
            running.create_task(_run_one(arrival, seen, ask, places, clock, options))
    return observations


async def _run_one(
    arrival: Arrival,
    seen: Observation,
    ask: Ask,
    places: asyncio.Semaphore,
    clock: Clock,
    options: OpenLoopOptions,
) -> None:
    patience = arrival.offset + options.max_wait_seconds - clock()
    try:
        # A free place is taken at once, however late the client itself has become.
        async with asyncio.timeout(None if not places.locked() else max(0.0, patience)):
            await places.acquire()
    except TimeoutError:
        seen.ended, seen.outcome = clock(), DROPPED
        return
    try:
        await observe(arrival, seen, ask, clock)
    finally:
        places.release()


async def observe(arrival: Arrival, seen: Observation, ask: Ask, clock: Clock) -> None:
    """Run one request now, and note how it ended."""
    seen.sent = clock()
    try:
        await ask(arrival, seen, clock)
    except SpecinferError as error:
        seen.outcome, seen.error = FAILED, f"{type(error).__name__}: {error.message}"
    else:
        seen.outcome = DONE
    seen.ended = clock()
