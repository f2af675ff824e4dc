"""The reading end of a shared stream: many calls of a client in one, told apart and ended well."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from specinfer import (
    AsyncClient,
    ClientClosed,
    DeadlineExceeded,
    ResourceExhausted,
    RetryPolicy,
    Unavailable,
)
from specinfer.connection import REFUSED_SECONDS
from specinfer.messages import GenerateEvent, GenerateRequest
from specinfer.multiplex.client import (
    MAX_CALL_BYTES,
    ROOM,
)
from specinfer.v1 import router_pb2
from tests.kit.fake_router import FakeRouter, answer, started_event, tokens_event
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


async def test_a_router_that_is_too_old_gets_calls_of_their_own_for_a_while() -> None:
    with Streams(too_old=True) as router:
        async with AsyncClient(router.address, timeout=20, retry=ONCE) as client:
            assert (await client.generate("hi")).token_ids
            found = await asyncio.gather(*map(client.generate, "abcdef"))
            assert all(one.token_ids for one in found)
            assert router.begun == 1
            # As if that time had passed.
            client._connection._refused[0] -= REFUSED_SECONDS
            assert (await client.generate("hi")).token_ids
            assert router.begun == 2


async def test_too_old_a_router_is_left_alone_however_many_streams_it_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("specinfer.multiplex.client.MAX_CALLS", 2)
    with Streams(too_old=True) as router:
        async with AsyncClient(router.address, timeout=20, retry=ONCE) as client:
            found = await asyncio.gather(*map(client.generate, "abcdefghij"))
            assert all(one.token_ids for one in found)
            assert router.begun <= 10
            begun = router.begun
            assert (await client.generate("hi")).token_ids
            assert router.begun == begun


def streams_tasks() -> list[str]:
    """Tasks of shared streams that run; gRPC has some of its own for a moment."""
    return [repr(task) for task in asyncio.all_tasks() if "SharedStream" in repr(task)]


async def test_nothing_of_a_stream_is_left_when_its_client_has_been_closed() -> None:
    with Streams() as router:
        router.script = Endless()
        async with AsyncClient(router.address, retry=ONCE) as client, client.stream("a") as stream:
            await anext(stream)
        assert streams_tasks() == []
        client = AsyncClient(router.address, retry=ONCE)
        reading = asyncio.create_task(client.generate("silent"))
        await until(lambda: router.running == 1, "the call to begin")
        await client.close()
        assert streams_tasks() == []
        with pytest.raises(ClientClosed):
            await reading


async def test_very_many_streams_take_several_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specinfer.multiplex.client.MAX_CALLS", 3)
    with Streams() as router:
        async with AsyncClient(router.address, retry=ONCE) as client:
            found = await asyncio.gather(*map(client.generate, "abcdefghij"))
        assert all(one.token_ids for one in found)
        assert router.begun == 4
        await until(lambda: router.running == 0, "the streams to end")


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
