"""A client's way to its routers: channels, credentials, and calls with our messages and errors.

The only module of the SDK that speaks gRPC calls. It picks the router of each call and says whether
a failed one is to be made again; it knows nothing of what a stream's events add up to.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import grpc.aio

from specinfer.convert import (
    capabilities_from_wire,
    event_from_wire,
    report_from_wire,
    request_to_wire,
    resume_to_wire,
)
from specinfer.credentials import Credentials
from specinfer.errors import (
    ClientClosed,
    InvalidRequest,
    NotFound,
    SpecinferError,
    Unauthenticated,
    Unavailable,
)
from specinfer.messages import (
    Capabilities,
    GenerateEvent,
    GenerateRequest,
    RequestReport,
    ResumeRequest,
)
from specinfer.multiplex.client import SharedStream, StreamRefused, begin_call
from specinfer.retry import Attempts, RetryPolicy
from specinfer.rpc import (
    RESUMES,
    RESUMES_KEY,
    TlsSettings,
    call_error,
    open_channel,
)
from specinfer.v1 import router_pb2, router_pb2_grpc

# A router that has not answered within this is not waited for while there are others.
CONNECT_STAGGER_SECONDS = 0.25
MAX_ADDRESSES = 16
# A router that refused a shared stream is not asked for one for so long: it may be too old.
REFUSED_SECONDS = 60.0

_Message = TypeVar("_Message")
_Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class CallLimits:
    """How long a call may take, in seconds; None waits as long as it takes.

    Attributes:
        timeout: the whole call with its retries.
        attempt_timeout: one attempt's silence: until the answer, or between a stream's events.
    """

    timeout: float | None = None
    attempt_timeout: float | None = None


@dataclass(frozen=True)
class ConnectionOptions:
    """How the routers are reached; see AsyncClient."""

    addresses: tuple[str, ...]
    retry: RetryPolicy
    tls: TlsSettings | None
    credentials: Credentials
    interceptors: tuple[grpc.aio.ClientInterceptor, ...] = ()
    multiplex: bool = False


class EventCall:
    """One stream of a router's events; forgetting it gives the call up. Made on the call's loop.

    Args:
        call: a gRPC call, or one on a shared stream.
        router: index of the router that was asked.
        silence: seconds for which nothing may come, or None.
        on_silence: called when nothing came for so long.

    Attributes:
        router: as given.
    """

    def __init__(
        self,
        call: Any,
        router: int,
        silence: float | None,
        on_silence: Callable[[], None] | None = None,
    ) -> None:
        self.router = router
        self._call = call
        self._silence = silence
        self._on_silence = on_silence
        # gRPC itself keeps a call that nobody reads any more.
        self._forgotten = weakref.finalize(self, _give_up, asyncio.get_running_loop(), call)
        self._forgotten.atexit = False

    async def read(self) -> GenerateEvent | None:
        """The next event of a kind that we know; None at the end. Raises the router's errors, and
        Unavailable when nothing came for too long or the connection broke."""
        while True:
            try:
                async with asyncio.timeout(self._silence):
                    wire = await self._call.read()
            except TimeoutError:
                self.cancel()
                if self._on_silence is not None:
                    self._on_silence()
                raise _silent(self._silence) from None
            except grpc.aio.AioRpcError as error:
                raise call_error(error) from None
            if wire is grpc.aio.EOF:
                self._forgotten.detach()
                return None
            event = wire.event if isinstance(wire, router_pb2.ResumeResponse) else wire
            # A newer router may send kinds of events that this version has no use for.
            if event.WhichOneof("event") is not None:
                return event_from_wire(event)

    def cancel(self) -> None:
        """Give the call up; the router stops generating."""
        self._forgotten.detach()
        self._call.cancel()


def _give_up(loop: asyncio.AbstractEventLoop, call: Any) -> None:
    """Cancel a call from whatever thread has let go of it last."""
    with suppress(RuntimeError):  # the loop has ended, and its calls with it
        loop.call_soon_threadsafe(call.cancel)


class Connection:
    """Channels to one or several routers that serve the same cluster; opened when first used."""

    def __init__(self, options: ConnectionOptions) -> None:
        self._options = options
        self._channels: dict[int, grpc.aio.Channel] = {}
        # By router: who calls, and the stream that their calls share.
        self._shared: dict[int, tuple[_Metadata, SharedStream]] = {}
        self._streams: weakref.WeakSet[SharedStream] = weakref.WeakSet()
        # By router: when it took no such stream, by time.monotonic().
        self._refused: dict[int, float] = {}
        self._preferred = 0
        self._chance = random.Random()
        self._closed = False

    @property
    def first_address(self) -> str:
        """Address of the first router."""
        return self._options.addresses[0]

    @property
    def regenerates(self) -> bool:
        """Whether what the store has lost is asked for anew."""
        return self._options.retry.regenerate

    @property
    def opened(self) -> bool:
        """Whether any channel was opened."""
        return bool(self._channels)

    async def close(self) -> None:
        """Cancel what is under way and close the channels."""
        self._closed = True
        await asyncio.gather(*(stream.close() for stream in self._streams))
        channels, self._channels = self._channels, {}
        await asyncio.gather(*(channel.close(None) for channel in channels.values()))

    def check_open(self) -> None:
        """Raise ClientClosed after `close`."""
        if self._closed:
            raise ClientClosed("this client was closed")

    def check_not_closed_meanwhile(self, request_id: str = "") -> None:
        """Raise ClientClosed when a call ended because of `close`."""
        # gRPC reports a closed channel as a cancelled task; only a cancelled task is one.
        task = asyncio.current_task()
        if self._closed and (task is None or not task.cancelling()):
            raise ClientClosed(
                "the client was closed during the call", request_id=request_id
            ) from None

    def attempts(self, timeout: float | None) -> Attempts:
        """The attempts of one request; its clock starts now."""
        return Attempts(self._options.retry, timeout, self._chance)

    async def again(self, error: SpecinferError, attempts: Attempts, router: int | None) -> None:
        """Return when a failed call is due again, here or elsewhere; raises `error` when not."""
        if isinstance(error, StreamRefused) and router is not None:
            # At once, as a call of its own, which meets whatever else there was to meet.
            self._refused[router] = time.monotonic()
            return
        if isinstance(error, Unauthenticated) and self._options.credentials.renewable:
            if attempts.renew():
                return
            raise error
        if isinstance(error, Unavailable) and router == self._preferred:
            self._preferred = (self._preferred + 1) % len(self._options.addresses)
        await attempts.wait_or_raise(error, len(self._options.addresses) - 1)

    async def open_stream(
        self,
        request: GenerateRequest | ResumeRequest,
        attempts: Attempts,
        silence: float | None,
        trace: _Metadata = (),
    ) -> EventCall:
        """Begin to generate, or to resume, within the W3C context `trace`.

        Raises what a token provider raises.
        """
        caller = await self._options.credentials.metadata()
        router = await self._pick()
        left = attempts.remaining()
        if self._options.multiplex and not self._refuses_streams(router):
            begin = begin_call(request, left, trace, resumes=self._options.retry.hands_over)
            shared = self._shared_stream(router, caller)
            return EventCall(shared.begin(begin), router, silence, shared.retire)
        metadata = (*trace, *_identity(request.request_id), *caller)
        if self._options.retry.hands_over:
            metadata = (*metadata, (RESUMES_KEY, RESUMES))
        stub = self._stub(router)
        if isinstance(request, GenerateRequest):
            wire = request_to_wire(request)
            return EventCall(stub.Generate(wire, timeout=left, metadata=metadata), router, silence)
        resume = resume_to_wire(request)
        return EventCall(stub.Resume(resume, timeout=left, metadata=metadata), router, silence)

    def _refuses_streams(self, router: int) -> bool:
        """Whether a router took no shared stream lately."""
        return self._refused.get(router, -math.inf) + REFUSED_SECONDS > time.monotonic()

    def _shared_stream(self, router: int, caller: _Metadata) -> SharedStream:
        """The stream that new calls of a router share."""
        known, stream = self._shared.get(router, (caller, None))
        # The stream says who calls, so that a new token needs a new one.
        if stream is None or stream.full or known != caller:
            stream = SharedStream(self._stub(router).Multiplex(metadata=caller))
            self._shared[router] = (caller, stream)
            self._streams.add(stream)
        return stream

    async def capabilities(self, limits: CallLimits) -> Capabilities:
        """What the cluster accepts."""
        message = router_pb2.GetCapabilitiesRequest()
        return capabilities_from_wire(
            await self._ask(lambda stub: stub.GetCapabilities, message, limits)
        )

    async def cancel(self, session_id: str, limits: CallLimits) -> None:
        """End a session for good."""
        message = router_pb2.CancelRequest(session_id=session_id)
        await self._ask(lambda stub: stub.Cancel, message, limits)

    async def explain(self, request_id: str, limits: CallLimits) -> RequestReport:
        """Where a request's time went; asks every router, for only the one that ran it knows."""
        message = router_pb2.ExplainRequest(request_id=request_id)
        failure: SpecinferError | None = None
        for router in range(len(self._options.addresses)):
            try:
                wire = await self._ask(lambda stub: stub.Explain, message, limits, router)
                return report_from_wire(wire)
            except (NotFound, Unavailable) as error:
                # A router that cannot be asked may be the one that knows.
                if failure is None or isinstance(error, Unavailable):
                    failure = error
        raise failure or NotFound("a client has at least one address")

    async def _ask(
        self,
        method: Callable[[Any], grpc.aio.UnaryUnaryMultiCallable[Any, _Message]],
        message: Any,
        limits: CallLimits,
        only: int | None = None,
    ) -> _Message:
        """Ask a router, or the `only` one that is to be asked, until it answers."""
        attempts = self.attempts(limits.timeout)
        while True:
            self.check_open()
            router = only
            metadata = await self._options.credentials.metadata()
            try:
                router = await self._pick() if only is None else only
                left = attempts.remaining()
                call = method(self._stub(router))(message, timeout=left, metadata=metadata)
                async with asyncio.timeout(limits.attempt_timeout):
                    return await call
            except TimeoutError:
                await self._once_more(_silent(limits.attempt_timeout), attempts, router, only)
            except grpc.aio.AioRpcError as error:
                await self._once_more(call_error(error), attempts, router, only)
            except asyncio.CancelledError:
                self.check_not_closed_meanwhile()
                raise

    async def _once_more(
        self, error: SpecinferError, attempts: Attempts, router: int | None, only: int | None
    ) -> None:
        if only is None or isinstance(error, Unauthenticated):
            await self.again(error, attempts, router)
        else:
            await attempts.wait_or_raise(error)

    async def _pick(self) -> int:
        """The router of the next call: the first, from the preferred one on, that is connected.

        Each has a moment to connect before the next one is tried as well, so that a machine that
        is gone costs that moment and not a connection's timeout.
        """
        count = len(self._options.addresses)
        if count == 1:
            return 0
        first = self._preferred
        for step in range(count):
            router = (first + step) % count
            if await _connected(self._channel(router), CONNECT_STAGGER_SECONDS):
                self._preferred = router
                return router
        return self._preferred

    def _stub(self, router: int) -> router_pb2_grpc.GenerationServiceAsyncStub:
        return router_pb2_grpc.GenerationServiceStub(self._channel(router))

    def _channel(self, router: int) -> grpc.aio.Channel:
        self.check_open()
        if router not in self._channels:
            self._channels[router] = open_channel(
                self._options.addresses[router],
                tls=self._options.tls,
                interceptors=self._options.interceptors,
            )
        return self._channels[router]


