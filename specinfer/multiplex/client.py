"""The reading end of a shared stream: makes calls on it, and deals out what its frames hold.

A stream lives as long as calls share it; the last one to end takes it along. This module knows
nothing of routers, credentials, retries or what the events add up to.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import Context
from typing import Any

import grpc
import grpc.aio

from specinfer.convert import request_to_wire, resume_to_wire
from specinfer.errors import (
    ClientClosed,
    DeadlineExceeded,
    InternalError,
    ResourceExhausted,
    SpecinferError,
    Unavailable,
)
from specinfer.messages import GenerateRequest, ResumeRequest
from specinfer.outbox import split_frames
from specinfer.rpc import MAX_MESSAGE_BYTES, detailed_error, shared_stream_error
from specinfer.v1 import router_pb2

log = logging.getLogger(__name__)

# Events of a call that may come before any of them is read; half of them read makes room for more.
ROOM = 64
ROOM_SECONDS = 1.0
# More calls than these go on another stream; a router takes some more on one.
MAX_CALLS = 256
# A router that does not end a stream without calls has so long.
END_SECONDS = 5.0
# A loop that ends before its calls would have gRPC complain, and this is as long as one waits.
CLOSE_SECONDS = 0.5
MAX_FRAME_BYTES = MAX_MESSAGE_BYTES // 2
# Leaves room for what surrounds it in a frame of its own.
MAX_CALL_BYTES = MAX_MESSAGE_BYTES - 1024
# The latter where a message was on its way; see `shared_stream_error`.
_REFUSALS = (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.INTERNAL)


class StreamRefused(Unavailable):
    """A stream ended as one does at a router that is too old; calls of their own are next."""


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
        self._time = asyncio.get_running_loop().time
        self._deadline = None if seconds is None else self._time() + seconds
        self._events: deque[router_pb2.GenerateResponse] = deque()
        # Events that were read since the router was told of room, and when it was.
        self._num_read, self._told = 0, self._time()
        self._ended = self._cancelled = False
        self._failure: SpecinferError | None = None
        self._changed = asyncio.Event()

    async def read(self) -> Any:
        """The next event, or grpc.aio.EOF after the last.

        Raises:
            SpecinferError: what the call failed with, after the events that came before.
            asyncio.CancelledError: it was cancelled meanwhile.
        """
        while self._cancelled or not self._events:
            if self._cancelled:
                raise asyncio.CancelledError
            if self._failure is not None:
                raise self._failure
            if self._ended:
                return grpc.aio.EOF
            await self._wait()
        if not self._ended:
            self._make_room()
        return self._events.popleft()

    def cancel(self) -> None:
        """Give the call up; again, or after its end, it does nothing."""
        if not self._ended:
            self._ended = True
            self._say(router_pb2.CallItem(call_id=self._id, leave=router_pb2.LeaveCall()))
        self._cancelled = True
        self._changed.set()

    def put(self, event: router_pb2.GenerateResponse) -> bool:
        """Take an event that came; says whether it is the call's last."""
        if len(self._events) >= ROOM:
            self._say(router_pb2.CallItem(call_id=self._id, leave=router_pb2.LeaveCall()))
            self.fail(InternalError("the router sent more than there was room for"))
            return True
        self._events.append(event)
        self._ended = event.HasField("finished")
        self._changed.set()
        return self._ended

    def fail(self, error: SpecinferError) -> None:
        """Take down that nothing more comes, and why."""
        self._failure, self._ended = error, True
        self._changed.set()

    def _make_room(self) -> None:
        # Not for each event: it takes the router some work too. A reader that is slow says so in
        # time, or it would be taken for one that does not read.
        self._num_read += 1
        if self._num_read < ROOM // 2 and self._time() < self._told + ROOM_SECONDS:
            return
        self._say(router_pb2.CallItem(call_id=self._id, room=self._num_read))
        self._num_read, self._told = 0, self._time()

    async def _wait(self) -> None:
        self._changed.clear()
        try:
            async with asyncio.timeout_at(self._deadline):
                await self._changed.wait()
        except TimeoutError:
            self.cancel()
            raise DeadlineExceeded("the timeout passed before the answer was complete") from None


