"""A bounded buffer between a session and its reader.

The session runs ahead of a slow reader by a few events and then waits; a reader that takes nothing
for too long loses its session, whose place goes to others. This module knows nothing of what the
events are.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TypeVar

from specinfer.errors import ReaderStalled

_Event = TypeVar("_Event")


async def buffered(
    source: AsyncGenerator[_Event, None], *, max_events: int, stall_seconds: float
) -> AsyncGenerator[_Event, None]:
    """The events of `source`, which runs in a task of its own, owned by this generator.

    Closing this generator closes `source` at once, whatever it is waiting for.

    Raises:
        ReaderStalled: after the events that fitted, when nobody took one for `stall_seconds`.
    """
    queue: asyncio.Queue[_Event | None] = asyncio.Queue(max_events)
    pump = asyncio.create_task(_pump(source, queue, stall_seconds))
    try:
        while (event := await queue.get()) is not None:
            yield event
        await pump
    finally:
        pump.cancel()
        await asyncio.wait((pump,))


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
