"""What lies between each session and its reader: a bounded buffer, or the reader's own room.

A session runs ahead of a slow reader by a few events and then waits; a reader that takes nothing
for too long loses its session, whose place goes to others. This module knows nothing of what the
events are.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any, Generic, Protocol, TypeVar

from specinfer.errors import ReaderStalled, SpecinferError

_Event = TypeVar("_Event")
_Seen = TypeVar("_Seen", contravariant=True)


class Reader(Protocol[_Seen]):
    """Where the events of a source are put, by one task."""

    @property
    def full(self) -> bool:
        """Whether the next event has to wait."""
        ...

    def put(self, event: _Seen) -> None:
        """Add one; it is for the caller to see that it is not full."""
        ...

    async def room(self) -> None:
        """Wait until it is not full."""
        ...


class Watcher(Protocol[_Seen]):
    """Who looks on in a source's task."""

    def begin(self) -> None:
        """The task has begun."""
        ...

    def saw(self, event: _Seen) -> None:
        """An event was made."""
        ...


class OpenStreams:
    """The streams of a router that are being read.

    Args:
        max_events: how far a source may run ahead of its reader.
        stall_seconds: a reader that takes nothing for so long is cut off.
    """

    def __init__(self, *, max_events: int, stall_seconds: float) -> None:
        self._max_events = max_events
        self._stall_seconds = stall_seconds
        self._pumps: set[asyncio.Task[Any]] = set()
        self._cut_by: SpecinferError | None = None

    async def read(
        self, source: AsyncGenerator[_Event, None], watcher: Watcher[_Event] | None = None
    ) -> AsyncGenerator[_Event, None]:
        """The events of `source`, which runs in a task of its own, owned by this generator.

        `watcher` is told of that task's beginning and of each event, both in that task. Closing
        this generator closes `source` at once, whatever it is waiting for.

        Raises:
            ReaderStalled: after the events that fitted, when nobody took one for too long.
            SpecinferError: what `cut` was told.
        """
        buffer: Buffer[_Event] = Buffer(self._max_events)
        async with self._pumping(source, buffer, watcher) as pump:
            pump.add_done_callback(lambda _: buffer.end())
            while (event := await buffer.take()) is not None:
                yield event

    async def feed(
        self,
        source: AsyncGenerator[_Event, None],
        reader: Reader[_Event],
        watcher: Watcher[_Event] | None = None,
    ) -> _Event | None:
        """Hand the events of `source` to a reader that has room of its own; returns the last one.

        As `read` otherwise, which costs each event the turn of another task. Being cancelled stands
        for closing the generator.
        """
        async with self._pumping(source, reader, watcher) as pump:
            await asyncio.wait((pump,))
        return pump.result()

    @asynccontextmanager
    async def _pumping(
        self,
        source: AsyncGenerator[_Event, None],
        reader: Reader[_Event],
        watcher: Watcher[_Event] | None,
    ) -> AsyncIterator[asyncio.Task[_Event | None]]:
        """The task that a source runs in, which has ended after the block; raises what ended it."""
        pumping = _pump(source, reader, self._stall_seconds, watcher)
        pump = asyncio.create_task(pumping)
        self._pumps.add(pump)
        try:
            yield pump
            if pump.cancelled() and self._cut_by is not None:
                raise type(self._cut_by)(self._cut_by.message, retry_after=self._cut_by.retry_after)
            pump.result()
        finally:
            self._pumps.discard(pump)
            if not pump.done():
                pump.cancel()
                await asyncio.wait((pump,))

    def cut(self, error: SpecinferError) -> None:
        """End every stream with this error, after the events that wait for their reader."""
        self._cut_by = error
        for pump in self._pumps:
            pump.cancel()


class Buffer(Generic[_Event]):
    """Events on their way from one task that makes them to one that takes them.

    What an `asyncio.Queue` does, without what many readers and joining would need: every event of
    every session passes here.

    Args:
        max_events: most that wait.
    """

    def __init__(self, max_events: int) -> None:
        self._max_events = max_events
        self._events: deque[_Event] = deque()
        self._ended = False
        # What either side waits for: something to take, or room.
        self._waiter: asyncio.Future[None] | None = None

    @property
    def full(self) -> bool:
        """Whether the next event has to wait."""
        return len(self._events) >= self._max_events

    def put(self, event: _Event) -> None:
        """Add one; it is for the caller to see that there is room."""
        self._events.append(event)
        self._wake()

    def end(self) -> None:
        """No more come."""
        self._ended = True
        self._wake()

    async def take(self) -> _Event | None:
        """The next event, once there is one; None after the last."""
        while not self._events:
            if self._ended:
                return None
            await self._wait()
        event = self._events.popleft()
        self._wake()
        return event

    async def room(self) -> None:
        """Wait until it is not full."""
        while self.full:
            await self._wait()

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def _wake(self) -> None:
        # Empty and full at once it never is, so that only one side ever waits.
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


async def _pump(
    source: AsyncGenerator[_Event, None],
    reader: Reader[_Event],
    stall_seconds: float,
    watcher: Watcher[_Event] | None,
) -> _Event | None:
    last = None
    if watcher is not None:
        watcher.begin()
    async with aclosing(source) as events:
        async for event in events:
            if watcher is not None:
                watcher.saw(event)
            if reader.full:
                await _wait_for(reader, stall_seconds)
            reader.put(event)
            last = event
    return last


async def _wait_for(reader: Reader[_Event], stall_seconds: float) -> None:
    try:
        async with asyncio.timeout(stall_seconds):
            await reader.room()
    except TimeoutError as error:
        raise ReaderStalled(
            f"nothing of the stream was read for {stall_seconds:g} s, so it was cut off; resume it "
            "after the tokens that arrived",
            retry_after=0.0,
        ) from error
