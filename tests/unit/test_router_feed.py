"""A router that feeds a reader with room of its own: the same events, and every end that a stream
can have."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import pytest

from specinfer.errors import InvalidRequest, NotFound, ReaderStalled, RouterLeaving
from specinfer.messages import GenerateEvent, GenerateRequest, ResumeRequest, Started, TokensEvent
from specinfer.multiplex.client import begin_call
from specinfer.telemetry import TraceContext
from specinfer.v1 import router_pb2
from specinfer_router.access import Caller
from specinfer_router.keys.control import AccessControl
from specinfer_router.router import RouterLimits
from specinfer_router.servicer import GenerationServicer
from specinfer_router.store import ABANDONED
from tests.kit.router import Bench, collected, request_of, running_router
from tests.kit.waiting import until

# Who is not woken waits for ever.
pytestmark = pytest.mark.timeout(60)


@dataclass
class Room:
    """A reader that takes so many events, and more when it is told to."""

    left: int = 10_000
    events: list[GenerateEvent] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def full(self) -> bool:
        return self.left == 0

    def put(self, event: GenerateEvent) -> None:
        assert not self.full
        self.left -= 1
        self.events.append(event)

    async def room(self) -> None:
        while self.full:
            self.changed.clear()
            await self.changed.wait()

    def more(self, count: int) -> None:
        self.left += count
        self.changed.set()

    @property
    def token_ids(self) -> tuple[int, ...]:
        rounds = (event for event in self.events if isinstance(event, TokensEvent))
        return tuple(token for event in rounds for token in event.token_ids)


async def outcome(bench: Bench, request_id: str) -> str:
    return (await bench.router.explain(request_id)).outcome


def named(request_id: str, max_tokens: int = 200) -> GenerateRequest:
    return request_of(max_tokens=max_tokens, request_id=request_id)


async def test_who_is_fed_gets_what_who_reads_gets() -> None:
    async with running_router() as bench:
        whole = await bench.generate(request_of(max_tokens=200))
        reader = Room()
        await bench.router.feed(named("fed"), reader)
        fed = collected(reader.events)
        assert (fed.token_ids, fed.text) == (whole.token_ids, whole.text)
        assert await outcome(bench, "fed") == "length"
        rest = Room()
        await bench.router.feed(ResumeRequest(fed.started.session_id, 50), rest)
        assert rest.token_ids == whole.token_ids[50:]
        with pytest.raises(NotFound):
            await bench.router.feed(ResumeRequest("unknown", 0), Room())


async def test_a_reader_that_leaves_gives_its_session_up() -> None:
    async with running_router() as bench:
        reader = Room(left=4)
        feeding = asyncio.create_task(bench.router.feed(named("left"), reader))
        await until(lambda: reader.full, "the reader to be full")
        feeding.cancel()
        await asyncio.wait([feeding])
        started = reader.events[0]
        assert isinstance(started, Started)
        assert await outcome(bench, "left") == "cancelled"
        assert (await bench.store.load(started.session_id)).finish_reason == ABANDONED
        await bench.router.idle()


async def test_a_reader_that_makes_room_in_time_loses_nothing() -> None:
    async with running_router() as bench:
        whole = await bench.generate(request_of(max_tokens=60))
        reader = Room(left=1)
        feeding = asyncio.create_task(bench.router.feed(named("slow", 60), reader))
        while not feeding.done():
            await until(lambda: reader.full or feeding.done(), "the next event")
            reader.more(1)
        await feeding
        assert collected(reader.events).token_ids == whole.token_ids


async def test_a_reader_that_makes_no_room_loses_its_session() -> None:
    async with running_router(limits=RouterLimits(stall_seconds=0.05)) as bench:
        reader = Room(left=3)
        with pytest.raises(ReaderStalled) as stalled:
            await bench.router.feed(named("stalled"), reader)
        assert stalled.value.request_id == "stalled"
        assert len(reader.events) == 3
        assert await outcome(bench, "stalled") == "reader_stalled"
        await bench.router.idle()


async def test_a_router_that_ends_tells_who_is_fed() -> None:
    async with running_router() as bench:
        reader = Room(left=3)
        feeding = asyncio.create_task(bench.router.feed(named("cut"), reader))
        await until(lambda: reader.full, "the reader to be full")
        bench.router.cut()
        with pytest.raises(RouterLeaving):
            await feeding
        await bench.router.idle()


async def test_what_a_shared_stream_says_of_a_call_reaches_the_router() -> None:
    class Listener:
        callers: ClassVar[list[Caller]] = []

        async def feed(self, request: Any, reader: Any, caller: Caller) -> None:
            self.callers.append(caller)

    class Context:
        def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
            return ()

        def time_remaining(self) -> float | None:
            return 1000.0

    servicer = GenerationServicer(cast(Any, Listener()), AccessControl())
    trace = (("traceparent", "00-1-2-01"), ("tracestate", "a=b"))
    for seconds, resumes in ((2.5, True), (None, False)):
        begin = begin_call(named("said"), seconds, trace, resumes=resumes)
        await servicer._serve(Context(), begin, cast(Any, None))
        caller = Listener.callers.pop()
        assert (caller.seconds_left, caller.resumes) == (seconds, resumes)
        assert caller.trace == TraceContext("00-1-2-01", "a=b")
    begin.generate.ClearField("input")
    with pytest.raises(InvalidRequest) as caught:
        await servicer._serve(Context(), begin, cast(Any, None))
    assert caught.value.request_id == "said"
    with pytest.raises(InvalidRequest, match="generates or resumes"):
        await servicer._serve(Context(), router_pb2.BeginCall(room=1), cast(Any, None))
