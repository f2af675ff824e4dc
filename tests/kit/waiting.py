"""Waiting in a test until something is so, with a deadline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

POLL_SECONDS = 0.01


async def until(
    holds: Callable[[], bool | Awaitable[bool]], what: str, seconds: float = 20.0
) -> float:
    """Ask again and again until it is so; returns the seconds it took, fails after `seconds`."""
    begun = time.monotonic()
    while True:
        answer = holds()
        if answer if isinstance(answer, bool) else await answer:
            return time.monotonic() - begun
        assert time.monotonic() - begun < seconds, f"{what}: not within {seconds:g} s"
        await asyncio.sleep(POLL_SECONDS)
