"""Calls on a shared stream, told apart: room, failures, ends, and streams that break."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from specinfer import (
    InternalError,
    NotFound,
    Unavailable,
)
from specinfer.convert import event_to_wire
from specinfer.messages import GenerateRequest
from specinfer.multiplex.client import (
    MAX_CALL_BYTES,
    ROOM,
    SharedStream,
    StreamRefused,
    begin_call,
)
from specinfer.rpc import error_detail
from specinfer.v1 import router_pb2
from tests.kit.fake_router import finished_event, tokens_event
from tests.kit.waiting import until

# Who is not woken waits for ever.
pytestmark = pytest.mark.timeout(30)


class Line:
    """A gRPC call as a shared stream sees it; a test tells what comes."""

    def __init__(self) -> None:
        self.said: list[router_pb2.CallItem] = []
        self.num_frames = 0
        self.done = asyncio.Event()
        self.cancelled = False
        self.coming: asyncio.Queue[Any] = asyncio.Queue()

    async def write(self, frame: router_pb2.MultiplexRequest) -> None:
        self.num_frames += 1
        self.said += frame.items

    async def done_writing(self) -> None:
        self.done.set()

    async def read(self) -> Any:
        found = await self.coming.get()
        if isinstance(found, Exception):
            raise found
        return found

    def cancel(self) -> None:
        self.cancelled = True

    def tell(self, *events: router_pb2.CallEvent) -> None:
        self.coming.put_nowait(router_pb2.MultiplexResponse(events=events))

    def tell_tokens(self, call_id: int, count: int) -> None:
        request = GenerateRequest(prompt="x")
        wire = event_to_wire(tokens_event(request, 0, [1]))
        self.tell(*[router_pb2.CallEvent(call_id=call_id, event=wire)] * count)

    def tell_end(self, call_id: int) -> None:
        wire = event_to_wire(finished_event(0, 0))
        self.tell(router_pb2.CallEvent(call_id=call_id, event=wire))

    def rooms(self, call_id: int) -> list[int]:
        return [
            item.room for item in self.said if item.call_id == call_id and item.HasField("room")
        ]


def failed(call_id: int, error: Any) -> router_pb2.CallEvent:
    failure = router_pb2.CallFailure(code=error.code, detail=error_detail(error))
    return router_pb2.CallEvent(call_id=call_id, failure=failure)


async def test_half_of_what_there_is_room_for_makes_room_for_more() -> None:
    line = Line()
    stream = SharedStream(line)
    call = stream.begin(router_pb2.BeginCall())
    line.tell_tokens(1, ROOM)
    for count in range(1, ROOM + 1):
        await call.read()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert sum(line.rooms(1)) == count // (ROOM // 2) * (ROOM // 2)
    assert line.said[0].begin.room == ROOM
    line.tell_end(1)
    assert (await call.read()).HasField("finished")
    assert await call.read() is grpc.aio.EOF
    await line.done.wait()


async def test_a_slow_reader_makes_room_in_time_and_nobody_after_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = Line()
    stream = SharedStream(line)
    call, other = (stream.begin(router_pb2.BeginCall()) for _ in range(2))
    line.tell_tokens(1, 3)
    monkeypatch.setattr("specinfer.multiplex.client.ROOM_SECONDS", -1.0)
    for _ in range(2):
        await call.read()
    await until(lambda: line.rooms(1) == [1, 1], "room for each event")
    line.tell_end(1)
    line.tell_end(2)
    await other.read()
    for _ in range(2):
        await call.read()
    await line.done.wait()
    assert line.rooms(1) == [1, 1]


async def test_more_than_there_is_room_for_is_not_kept() -> None:
    line = Line()
    stream = SharedStream(line)
    call = stream.begin(router_pb2.BeginCall())
    line.tell_tokens(1, 3 * ROOM)
    await line.done.wait()
    assert line.said[-1].HasField("leave")
    for _ in range(ROOM):
        await call.read()
    with pytest.raises(InternalError, match="room"):
        await call.read()


async def test_nothing_is_read_of_a_call_that_was_given_up() -> None:
    line = Line()
    call = SharedStream(line).begin(router_pb2.BeginCall())
    line.tell_tokens(1, 3)
    await call.read()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call.read()


async def test_two_readers_of_one_call_both_end() -> None:
    line = Line()
    stream = SharedStream(line)
    call = stream.begin(router_pb2.BeginCall())
    reading = [asyncio.create_task(call.read()) for _ in range(3)]
    await asyncio.sleep(0)
    line.tell_end(1)
    found = await asyncio.gather(*reading)
    assert sum(one is grpc.aio.EOF for one in found) == 2


async def test_a_router_that_does_not_end_a_stream_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("specinfer.multiplex.client.END_SECONDS", 0.01)
    line = Line()
    stream = SharedStream(line)
    stream.begin(router_pb2.BeginCall()).cancel()
    await until(lambda: line.cancelled, "the stream to be cancelled")
    assert stream.full


async def test_large_requests_leave_in_frames_of_their_own() -> None:
    line = Line()
    stream = SharedStream(line)
    for _ in range(3):
        stream.begin(begin_call(GenerateRequest(prompt="x" * (MAX_CALL_BYTES - 1000)), None))
    await until(lambda: len(line.said) == 3, "the calls to be made")
    assert line.num_frames == 3


async def test_a_failure_comes_after_what_came_before_it_and_is_one_calls_alone() -> None:
    line = Line()
    stream = SharedStream(line)
    one, other = (stream.begin(router_pb2.BeginCall()) for _ in range(2))
    line.tell_tokens(1, 2)
    line.tell(failed(1, NotFound("gone")), router_pb2.CallEvent(call_id=2))
    line.tell_tokens(1, 1)
    line.tell_tokens(2, 1)
    await one.read()
    await one.read()
    for _ in range(2):
        with pytest.raises(NotFound, match="gone"):
            await one.read()
    await other.read()
    assert stream.open
    line.tell(failed(2, Unavailable("no worker")))
    with pytest.raises(Unavailable):
        await other.read()
    assert not stream.open


async def test_what_the_router_cannot_do_now_is_not_asked_of_the_same_stream() -> None:
    line = Line()
    stream = SharedStream(line)
    one, other = (stream.begin(router_pb2.BeginCall()) for _ in range(2))
    line.tell(failed(1, Unavailable("leaving")))
    with pytest.raises(Unavailable):
        await one.read()
    assert not stream.open
    line.tell_end(2)
    assert (await other.read()).HasField("finished")


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("code", ["UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE"])
async def test_a_stream_that_breaks_breaks_every_call_with_an_error_of_its_own(
    code: str, told: bool
) -> None:
    line = Line()
    stream = SharedStream(line)
    calls = [stream.begin(router_pb2.BeginCall()) for _ in range(3)]
    if told:
        line.tell_tokens(1, 1)
        await calls[0].read()
    metadata = grpc.aio.Metadata()
    status = grpc.StatusCode[code]
    line.coming.put_nowait(grpc.aio.AioRpcError(status, metadata, metadata, "broken"))
    found = await asyncio.gather(*(call.read() for call in calls), return_exceptions=True)
    refused = not told and code != "UNAVAILABLE"
    kind = StreamRefused if refused else Unavailable
    assert (told and code == "UNIMPLEMENTED") or {type(error) for error in found} == {kind}
    assert len(set(map(id, found))) == 3
    assert stream.full
    await until(lambda: len(asyncio.all_tasks()) == 1, "the stream's tasks to end")


async def test_what_cannot_be_read_fails_the_calls_that_wait() -> None:
    line = Line()
    stream = SharedStream(line)
    call = stream.begin(router_pb2.BeginCall())
    line.coming.put_nowait(None)
    with pytest.raises(InternalError, match="cannot be read"):
        await call.read()
    assert line.cancelled
    assert not stream.open


async def test_a_call_that_is_given_up_is_left_once_and_wakes_its_reader() -> None:
    line = Line()
    stream = SharedStream(line)
    call = stream.begin(router_pb2.BeginCall())
    reading = asyncio.create_task(call.read())
    await asyncio.sleep(0)
    call.cancel()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await line.done.wait()
    assert [item.HasField("leave") for item in line.said] == [False, True]
    assert not stream.open
