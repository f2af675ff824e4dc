"""Readers of a router's streams that are as thin as can be, so that what is measured is the router.

Each session has a connection and a call of its own, or all are one client's and share a call. This
module knows nothing of what is measured.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count

import grpc.aio

from specinfer.convert import request_to_wire
from specinfer.errors import SpecinferError
from specinfer.messages import GenerateRequest
from specinfer.multiplex.client import ROOM
from specinfer.rpc import CHANNEL_OPTIONS, detailed_error
from specinfer.sampling import SamplingParams, StopConditions
from specinfer.v1 import router_pb2, router_pb2_grpc
from specinfer_bench.simulated_workers import FIRST_TOKEN
from specinfer_bench.wire import GENERATE

# Of the readers in turn: what is chosen depends on the context.
PROMPT_LENGTHS = (50, 200, 500, 1200)


class Readers:
    """Sessions that are read one after the other, by as many readers as there are to be at once.

    Args:
        address: the router's.
        sessions: readers at once.
        tokens: tokens of a session.
        one_client: whether they share a call; else each has a connection of its own, whose messages
            are counted and not parsed.

    Attributes:
        num_rounds: rounds read so far.
        heard: when the last message came, by time.perf_counter().
    """

    def __init__(self, address: str, sessions: int, tokens: int, *, one_client: bool) -> None:
        self.num_rounds, self.heard = 0, 0.0
        self._address = address
        self._sessions = sessions
        self._one_client = one_client
        self._requests = [_request(at, tokens) for at in range(len(PROMPT_LENGTHS))]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Read for the length of the block; raises what any reader met."""
        readers = [self._share()] if self._one_client else map(self._read, range(self._sessions))
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(reader) for reader in readers]
                yield
                for task in tasks:
                    task.cancel()
        except* (grpc.aio.AioRpcError, SpecinferError) as errors:
            raise SpecinferError(f"a stream failed: {errors.exceptions[0]}") from errors

    async def _read(self, reader: int) -> None:
        wire = self._requests[reader % len(self._requests)].SerializeToString()
        # Channels of one process share their connections unless told not to.
        options = (*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1))
        async with grpc.aio.insecure_channel(self._address, options=options) as channel:
            generate: grpc.aio.UnaryStreamMultiCallable[bytes, bytes]
            generate = channel.unary_stream(GENERATE)
            while True:
                # The first message starts the stream and the last one ends it.
                self.num_rounds -= 2
                async for _ in generate(wire):
                    self.num_rounds += 1
                    self.heard = time.perf_counter()

    async def _share(self) -> None:
        ids, unread = count(), dict[int, int]()

        def begin(like: int) -> router_pb2.CallItem:
            # What follows a session is like it.
            call_id = next(ids) * self._sessions + like % self._sessions
            unread[call_id] = 0
            self.num_rounds -= 2
            request = self._requests[like % self._sessions % len(self._requests)]
            call = router_pb2.BeginCall(generate=request, room=ROOM)
            return router_pb2.CallItem(call_id=call_id, begin=call)

        def answer(told: router_pb2.CallEvent) -> router_pb2.CallItem | None:
            if told.HasField("failure"):
                raise detailed_error(told.failure.code, told.failure.detail)
            call_id = told.call_id
            self.num_rounds += 1
            unread[call_id] += 1
            if told.event.HasField("finished"):
                del unread[call_id]
                return begin(call_id)
            if unread[call_id] < ROOM // 2:
                return None
            unread[call_id] = 0
            return router_pb2.CallItem(call_id=call_id, room=ROOM // 2)

        async with grpc.aio.insecure_channel(self._address, options=CHANNEL_OPTIONS) as channel:
            call = router_pb2_grpc.GenerationServiceStub(channel).Multiplex()
            items = [begin(at) for at in range(self._sessions)]
            await call.write(router_pb2.MultiplexRequest(items=items))
            async for frame in call:
                self.heard = time.perf_counter()
                items = [item for told in frame.events if (item := answer(told)) is not None]
                if items:
                    await call.write(router_pb2.MultiplexRequest(items=items))
        raise SpecinferError("the router ended the stream that all sessions share")


def _request(at: int, tokens: int) -> router_pb2.GenerateRequest:
    prompt = tuple(FIRST_TOKEN + number % 100 for number in range(PROMPT_LENGTHS[at]))
    stop = StopConditions(max_tokens=tokens, ignore_eos=True)
    return request_to_wire(
        GenerateRequest(token_ids=prompt, sampling=SamplingParams(seed=1), stop=stop)
    )
