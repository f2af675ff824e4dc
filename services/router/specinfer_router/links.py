"""One long-lived stream to each worker: frames of items out, one result for each item back.

Items queued in the same turn of the event loop leave in one frame, for a frame costs as much as
many items; in a crowd a small frame waits a few turns for more of them. Each is written out once: a
message of one item is queued as its bytes, and such bytes in a row are the message of all items
(protobuf's repeated fields add up). A malformed result fails its own item; a broken stream fails
all that wait, and the link connects again by itself, with growing and jittered pauses. This module
knows nothing of rounds, retries or which worker is chosen.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

import grpc
import grpc.aio
from google.protobuf.message import Message

from specinfer.convert import load_from_wire, status_error
from specinfer.errors import (
    InternalError,
    InvalidRequest,
    ResourceExhausted,
    SpecinferError,
    Unavailable,
)
from specinfer.messages import WorkerInfo, WorkerLoad
from specinfer.outbox import filling
from specinfer.rpc import TlsSettings, error_from_rpc, open_channel
from specinfer.tasks import end_task
from specinfer_router.answer import Answer
from specinfer_router.breaker import Breaker, BreakerLimits
from specinfer_router.crowd import CROWD
from specinfer_router.hedging import MovingQuantile

log = logging.getLogger(__name__)

FrameT = TypeVar("FrameT", bound=Message)
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class LinkLimits:
    """Bounds of one link.

    Attributes:
        max_frame_items: most items in one frame.
        max_frame_bytes: most bytes in one frame; a larger item is refused.
        max_pending: most items without a result.
        patience_seconds: how long an item that nobody waits for stays for others to go with.
        connect_timeout: seconds for one attempt to connect.
        min_backoff: seconds before the first new attempt.
        max_backoff: most seconds between attempts.
        breaker: when a worker that fails is left alone and for how long.
    """

    max_frame_items: int = 256
    max_frame_bytes: int = 4 * 1024 * 1024
    max_pending: int = 4096
    patience_seconds: float = 0.002
    connect_timeout: float = 5.0
    min_backoff: float = 0.05
    max_backoff: float = 2.0
    breaker: BreakerLimits = field(default_factory=BreakerLimits)


# An item without a result: its session, the answer to come, and what makes it of a result.
_Pending = tuple[str, Answer[Any], Callable[[Any], Any]]


class WorkerLink(ABC, Generic[FrameT]):
    """What draft and verify links share: connecting, frames, and results by item.

    Attributes:
        address: where the worker listens.
        info: what the worker said it is, or None before the first connection.
        load: what the worker said last.
        refusal: why the worker may not serve here, or None.
        generation: connections so far; a worker closes a stream's sessions when the stream ends,
            so that none outlives its generation.
        num_seats: sessions of ours that use this worker.
        breaker: opens when it fails those who ask it; they tell it so.
        answer_seconds: how long answers took lately; who asks says so.
        heard: when the last frame came, by time.monotonic().
        num_late: answers that did not come in time.
        attempted: set after the first attempt to connect, however it went.
        connected: whether items can be sent; the link's own to say.
    """

    tier = "worker"

    def __init__(
        self,
        address: str,
        *,
        check: Callable[[WorkerInfo], None],
        on_ready: Callable[[], None],
        limits: LinkLimits,
        tls: TlsSettings | None = None,
    ) -> None:
        """Take down whom to connect to.

        Args:
            address: host and port of the worker.
            check: raises when the worker does not fit into this cluster.
            on_ready: called after each connection.
            limits: bounds of the link.
            tls: certificates; None speaks plain text.
        """
        self.address = address
        self.info: WorkerInfo | None = None
        self.load = WorkerLoad()
        self.refusal: SpecinferError | None = None
        self.generation = 0
        self.num_seats = 0
        self.breaker = Breaker(limits.breaker)
        self.answer_seconds = MovingQuantile()
        self.heard = 0.0
        self.num_late = 0
        self.attempted = asyncio.Event()
        self._check = check
        self._on_ready = on_ready
        self._limits = limits
        self._channel = open_channel(address, tls=tls)
        self.connected = False
        self._failures = 0
        self._given_up = asyncio.Event()
        self._next_item_id = 1
        self._outbox: deque[bytes] = deque()
        self._wake = asyncio.Event()
        self._pending: dict[int, _Pending] = {}
        self._task: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        """The model that the worker serves, or "" before the first connection."""
        return self.info.model_name if self.info is not None else ""

    @property
    def ready(self) -> bool:
        """Whether new sessions may be brought here."""
        return self.connected and not self.load.draining

    @property
    def trusted(self) -> bool:
        """False for a worker that failed lately; after a rest one call may try it."""
        return self.breaker.allows

    @property
    def idle(self) -> bool:
        """Whether nothing waits there, as far as is known."""
        return not self._pending and self.load.num_waiting == 0

    def give_up(self) -> None:
        """Let the stream of a worker that hangs go, and try to connect again.

        What waits there fails now and goes elsewhere, rather than each item after a deadline of
        its own.
        """
        if self.connected:
            self.connected = False
            self._given_up.set()

    def start(self) -> None:
        """Connect, and again whenever the connection breaks, until `close`."""
        self._task = asyncio.create_task(self._run(), name=f"{self.tier} link {self.address}")

    async def close(self) -> None:
        """End the stream; everything that waits fails with Unavailable."""
        await end_task(self._task)
        await self._channel.close()

    @abstractmethod
    async def _fetch_info(self, seconds: float) -> WorkerInfo:
        """Ask the worker what it is."""

    @abstractmethod
    def _open_stream(self) -> grpc.aio.StreamStreamCall[bytes, Any]:
        """Begin the stream, whose requests are written out already."""

    def _item_id(self) -> int:
        self._next_item_id += 1
        return self._next_item_id - 1

    def _send(
        self,
        frame: FrameT,
        item_id: int,
        session_id: str,
        convert: Callable[[Any], _Result],
        *,
        patient: bool = False,
    ) -> Answer[_Result]:
        """Queue a frame of one item, to leave in the next one; its result is the answer to come.

        An item that fails is answered by a typed error. One that is `patient` waits some time for
        company, in its place in the order.

        Raises:
            Unavailable: there is no connection.
            ResourceExhausted: too many items wait already.
            InvalidRequest: the item is larger than a frame may be.
        """
        if not self.connected:
            raise Unavailable(f"no connection to the {self.tier} worker at {self.address}")
        if len(self._pending) >= self._limits.max_pending:
            raise ResourceExhausted(
                f"{len(self._pending)} items wait for the {self.tier} worker at {self.address}",
                retry_after=1.0,
            )
        written = frame.SerializeToString()
        if len(written) > self._limits.max_frame_bytes:
            raise InvalidRequest(
                f"an item of {len(written)} bytes is larger than a frame may be "
                f"({self._limits.max_frame_bytes})"
            )
        answer: Answer[_Result] = Answer()
        self._pending[item_id] = (session_id, answer, convert)
        self._outbox.append(written)
        if patient:
            loop = asyncio.get_running_loop()
            loop.call_later(self._limits.patience_seconds, self._wake.set)
        else:
            self._wake.set()
        return answer

    async def _run(self) -> None:
        while True:
            try:
                await self._connect()
                await self._exchange()
            except (grpc.aio.AioRpcError, SpecinferError) as error:
                self._log_failure(error)
            except Exception:
                # Whatever a broken worker made of us, the link to it has to live on.
                log.exception("the link to the %s worker at %s broke", self.tier, self.address)
            finally:
                self.attempted.set()
            pause = min(self._limits.max_backoff, self._limits.min_backoff * 2**self._failures)
            self._failures = min(self._failures + 1, 16)
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))

    async def _connect(self) -> None:
        info = await self._fetch_info(self._limits.connect_timeout)
        try:
            self._check(info)
        except SpecinferError as error:
            self.refusal = error
            raise
        self.refusal = None
        self.info = info

    async def _exchange(self) -> None:
        """Carry frames both ways until the stream breaks, which is always an error."""
        call = self._open_stream()
        self._begin()
        tasks = [
            asyncio.create_task(self._read(call)),
            asyncio.create_task(self._write(call)),
            asyncio.create_task(self._watch()),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            done.pop().result()
        finally:
            self.connected = False
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            call.cancel()
            self._fail_pending()

    def _begin(self) -> None:
        # Until it has answered something, it is taken to be idle.
        self.load = WorkerLoad(num_free_blocks=self.info.num_blocks if self.info else 0)
        self.generation += 1
        self._outbox.clear()
        self._given_up.clear()
        self.connected = True
        log.info("%s worker at %s connected", self.tier, self.address)
        self.attempted.set()
        self._on_ready()

    async def _read(self, call: grpc.aio.StreamStreamCall[bytes, Any]) -> None:
        while True:
            frame = cast(Any, await call.read())
            if frame is grpc.aio.EOF:
                raise Unavailable(f"the {self.tier} worker at {self.address} ended the stream")
            if frame is None:  # what gRPC makes of bytes that are no message
                raise InternalError(
                    f"the {self.tier} worker at {self.address} sent a frame that cannot be read"
                )
            self._failures = 0
            self.heard = time.monotonic()
            self.load = load_from_wire(frame.load)
            for result in frame.results:
                self._settle(result)
            # Those who were answered go on before the next frame is asked for.
            await asyncio.sleep(0)

    async def _watch(self) -> None:
        await self._given_up.wait()
        raise Unavailable(f"the {self.tier} worker at {self.address} does not answer any more")

    async def _write(self, call: grpc.aio.StreamStreamCall[bytes, Any]) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._outbox:
                if self.num_seats > CROWD:
                    await filling(self._outbox)
                try:
                    await call.write(b"".join(self._take_items()))
                except asyncio.InvalidStateError as error:
                    raise Unavailable(f"the stream to {self.address} broke") from error

    def _take_items(self) -> list[bytes]:
        """Items for one frame, in order, within its bounds; at least one."""
        items = [self._outbox.popleft()]
        num_bytes = len(items[0])
        while self._outbox and len(items) < self._limits.max_frame_items:
            num_bytes += len(self._outbox[0])
            if num_bytes > self._limits.max_frame_bytes:
                break
            items.append(self._outbox.popleft())
        return items

    def _settle(self, result: Any) -> None:
        pending = self._pending.pop(result.item_id, None)
        if pending is None:
            log.warning("%s worker at %s answered an unknown item", self.tier, self.address)
            return
        session_id, answer, convert = pending
        try:
            if result.session_id != session_id:
                raise InternalError("a result for another session than its item's")
            error = status_error(result.status) if result.HasField("status") else None
            if error is not None:
                raise error
            value = convert(result)
        except SpecinferError as failure:
            answer.fail(failure)
        except Exception:
            # A fault of ours or a result that nobody foresaw: it is this item's alone.
            log.exception("a result of the %s worker at %s broke us", self.tier, self.address)
            answer.fail(InternalError(f"a result of the {self.tier} worker cannot be read"))
        else:
            answer.succeed(value)

    def _fail_pending(self) -> None:
        pending, self._pending = self._pending, {}
        for _, answer, _ in pending.values():
            answer.fail(
                Unavailable(f"the stream to the {self.tier} worker at {self.address} broke")
            )

    def _log_failure(self, error: grpc.aio.AioRpcError | SpecinferError) -> None:
        told = error if isinstance(error, SpecinferError) else error_from_rpc(error)
        # A worker that is not up yet is asked again and again; once is enough to say so.
        level = logging.DEBUG if self._failures else logging.WARNING
        log.log(level, "%s worker at %s: %s", self.tier, self.address, told.message)