class SharedStream:
    """A `Multiplex` call and the calls on it. Made on the loop that it runs on.

    Attributes:
        open: whether new calls may be made.
    """

    def __init__(self, call: Any) -> None:
        self.open = True
        self._call = call
        self._calls: dict[int, SharedCall] = {}
        self._next_id = 1
        self._items: list[router_pb2.CallItem] = []
        self._wake = asyncio.Event()
        self._ending: asyncio.TimerHandle | None = None
        # They are nobody's in particular, so they are not part of what the first caller traces.
        self._writing = asyncio.create_task(self._write(), context=Context())
        self._reading = asyncio.create_task(self._read(), context=Context())

    @property
    def full(self) -> bool:
        """Whether new calls go on another stream."""
        return not self.open or len(self._calls) >= MAX_CALLS

    def begin(self, begin: router_pb2.BeginCall) -> SharedCall:
        """Make a call, of at most MAX_CALL_BYTES, on a stream that is open."""
        call_id, self._next_id = self._next_id, self._next_id + 1
        seconds = begin.timeout_seconds if begin.HasField("timeout_seconds") else None
        call = self._calls[call_id] = SharedCall(self._say, call_id, seconds)
        begin.room = ROOM
        self._say(router_pb2.CallItem(call_id=call_id, begin=begin))
        return call

    async def close(self) -> None:
        """Give up the calls that are left, and return when the stream has ended, or does not."""
        self.open = False
        if self._calls:
            self._call.cancel()
        await asyncio.wait((self._reading,), timeout=CLOSE_SECONDS)

    def retire(self) -> None:
        """Take no new calls; those that are under way go on."""
        self.open = False

    def _say(self, item: router_pb2.CallItem) -> None:
        self._items.append(item)
        self._wake.set()
        if item.HasField("leave"):
            self._forget(item.call_id)

    def _forget(self, call_id: int) -> None:
        if self._calls.pop(call_id, None) is not None and not self._calls:
            self.open = False
            self._wake.set()
            self._ending = asyncio.get_running_loop().call_later(END_SECONDS, self._call.cancel)

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
            cause = error
            refused = silent and error.code() in _REFUSALS
            self._end(lambda: _refusal(cause) if refused else shared_stream_error(cause))
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
        if self._ending is not None:
            self._ending.cancel()


def _refusal(error: grpc.aio.AioRpcError) -> StreamRefused:
    return StreamRefused(f"the router took no shared stream: {error.details()}")


def begin_call(
    request: GenerateRequest | ResumeRequest,
    seconds: float | None,
    trace: Sequence[tuple[str, str]] = (),
    *,
    resumes: bool = False,
) -> router_pb2.BeginCall:
    """What makes a call on a shared stream.

    Args:
        request: what is asked for.
        seconds: until the call fails with DeadlineExceeded, or None.
        trace: its W3C context, as metadata.
        resumes: whether its reader goes on elsewhere when the router leaves.

    Raises:
        ResourceExhausted: it is too large for a message, which would end the stream and all its
            calls.
    """
    said = dict(trace)
    begin = router_pb2.BeginCall(
        timeout_seconds=seconds,
        resumes=resumes,
        traceparent=said.get("traceparent", ""),
        tracestate=said.get("tracestate", ""),
    )
    if isinstance(request, GenerateRequest):
        begin.generate.CopyFrom(request_to_wire(request))
    else:
        begin.resume.CopyFrom(resume_to_wire(request))
    if begin.ByteSize() > MAX_CALL_BYTES:
        raise ResourceExhausted(
            f"a request of {begin.ByteSize()} bytes is larger than one may be ({MAX_CALL_BYTES})"
        )
    return begin
