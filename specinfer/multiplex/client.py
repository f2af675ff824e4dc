"""The reading end of a shared stream: makes calls on it, and deals out what its frames hold.

A stream lives as long as calls share it; the last one to end takes it along. This module knows
nothing of routers, credentials, retries or what the events add up to.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio

from specinfer.errors import (
    ClientClosed,
    DeadlineExceeded,
    InternalError,
    ResourceExhausted,
    SpecinferError,
    Unavailable,
)
from specinfer.outbox import split_frames
from specinfer.rpc import MAX_MESSAGE_BYTES, detailed_error, shared_stream_error
from specinfer.v1 import router_pb2

log = logging.getLogger(__name__)

# Events of a call that may come before any of them is read; half of them read makes room for more.
ROOM = 64
MAX_FRAME_BYTES = MAX_MESSAGE_BYTES // 2
# Leaves room for what surrounds it in a frame of its own.
MAX_CALL_BYTES = MAX_MESSAGE_BYTES - 1024
# The latter where a message was on its way; see `shared_stream_error`.
_REFUSALS = (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.INTERNAL)


class SharedCall:
    """One call on a shared stream, read and cancelled as a gRPC call of its own would be.

    Args:
        say: sends what the reader has to say of the call.
        call_id: its id on the stream.
        seconds: until it fails with DeadlineExceeded, or None.
    """

    def __init__(
        self, say: Callable[[router_pb2.CallItem], None], call_id: int, seconds: float | None
    ) -> None:
        self._say = say
        self._id = call_id
        self._deadline = None if seconds is None else asyncio.get_running_loop().time() + seconds
        self._events: deque[router_pb2.GenerateResponse] = deque()
        self._num_read = 0
        self._ended = False
        self._failure: SpecinferError | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def read(self) -> Any:
        """The next event, or grpc.aio.EOF after the last.

        Raises:
            SpecinferError: what the call failed with, after the events that came before.
            asyncio.CancelledError: it was cancelled meanwhile.
        """
        while not self._events:
            if self._failure is not None:
                raise self._failure
            if self._ended:
                return grpc.aio.EOF
            await self._wait()
        self._num_read += 1
        if self._num_read == ROOM // 2 and not self._ended:
            self._say(router_pb2.CallItem(call_id=self._id, room=self._num_read))
            self._num_read = 0
        return self._events.popleft()

    def cancel(self) -> None:
        """Give the call up; again, or after its end, it does nothing."""
        if not self._ended:
            self._ended = True
            self._say(router_pb2.CallItem(call_id=self._id, leave=router_pb2.LeaveCall()))
        if self._waiter is not None:
            self._waiter.cancel()

    def put(self, event: router_pb2.GenerateResponse) -> bool:
        """Take an event that came; says whether it is the call's last."""
        self._events.append(event)
        self._ended = event.HasField("finished")
        self._wake()
        return self._ended

    def fail(self, error: SpecinferError) -> None:
        """Take down that nothing more comes, and why."""
        self._failure, self._ended = error, True
        self._wake()

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout_at(self._deadline):
                await self._waiter
        except TimeoutError:
            self.cancel()
            raise DeadlineExceeded("the timeout passed before the answer was complete") from None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class SharedStream:
    """A `Multiplex` call and the calls on it. Made on the loop that it runs on.

    Attributes:
        open: whether it takes new calls.
        refused: when it ended as one does at a router that knows no shared streams, by
            time.monotonic(), or -inf.
    """

    def __init__(self, call: Any) -> None:
        self.open = True
        self.refused = -math.inf
        self._call = call
        self._calls: dict[int, SharedCall] = {}
        self._next_id = 1
        self._items: list[router_pb2.CallItem] = []
        self._wake = asyncio.Event()
        self._writing = asyncio.create_task(self._write())
        self._reading = asyncio.create_task(self._read())

    def begin(self, begin: router_pb2.BeginCall) -> SharedCall:
        """Make a call on an open stream.

        Raises:
            ResourceExhausted: it is too large for a message, which would end the stream.
        """
        num_bytes = begin.ByteSize()
        if num_bytes > MAX_CALL_BYTES:
            self._end_if_unused()
            raise ResourceExhausted(
                f"a request of {num_bytes} bytes is larger than one may be ({MAX_CALL_BYTES})"
            )
        call_id, self._next_id = self._next_id, self._next_id + 1
        seconds = begin.timeout_seconds if begin.HasField("timeout_seconds") else None
        call = self._calls[call_id] = SharedCall(self._say, call_id, seconds)
        begin.room = ROOM
        self._say(router_pb2.CallItem(call_id=call_id, begin=begin))
        return call

    def retire(self) -> None:
        """Take no new calls; those that are under way go on."""
        self.open = False

    def _say(self, item: router_pb2.CallItem) -> None:
        self._items.append(item)
        self._wake.set()
        if item.HasField("leave"):
            self._forget(item.call_id)

    def _forget(self, call_id: int) -> None:
        self._calls.pop(call_id, None)
        self._end_if_unused()

    def _end_if_unused(self) -> None:
        if not self._calls:
            self.open = False
            self._wake.set()

    async def _write(self) -> None:
        """Send what there is to say, and that nothing follows once no call is left."""
        try:
            while self._calls or self._items or self.open:
                await self._wake.wait()
                self._wake.clear()
                items, self._items = self._items, []
                for frame in split_frames(items, MAX_FRAME_BYTES):
                    await self._call.write(router_pb2.MultiplexRequest(items=frame))
            await self._call.done_writing()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # The call has ended; whoever reads it learns why.

    async def _read(self) -> None:
        """Deal out what comes, up to the stream's end, which ends all calls that are left."""
        silent = True
        try:
            while (frame := await self._call.read()) is not grpc.aio.EOF:
                silent = False
                for told in frame.events:
                    self._deal_out(told)
            self._end(lambda: Unavailable("the router ended the stream during the call"))
        except grpc.aio.AioRpcError as error:
            cause, code = error, error.code()
            if silent and code in _REFUSALS:
                self.refused = time.monotonic()
            unknown = code is grpc.StatusCode.UNIMPLEMENTED
            self._end(lambda: _unknown() if unknown else shared_stream_error(cause))
        except asyncio.CancelledError:
            self._end(lambda: ClientClosed("the client was closed during the call"))
            raise
        except Exception:
            # What gRPC makes of bytes that are no message is None; whatever it is, nobody waits on.
            log.exception("what a router sent on a shared stream cannot be read")
            self._end(lambda: InternalError("the router sent what cannot be read"))
            self._call.cancel()

    def _deal_out(self, told: router_pb2.CallEvent) -> None:
        call = self._calls.get(told.call_id)
        kind = told.WhichOneof("outcome")
        # A call that was just given up, or what a newer router has to say.
        if call is None or kind is None:
            return
        if kind == "event":
            ended = call.put(told.event)
        else:
            error = detailed_error(told.failure.code, told.failure.detail)
            # What the router cannot do for this call it will not do for new ones.
            self.open = self.open and not isinstance(error, Unavailable)
            call.fail(error)
            ended = True
        if ended:
            self._forget(told.call_id)

    def _end(self, failure: Callable[[], SpecinferError]) -> None:
        self.open = False
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.fail(failure())
        self._writing.cancel()


def _unknown() -> Unavailable:
    return Unavailable("the router is too old for shared streams; streams of their own are next")
