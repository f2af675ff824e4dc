"""Waits for the moment at which an engine has closed the sessions of a stream that ended."""

from __future__ import annotations

import asyncio

from specinfer_draft.engine import DraftEngine
from specinfer_verify.engine import VerifyEngine

TIMEOUT = 20.0


class StreamEnds:
    """Counts the streams that end from now on; made inside the event loop.

    Args:
        engine: whose servicer tells it of each end.
    """

    def __init__(self, engine: DraftEngine | VerifyEngine) -> None:
        self._engine = engine
        self._close_stream = engine.close_stream
        self._ends = asyncio.Semaphore(0)
        engine.close_stream = self._count  # type: ignore[method-assign]

    async def one(self) -> None:
        """Wait until one more stream has ended and the engine's thread has cleaned up after it."""
        async with asyncio.timeout(TIMEOUT):
            await self._ends.acquire()
            # The engine takes things in turn, so whoever is answered now comes after the cleaning.
            await asyncio.wrap_future(self._engine.close("nobody"))

    def _count(self, stream: object) -> None:
        self._close_stream(stream)
        self._ends.release()
