"""A bounded buffer between each session and its reader.

A session runs ahead of a slow reader by a few events and then waits; a reader that takes nothing
for too long loses its session, whose place goes to others. This module knows nothing of what the
events are.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TypeVar

from specinfer.errors import ReaderStalled, SpecinferError

_Event = TypeVar("_Event")


class OpenStreams:
    """The streams of a router that are being read.

    Args:
        max_events: how far a source may run ahead of its reader.
        stall_seconds: a reader that takes nothing for so long is cut off.
    """

    def __init__(self, *, max_events: int, stall_seconds: float) -> None:
        self._max_events = max_events
        self._stall_seconds = stall_seconds
        self._pumps: set[asyncio.Task[None]] = set()
        self._cut_by: SpecinferError | None = None

    async def read(self, source: AsyncGenerator[_Event, None]) -> AsyncGenerator[_Event, None]:
        """The events of `source`, which runs in a task of its own, owned by this generator.

        Closing this generator closes `source` at once, whatever it is waiting for.

        Raises:
            ReaderStalled: after the events that fitted, when nobody took one for too long.
            SpecinferError: what `cut` was told.
        """
        queue: asyncio.Queue[_Event | None] = asyncio.Queue(self._max_events)
        pump = asyncio.create_task(_pump(source, queue, self._stall_seconds))
        self._pumps.add(pump)
        pump.add_done_callback(lambda _: _tell_end(queue))
        try:
            while (event := await queue.get()) is not None:
                yield event
            await asyncio.wait((pump,))
            if pump.cancelled() and self._cut_by is not None:
                raise type(self._cut_by)(self._cut_by.message, retry_after=self._cut_by.retry_after)
            pump.result()
        finally:
            self._pumps.discard(pump)
            pump.cancel()
            await asyncio.wait((pump,))

    def cut(self, error: SpecinferError) -> None:
        """End every stream with this error, after the events that wait for their reader."""
        self._cut_by = error
        for pump in self._pumps:
            pump.cancel()


def _tell_end(queue: asyncio.Queue[_Event | None]) -> None:
    # A pump that was cut before it ran has told nobody that it ended.
    if not queue.full():
        queue.put_nowait(None)


async def _pump(
    source: AsyncGenerator[_Event, None], queue: asyncio.Queue[_Event | None], stall_seconds: float
) -> None:
    try:
        async with aclosing(source) as events:
            async for event in events:
                await _put(queue, event, stall_seconds)
    finally:
        # The source is closed by now; however long the reader takes, it holds nothing up.
        await queue.put(None)


async def _put(queue: asyncio.Queue[_Event | None], event: _Event, stall_seconds: float) -> None:
    if not queue.full():
        queue.put_nowait(event)
        return
    try:
        async with asyncio.timeout(stall_seconds):
            await queue.put(event)
    except TimeoutError as error:
        raise ReaderStalled(
            f"nothing of the stream was read for {stall_seconds:g} s, so it was cut off; resume it "
            "after the tokens that arrived",
            retry_after=0.0,
        ) from error
