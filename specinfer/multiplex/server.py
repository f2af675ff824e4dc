"""The serving end of a shared stream: runs its calls side by side and frames what they tell.

Each reader says how much room it has, call by call, so that one that does not read holds up its own
call and no other. This module knows nothing of who serves a call, or of who may make one.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

from specinfer.convert import fill_event
from specinfer.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    ResourceExhausted,
    SpecinferError,
)
from specinfer.messages import Finished, GenerateEvent
from specinfer.outbox import filling, split_frames
from specinfer.rpc import MAX_MESSAGE_BYTES, error_detail, hidden_fault
from specinfer.tasks import end_task
from specinfer.v1 import router_pb2

log = logging.getLogger(__name__)

# Among more calls an event waits a few turns of the loop for others to leave with.
CROWD = 8
# A frame may hold very many items; the loop has others to turn to.
ITEMS_A_TURN = 256


@dataclass(frozen=True)
class SharedStreamLimits:
    """Bounds of one shared stream.

    Attributes:
        max_calls: calls at once; more are refused.
        max_room: events of a call that its reader may leave unread, whatever it says.
        max_unsent: while so many events wait to be sent, nothing more is read.
        max_frame_events: most events in a frame.
        max_frame_bytes: what a frame of several events may take.
    """

    max_calls: int = 1024
    max_room: int = 64
    max_unsent: int = 4096
    max_frame_events: int = 256
    max_frame_bytes: int = MAX_MESSAGE_BYTES // 2


class CallReader:
    """The reader of one call, as whoever serves it sees it.

    Args:
        tell: takes each event.
        room: events that it has room for.
        most: events that it may have room for.
    """

    def __init__(self, tell: Callable[[GenerateEvent], None], room: int, most: int) -> None:
        self.last: GenerateEvent | None = None
        self._tell = tell
        self._most = most
        self._room = min(room, most)
        self._waiter: asyncio.Future[None] | None = None

    @property
    def full(self) -> bool:
        """Whether the next event has to wait."""
        return self._room <= 0

    def put(self, event: GenerateEvent) -> None:
        """Send one; it is for the caller to see that there is room."""
        self._room -= 1
        self.last = event
        self._tell(event)

    async def room(self) -> None:
        """Wait until it is not full."""
        while self.full:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    def more(self, room: int) -> None:
        """Take down that it has room for so many events more."""
        self._room = min(self._room + room, self._most)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


Serve = Callable[[router_pb2.BeginCall, CallReader], Coroutine[Any, Any, None]]


@dataclass
class _Call:
    """A call that is served.

    Attributes:
        reader: takes its events.
        deadline: cancels what serves it when its time is up.
        task: serves it, once it has begun.
        given_up: whether nobody wants it any more.
    """

    reader: CallReader
    deadline: asyncio.Timeout
    task: asyncio.Task[None] | None = None
    given_up: bool = False

    def give_up(self) -> None:
        """Cancel what serves it: once, for another time would cut its cleaning up short."""
        cancelled, self.given_up = self.given_up or self.deadline.expired(), True
        if self.task is not None and not cancelled:
            self.task.cancel()


class ServedStream:
    """One shared stream.

    Args:
        serve: serves a call: puts its events, `Finished` last, or raises; it is cancelled when its
            reader leaves.
        limits: bounds of the stream.
    """

    def __init__(self, serve: Serve, limits: SharedStreamLimits | None = None) -> None:
        self._serve = serve
        self._limits = limits or SharedStreamLimits()
        self._calls: dict[int, _Call] = {}
        self._outbox: deque[tuple[int, GenerateEvent | SpecinferError]] = deque()
        self._changed = asyncio.Event()
        self._sent = asyncio.Event()

    async def frames(
        self, requests: AsyncIterator[router_pb2.MultiplexRequest]
    ) -> AsyncGenerator[router_pb2.MultiplexResponse, None]:
        """Events of all calls, until no more can be made and all have ended.

        Closing this generator gives them all up.

        Raises:
            InvalidRequest: a call was made by an id that is in use.
        """
        reading = asyncio.create_task(self._read(requests))
        reading.add_done_callback(lambda _: self._changed.set())
        try:
            while self._calls or self._outbox or not reading.done():
                await self._changed.wait()
                self._changed.clear()
                if reading.done():
                    reading.result()
                if len(self._calls) > CROWD:
                    await filling(self._outbox)
                while self._outbox:
                    for frame in self._take_frames():
                        yield frame
                    self._sent.set()
        finally:
            tasks = self._give_up_calls()
            await end_task(reading)
            if tasks:
                await asyncio.wait(tasks)

    async def _read(self, requests: AsyncIterator[router_pb2.MultiplexRequest]) -> None:
        num_items = 0
        async for frame in requests:
            for item in frame.items:
                while len(self._outbox) >= self._limits.max_unsent:
                    self._sent.clear()
                    await self._sent.wait()
                self._handle(item)
                num_items += 1
                if num_items % ITEMS_A_TURN == 0:
                    await asyncio.sleep(0)

    def _handle(self, item: router_pb2.CallItem) -> None:
        # A newer client may say what this version does not know, and a call may just have ended.
        action, call = item.WhichOneof("action"), self._calls.get(item.call_id)
        if action == "begin":
            if call is not None:
                raise InvalidRequest(f"call {item.call_id} is under way already", field="call_id")
            self._begin(item.call_id, item.begin)
        elif call is not None and action == "room":
            call.reader.more(item.room)
        elif call is not None and action == "leave":
            call.give_up()

    def _begin(self, call_id: int, begin: router_pb2.BeginCall) -> None:
        error = self._refusal(begin)
        if error is not None:
            self._tell(call_id, error)
            return
        reader = CallReader(
            lambda event: self._tell(call_id, event), begin.room, self._limits.max_room
        )
        seconds = begin.timeout_seconds if begin.HasField("timeout_seconds") else None
        call = self._calls[call_id] = _Call(reader, asyncio.timeout(seconds))
        call.task = asyncio.create_task(self._run(call_id, begin, call))
        call.task.add_done_callback(lambda task: self._ended(call_id, task))

    def _refusal(self, begin: router_pb2.BeginCall) -> SpecinferError | None:
        """Why a call cannot be begun here, whoever makes it."""
        most = self._limits.max_calls
        if len(self._calls) >= most:
            return ResourceExhausted(f"{most} calls share this stream already", retry_after=1.0)
        if not begin.room:
            return InvalidRequest("a reader has room for an event", field="room")
        # The loop's timers come in an order, in which such a number has no place.
        if not math.isfinite(begin.timeout_seconds):
            return InvalidRequest("timeout_seconds is a number", field="timeout_seconds")
        return None

    async def _run(self, call_id: int, begin: router_pb2.BeginCall, call: _Call) -> None:
        """Serve a call to its end, and say how it failed if it did."""
        failure: SpecinferError = InternalError("the call ended without its last event")
        try:
            async with call.deadline:
                await self._serve(begin, call.reader)
            if isinstance(call.reader.last, Finished):
                return
        except SpecinferError as error:
            failure = error
        except Exception as error:
            if isinstance(error, TimeoutError) and call.deadline.expired():
                failure = DeadlineExceeded("the timeout passed before the call had ended")
            else:
                log.exception("a call on a shared stream failed")
                failure = hidden_fault()
        self._tell(call_id, failure)

    def _tell(self, call_id: int, outcome: GenerateEvent | SpecinferError) -> None:
        self._outbox.append((call_id, outcome))
        self._changed.set()

    def _ended(self, call_id: int, task: asyncio.Task[None]) -> None:
        call = self._calls.pop(call_id)
        if task.cancelled() and not call.given_up:
            self._tell(call_id, InternalError("what served the call was cancelled"))
        self._changed.set()

    def _take_frames(self) -> Iterator[router_pb2.MultiplexResponse]:
        """What waits, as one frame or as several where it is too large for one."""
        frame = router_pb2.MultiplexResponse()
        for _ in range(min(len(self._outbox), self._limits.max_frame_events)):
            call_id, outcome = self._outbox.popleft()
            told = frame.events.add()
            told.call_id = call_id
            try:
                _fill(told, outcome)
            except Exception:
                # A fault of ours, which is this call's alone.
                log.exception("an event on a shared stream cannot be written")
                _fill(told, hidden_fault())
                if call_id in self._calls:
                    self._calls[call_id].give_up()
        if frame.ByteSize() <= self._limits.max_frame_bytes:
            yield frame
            return
        for events in split_frames(frame.events, self._limits.max_frame_bytes):
            yield router_pb2.MultiplexResponse(events=events)

    def _give_up_calls(self) -> list[asyncio.Task[None]]:
        """Cancel all calls, at once; returns what to wait for."""
        for call in self._calls.values():
            call.give_up()
        return [call.task for call in self._calls.values() if call.task is not None]


def _fill(told: router_pb2.CallEvent, outcome: GenerateEvent | SpecinferError) -> None:
    """Write what came of a call into its message."""
    if isinstance(outcome, SpecinferError):
        told.failure.code = outcome.code
        told.failure.detail.CopyFrom(error_detail(outcome))
    else:
        fill_event(told.event, outcome)
