"""Results on their way to one stream: put from any thread, taken in batches by the event loop.

Both worker tiers answer through it; whoever sends frames asks it when one is full. It knows nothing
of what the results are, nor of gRPC.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Collection, Iterable, Iterator
from typing import Any, Generic, Protocol, TypeVar

Result = TypeVar("Result")


# A frame of so many is worth its cost, for which others may wait a few turns of the loop.
FULL_FRAME, MAX_TURNS = 16, 4


class Sized(Protocol):
    """What has a size on the wire, as every protobuf message has."""

    def ByteSize(self) -> int:
        """Bytes on the wire."""
        ...


Message = TypeVar("Message", bound=Sized)


class Outbox(Generic[Result]):
    """Holds the results of one stream until the peer takes them.

    Args:
        max_unanswered: most items read and not yet taken as results; reading waits beyond it, so a
            peer that sends and never reads holds up itself and nobody else.
        max_batch: most results handed out at once, which bounds a frame.
    """

    def __init__(self, *, max_unanswered: int, max_batch: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._room = asyncio.Semaphore(max_unanswered)
        self._max_batch = max_batch
        self._lock = threading.Lock()
        self._results: list[Result] = []
        self._num_unanswered = 0
        self._closed = False
        self._changed = asyncio.Event()

    async def expect_one(self) -> None:
        """Wait until one more item may be read; exactly one `put` has to follow."""
        await self._room.acquire()
        self._num_unanswered += 1

    def put(self, result: Result) -> None:
        """Add a result, from any thread; the loop is woken once for a batch."""
        with self._lock:
            self._results.append(result)
            first = len(self._results) == 1
        if first:
            # A closed loop means that the process ends and nobody reads the result.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._changed.set)

    def close(self) -> None:
        """No more items will be expected; `batches` ends when all results have been taken."""
        self._closed = True
        self._changed.set()

    async def batches(self) -> AsyncIterator[list[Result]]:
        """Results that are ready together, until the outbox is closed and everything answered."""
        while not (self._closed and self._num_unanswered == 0):
            await self._changed.wait()
            self._changed.clear()
            with self._lock:
                results, self._results = self._results, []
            for start in range(0, len(results), self._max_batch):
                batch = results[start : start + self._max_batch]
                yield batch
                self._num_unanswered -= len(batch)
                for _ in batch:
                    self._room.release()


async def filling(waiting: Collection[Any]) -> None:
    """Turns of the loop for as long as the next frame is small and each brings more for it.

    A frame costs as much as many items; in a crowd, a small one is worth to wait with.
    """
    before = 0
    for _ in range(MAX_TURNS):
        if len(waiting) >= FULL_FRAME or len(waiting) == before:
            return
        before = len(waiting)
        await asyncio.sleep(0)


def split_frames(messages: Iterable[Message], max_bytes: int) -> Iterator[list[Message]]:
    """The messages in order, in as few lists as keep each list's sum within `max_bytes`.

    A message that is larger by itself has a list of its own.
    """
    frame: list[Message] = []
    num_bytes = 0
    for message in messages:
        size = message.ByteSize()
        if frame and num_bytes + size > max_bytes:
            yield frame
            frame, num_bytes = [], 0
        frame.append(message)
        num_bytes += size
    if frame:
        yield frame
