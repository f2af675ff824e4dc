"""What lies between a session and its reader: bounded, in order, and ended from either side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from specinfer.errors import ReaderStalled, RouterLeaving
from specinfer_router.stream import Buffer, OpenStreams
from tests.kit.waiting import until

# Who is not woken waits for ever.
pytestmark = pytest.mark.timeout(20)


class Source:
    """Counts up, and says how far it has come and whether it was closed."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.made = 0
        self.closed = False

    async def events(self) -> AsyncGenerator[int, None]:
        try:
            while self.made < self.most:
                self.made += 1
                yield self.made
        finally:
            self.closed = True


async def test_events_come_in_order_and_the_source_runs_ahead_by_so_many() -> None:
    source, streams = Source(20), OpenStreams(max_events=4, stall_seconds=60.0)
    async with aclosing(streams.read(source.events())) as events:
        assert await anext(events) == 1
        # Four that wait, and one in the hand of who makes them.
        await until(lambda: source.made == 6, "the source to run ahead")
        assert [event async for event in events] == list(range(2, 21))
    assert source.closed


class Onlooker:
    """Notes what it is told and by which task."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.tasks: set[asyncio.Task[object] | None] = set()

    def begin(self) -> None:
        self.saw(0)

    def saw(self, event: int) -> None:
        self.seen.append(event)
        self.tasks.add(asyncio.current_task())


async def test_a_watcher_looks_on_in_the_task_of_the_source() -> None:
    streams, onlooker = OpenStreams(max_events=4, stall_seconds=60.0), Onlooker()
    async with aclosing(streams.read(Source(3).events(), onlooker)) as events:
        assert [event async for event in events] == [1, 2, 3]
    assert onlooker.seen == [0, 1, 2, 3]
    assert len(onlooker.tasks) == 1
    assert asyncio.current_task() not in onlooker.tasks


async def test_a_reader_that_leaves_closes_the_source() -> None:
    source, streams = Source(20), OpenStreams(max_events=2, stall_seconds=60.0)
    async with aclosing(streams.read(source.events())) as events:
        await anext(events)
    assert source.closed
    assert source.made < 20


async def read_on(events: AsyncGenerator[int, None], got: list[int]) -> None:
    async for event in events:
        got.append(event)


async def test_a_stalled_reader_gets_what_fitted_and_then_the_error() -> None:
    source, streams = Source(20), OpenStreams(max_events=3, stall_seconds=0.01)
    async with aclosing(streams.read(source.events())) as events:
        got = [await anext(events)]
        await until(lambda: source.closed, "the stalled reader to be cut off")
        with pytest.raises(ReaderStalled):
            await read_on(events, got)
    assert got == [1, 2, 3, 4]


async def test_a_stream_that_is_cut_tells_what_waits_first() -> None:
    source, streams = Source(20), OpenStreams(max_events=3, stall_seconds=60.0)
    async with aclosing(streams.read(source.events())) as events:
        got = [await anext(events)]
        await until(lambda: source.made == 5, "the source to run ahead")
        streams.cut(RouterLeaving("bye", retry_after=0.0))
        with pytest.raises(RouterLeaving):
            await read_on(events, got)
    assert got == [1, 2, 3, 4]
    assert source.closed


async def test_who_is_fed_gets_every_event_and_the_last_one_is_told() -> None:
    source, streams = Source(20), OpenStreams(max_events=4, stall_seconds=60.0)
    reader: Buffer[int] = Buffer(100)
    last = await streams.feed(source.events(), reader)
    assert last == 20
    assert [await reader.take() for _ in range(20)] == list(range(1, 21))


async def test_feeding_that_is_given_up_ends_when_its_source_is_closed() -> None:
    class Slow(Source):
        async def events(self) -> AsyncGenerator[int, None]:
            try:
                yield 1
                yield 2
            finally:
                for _ in range(5):
                    await asyncio.sleep(0)
                self.closed = True

    source, streams = Slow(2), OpenStreams(max_events=4, stall_seconds=60.0)
    reader: Buffer[int] = Buffer(1)
    fed = streams.feed(source.events(), reader)
    feeding = asyncio.create_task(fed)
    await until(lambda: reader.full, "the reader to be full")
    feeding.cancel()
    await asyncio.wait([feeding])
    assert source.closed


async def test_a_buffer_wakes_whichever_side_waits() -> None:
    buffer: Buffer[int] = Buffer(1)
    taking = asyncio.create_task(buffer.take())
    await asyncio.sleep(0)
    buffer.put(1)
    assert await taking == 1
    buffer.put(2)
    making_room = asyncio.create_task(buffer.room())
    await asyncio.sleep(0)
    assert not making_room.done()
    assert await buffer.take() == 2
    await making_room
    taking = asyncio.create_task(buffer.take())
    await asyncio.sleep(0)
    buffer.end()
    assert await taking is None
    assert await buffer.take() is None
