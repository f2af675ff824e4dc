"""The other end of a served shared stream: says items, and keeps what it is told."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from specinfer.convert import event_from_wire
from specinfer.errors import SpecinferError
from specinfer.messages import (
    Finished,
    GenerateEvent,
    RoundFacts,
    SpeculationSummary,
    TokensEvent,
    Usage,
)
from specinfer.multiplex.server import (
    CallReader,
    Serve,
    ServedStream,
    SharedStreamLimits,
)
from specinfer.rpc import detailed_error
from specinfer.v1 import router_pb2

FINISHED = Finished("length", "", Usage(1, 1, 0), SpeculationSummary(0, 0, 0, 0, (), ()))


def tokens(number: int, text: str = "") -> TokensEvent:
    return TokensEvent(number, text, (number,), 0, (), RoundFacts(number, 0, 0))


def begin(
    call_id: int, prompt: str = "", *, room: int = 64, seconds: float | None = None
) -> router_pb2.CallItem:
    generate = router_pb2.GenerateRequest(prompt=prompt)
    call = router_pb2.BeginCall(generate=generate, room=room, timeout_seconds=seconds)
    return router_pb2.CallItem(call_id=call_id, begin=call)


def leave(call_id: int) -> router_pb2.CallItem:
    return router_pb2.CallItem(call_id=call_id, leave=router_pb2.LeaveCall())


class Peer:
    """The other end: says items, and keeps what it is told of each call."""

    def __init__(self, stream: ServedStream) -> None:
        self.said: asyncio.Queue[router_pb2.MultiplexRequest | None] = asyncio.Queue()
        self.frames: list[list[int]] = []
        self.events: dict[int, list[GenerateEvent]] = defaultdict(list)
        self.failures: dict[int, SpecinferError] = {}
        self.reads = asyncio.Event()
        self.reads.set()
        self.task = asyncio.create_task(self._take(stream))

    def say(self, *items: router_pb2.CallItem) -> None:
        self.said.put_nowait(router_pb2.MultiplexRequest(items=items))

    def hang_up(self) -> None:
        self.said.put_nowait(None)

    async def requests(self) -> AsyncIterator[router_pb2.MultiplexRequest]:
        while (frame := await self.said.get()) is not None:
            yield frame

    async def _take(self, stream: ServedStream) -> None:
        async for frame in stream.frames(self.requests()):
            await self.reads.wait()
            self.frames.append([told.call_id for told in frame.events])
            for told in frame.events:
                if told.HasField("failure"):
                    failure = told.failure
                    self.failures[told.call_id] = detailed_error(failure.code, failure.detail)
                else:
                    self.events[told.call_id].append(event_from_wire(told.event))


@asynccontextmanager
async def talking(serve: Serve, limits: SharedStreamLimits | None = None) -> AsyncIterator[Peer]:
    peer = Peer(ServedStream(serve, limits))
    try:
        yield peer
    finally:
        peer.task.cancel()
        await asyncio.gather(peer.task, return_exceptions=True)


def numbers(events: list[GenerateEvent]) -> list[int]:
    return [event.offset for event in events if isinstance(event, TokensEvent)]


class Held:
    """Serves calls that tell one event and then wait until they are cancelled."""

    def __init__(self) -> None:
        self.running = 0

    async def __call__(self, call: router_pb2.BeginCall, reader: CallReader) -> None:
        self.running += 1
        try:
            reader.put(tokens(0))
            await asyncio.Event().wait()
        finally:
            self.running -= 1
