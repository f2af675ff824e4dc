"""The end of a router's life: what runs is handed over, or finishes, or is told to go on elsewhere.

This module knows nothing of signals, of how sessions run, or of who goes on with them.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass

from specinfer.server import RpcServer
from specinfer.tasks import end_task
from specinfer_router.gateway.responses_run import BackgroundRuns
from specinfer_router.router import Router

# For the last answers to reach their readers.
LAST_SECONDS = 1.0


@dataclass(frozen=True)
class DrainLimits:
    """How long a router takes to end.

    Attributes:
        drain_seconds: what runs has so long to finish.
        handover_seconds: after so long, what others can go on with is handed to them; None hands
            nothing over, because nothing outlives this router.
    """

    drain_seconds: float
    handover_seconds: float | None = None


async def drain(
    router: Router, server: RpcServer, runs: BackgroundRuns, limits: DrainLimits
) -> None:
    """Let nothing new in, and return when nothing runs any more."""
    end = asyncio.get_running_loop().time() + limits.drain_seconds
    await router.drain()
    closing: asyncio.Task[None] | None = None
    try:
        if limits.handover_seconds is not None:
            await _idle(router, limits.handover_seconds)
            router.hand_over()
            # A connection that stays open would bring its caller back to this router.
            closing = asyncio.create_task(server.drain(_left(end) + LAST_SECONDS))
        await _idle(router, _left(end))
        router.cut()
        await _idle(router, LAST_SECONDS)
        await runs.close()
    finally:
        await end_task(closing)


async def _idle(router: Router, seconds: float) -> None:
    """Return when nothing runs, or after so long."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await router.idle()


def _left(end: float) -> float:
    return max(0.0, end - asyncio.get_running_loop().time())
