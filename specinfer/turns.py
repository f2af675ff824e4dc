"""Keeps the items of each session in order while one of them takes its time.

A stream carries items of many sessions. An item that needs work off the loop before it can be
handed on holds up what follows it in its own session, and nobody else. This module knows nothing
of gRPC, of what items are or of how they are answered.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")


class Turns(Generic[Item]):
    """The items of one stream on their way.

    Args:
        handle: takes an item. It returns None when it is done with it, or a coroutine to wait for
            before the session's next item; neither raises. Whoever uses this bounds the items.
    """

    def __init__(self, handle: Callable[[Item], Coroutine[Any, Any, None] | None]) -> None:
        self._handle = handle
        self._waiting: dict[str, deque[Item]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def put(self, session_id: str, item: Item) -> None:
        """Handle an item, at once if nothing of its session is on the way."""
        if session_id in self._waiting:
            self._waiting[session_id].append(item)
            return
        work = self._handle(item)
        if work is not None:
            self._waiting[session_id] = deque()
            task = asyncio.create_task(self._work(session_id, work))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def finish(self) -> None:
        """Wait until everything has been handled."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def cancel(self) -> None:
        """Handle nothing more."""
        for task in self._tasks:
            task.cancel()

    async def _work(self, session_id: str, work: Coroutine[Any, Any, None]) -> None:
        await work
        waiting = self._waiting[session_id]
        while waiting:
            more = self._handle(waiting.popleft())
            if more is not None:
                await more
        del self._waiting[session_id]


async def read_frames(
    frames: AsyncIterator[Any], expect_one: Callable[[], Awaitable[None]], turns: Turns[Any]
) -> None:
    """Take every item of every frame, each once there is room for its answer, and see them handled.

    Args:
        frames: messages with `items`, each of which has a `session_id`.
        expect_one: waits for that room.
        turns: handles the items.
    """
    async for frame in frames:
        for item in frame.items:
            await expect_one()
            turns.put(item.session_id, item)
    await turns.finish()