async def _connected(channel: grpc.aio.Channel, seconds: float) -> bool:
    """Whether a channel is ready, or gets so within `seconds`; failing ends the wait."""
    state = channel.get_state(try_to_connect=True)
    try:
        async with asyncio.timeout(seconds):
            while state in (grpc.ChannelConnectivity.IDLE, grpc.ChannelConnectivity.CONNECTING):
                await channel.wait_for_state_change(state)
                state = channel.get_state(try_to_connect=True)
    except (TimeoutError, grpc.aio.UsageError):
        # The latter: the client was closed meanwhile.
        return False
    return state is grpc.ChannelConnectivity.READY


def _identity(request_id: str) -> _Metadata:
    # The id joins the router's log lines even where a request cannot be read.
    return (("x-request-id", request_id),) if request_id else ()


def _silent(seconds: float | None) -> Unavailable:
    return Unavailable(f"nothing came from the router for {seconds} seconds (attempt_timeout)")


def check_addresses(address: str | Sequence[str]) -> tuple[str, ...]:
    """The addresses of one router or of several; raises InvalidRequest for what is neither."""
    given: Any = address
    addresses = (given,) if isinstance(given, str) or not isinstance(given, Sequence) else given
    good = all(isinstance(one, str) and one for one in addresses)
    if not good or not 1 <= len(addresses) <= MAX_ADDRESSES:
        raise InvalidRequest(
            f"address is host:port, or 1 to {MAX_ADDRESSES} of them, got {address!r}",
            field="address",
        )
    return tuple(dict.fromkeys(addresses))
