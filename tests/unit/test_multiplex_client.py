"""The reading end of a shared stream: many calls of a client in one, told apart and ended well."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from specinfer import (
    AsyncClient,
    DeadlineExceeded,
    InternalError,
    NotFound,
    ResourceExhausted,
    RetryPolicy,
    Unavailable,
)
from specinfer.convert import event_to_wire
from specinfer.messages import GenerateEvent, GenerateRequest
from specinfer.multiplex.client import MAX_CALL_BYTES, ROOM, SharedStream
from specinfer.rpc import error_detail
from specinfer.v1 import router_pb2
from tests.kit.fake_router import FakeRouter, answer, finished_event, started_event, tokens_event
from tests.kit.waiting import until

# Who is not woken waits for ever.
pytestmark = pytest.mark.timeout(30)

ONCE = RetryPolicy(max_attempts=1)
FAST = RetryPolicy(max_attempts=3, initial_backoff=0.001, max_backoff=0.01)


class Streams(FakeRouter):
    """A router that counts its shared streams, and may be too old to have any.

    Attributes:
        begun: shared streams that were begun.
        running: those that have not ended.
    """

    def __init__(self, *, too_old: bool = False) -> None:
        super().__init__()
        self.begun = self.running = 0
        self.too_old = too_old

    async def Multiplex(
        self, request_iterator: AsyncIterator[router_pb2.MultiplexRequest], context: Any
    ) -> AsyncIterator[router_pb2.MultiplexResponse]:
        self.begun += 1
        if self.too_old:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        self.running += 1
        try:
            async for frame in super().Multiplex(request_iterator, context):
                yield frame
        finally:
            self.running -= 1


async def test_streams_that_run_at_once_share_a_call_and_give_what_they_give_alone() -> None:
    with Streams() as router:
        async with AsyncClient(router.address, multiplex=False) as alone:
            expected = [await alone.generate(f"q{at}", max_tokens=at + 1) for at in range(40)]
        async with AsyncClient(router.address) as client:
            found = await asyncio.gather(
                *(client.generate(f"q{at}", max_tokens=at + 1) for at in range(40))
            )
            await until(lambda: router.running == 0, "the stream to end with its last call")
            assert router.begun == 1
            assert (await client.generate("once more")).token_ids
            assert router.begun == 2
    for one, other in zip(found, expected, strict=True):
        assert (one.token_ids, one.text, one.usage) == (other.token_ids, other.text, other.usage)


@pytest.mark.parametrize("multiplex", [True, False])
async def test_interceptors_see_calls_of_their_own(multiplex: bool) -> None:
    class Nothing(grpc.aio.UnaryStreamClientInterceptor):
        async def intercept_unary_stream(
            self, continuation: Any, client_call_details: Any, request: Any
        ) -> Any:
            return await continuation(client_call_details, request)

    with Streams() as router:
        async with AsyncClient(
            router.address, interceptors=[Nothing()], multiplex=multiplex
        ) as client:
            assert (await client.generate("hi")).token_ids
        assert router.begun == 0


async def test_a_router_that_is_too_old_gets_calls_of_their_own_from_then_on() -> None:
    with Streams(too_old=True) as router:
        async with AsyncClient(router.address, timeout=20, retry=FAST) as client:
            assert (await client.generate("hi")).token_ids
            assert all(
                one.token_ids for one in await asyncio.gather(*map(client.generate, "abcdef"))
            )
            assert router.begun == 1


class Endless:
    """A script that goes on until its reader leaves, and says how far it has come."""

    def __init__(self) -> None:
        self.made: dict[str, int] = {}
        self.left: list[str] = []

    async def __call__(
        self, request: GenerateRequest, attempt: int
    ) -> AsyncIterator[GenerateEvent]:
        name = str(request.prompt)
        self.made[name] = 0
        try:
            yield started_event(request)
            while name != "silent":
                yield tokens_event(request, self.made[name], [1])
                self.made[name] += 1
                await asyncio.sleep(0)
            await asyncio.Event().wait()
        finally:
            self.left.append(name)


async def test_a_stream_that_is_not_read_waits_and_others_do_not() -> None:
    script = Endless()
    with Streams() as router:
        router.script = script
        async with AsyncClient(router.address) as client, client.stream("unread") as unread:
            await anext(unread)
            async with client.stream("read") as read:
                for _ in range(10 * ROOM):
                    await anext(read)
            # The first two events made no room yet, and one is in the hand of who makes them.
            assert script.made["unread"] <= ROOM
            for _ in range(10 * ROOM):
                await anext(unread)
        await until(lambda: sorted(script.left) == ["read", "unread"], "both to be given up")
        await until(lambda: router.running == 0, "the stream to end")
        assert router.begun == 1


async def test_a_stream_whose_timeout_passes_is_given_up() -> None:
    script = Endless()
    with Streams() as router:
        router.script = script
        async with AsyncClient(router.address, retry=ONCE) as client:
            with pytest.raises(DeadlineExceeded):
                await client.generate("silent", timeout=0.2)
            await until(lambda: script.left == ["silent"], "the call to be given up")


async def test_after_a_silence_new_calls_go_elsewhere_and_others_go_on() -> None:
    script = Endless()
    with Streams() as router:
        router.script = script
        async with AsyncClient(router.address, retry=ONCE) as client, client.stream("read") as read:
            await anext(read)
            with pytest.raises(Unavailable, match="attempt_timeout"):
                await client.generate("silent", attempt_timeout=0.2)
            async with client.stream("later") as later:
                await anext(later)
                assert router.begun == 2
                for _ in range(2 * ROOM):
                    await anext(read)


async def test_who_calls_is_said_by_the_stream_so_that_a_new_token_takes_a_new_one() -> None:
    tokens = iter(["first", "first", "second"])
    with Streams() as router:
        router.script = Endless()
        async with (
            AsyncClient(router.address, token_provider=lambda: next(tokens)) as client,
            client.stream("a") as one,
            client.stream("b") as same,
            client.stream("c") as other,
        ):
            for stream in (one, same, other, one):
                await anext(stream)
        assert router.begun == 2
        sent = [called["authorization"] for called in router.metadata]
        assert sent == ["Bearer first", "Bearer first", "Bearer second"]


class Line:
    """A gRPC call as a shared stream sees it; a test tells what comes."""

    def __init__(self) -> None:
        self.said: list[router_pb2.CallItem] = []
        self.done = asyncio.Event()
        self.cancelled = False
        self.coming: asyncio.Queue[Any] = asyncio.Queue()

    async def write(self, frame: router_pb2.MultiplexRequest) -> None:
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


@pytest.mark.parametrize(
    ("code", "refused"),
    [
        (grpc.StatusCode.UNIMPLEMENTED, True),
        (grpc.StatusCode.INTERNAL, True),
        (grpc.StatusCode.UNAVAILABLE, False),
    ],
)
async def test_a_stream_that_breaks_breaks_every_call_with_an_error_of_its_own(
    code: grpc.StatusCode, refused: bool
) -> None:
    metadata = grpc.aio.Metadata()
    for told in (False, True):
        line = Line()
        stream = SharedStream(line)
        calls = [stream.begin(router_pb2.BeginCall()) for _ in range(3)]
        if told:
            line.tell_tokens(1, 1)
            await calls[0].read()
        line.coming.put_nowait(grpc.aio.AioRpcError(code, metadata, metadata, "broken"))
        found = await asyncio.gather(*(call.read() for call in calls), return_exceptions=True)
        assert all(isinstance(error, Unavailable) for error in found)
        assert len(set(map(id, found))) == 3
        assert not stream.open
        assert (stream.refused > 0) is (refused and not told)


async def test_a_request_that_is_too_large_does_not_break_the_others() -> None:
    with Streams() as router:
        router.script = answer
        async with AsyncClient(router.address, retry=ONCE) as client, client.stream("hi") as stream:
            await anext(stream)
            with pytest.raises(ResourceExhausted, match="larger"):
                await client.generate("x" * MAX_CALL_BYTES)
            assert (await stream.collect()).token_ids
        async with AsyncClient(router.address, retry=ONCE) as client:
            with pytest.raises(ResourceExhausted, match="larger"):
                await client.generate("x" * MAX_CALL_BYTES)
        await until(lambda: router.running == 0, "the streams to end")


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
