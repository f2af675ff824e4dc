"""The fake router's server: the real protocol, on a thread of its own.

It checks, records and translates; what is answered is in `script.py`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from functools import partial
from types import TracebackType
from typing import Any, NoReturn, Self, cast

import grpc
import grpc.aio

from specinfer.convert import (
    capabilities_to_wire,
    event_to_wire,
    report_to_wire,
    request_from_wire,
    resume_from_wire,
)
from specinfer.errors import InvalidRequest, SpecinferError, Unauthenticated, Unavailable
from specinfer.messages import Capabilities, GenerateEvent, GenerateRequest
from specinfer.multiplex.server import CallReader, ServedStream
from specinfer.rpc import (
    RESUMES,
    RESUMES_KEY,
    SERVER_OPTIONS,
    TlsSettings,
    error_metadata,
    error_text,
    status_code,
)
from specinfer.sync_client import LoopThread
from specinfer.testing.script import (
    FakeReply,
    FakeStore,
    fake_capabilities,
    open_session,
    play,
    report_of,
)
from specinfer.v1 import router_pb2, router_pb2_grpc

Answer = str | FakeReply
Answers = Answer | Sequence[Answer] | Callable[[GenerateRequest], Answer]


class FakeRouter(router_pb2_grpc.GenerationServiceServicer):
    """Serves what a test scripts, from `with` to its end, on a thread of its own.

    Attributes:
        address: host and port, once it serves.
        requests: every request to generate, in the order of arrival.
        resumed: session and offset of every request to resume.
        cancelled_sessions: sessions that were cancelled for good.
        metadata: of every call to generate or resume.
        cancelled: set once a caller has left a stream early.
    """

    def __init__(
        self,
        answers: Answers = "",
        *,
        capabilities: Capabilities | None = None,
        api_keys: Sequence[str] = (),
        store: FakeStore | None = None,
        address: str = "127.0.0.1:0",
        tls: TlsSettings | None = None,
    ) -> None:
        """Take down what to answer.

        Args:
            answers: a text or FakeReply for every request; or several, one for each call in turn,
                the last one for all that follow; or a function of the request.
            capabilities: what the cluster says of itself; None takes `fake_capabilities()`.
            api_keys: keys that calls have to carry one of; empty asks for none.
            store: where sessions are kept; give several fakes the same one to resume across them.
            address: where to listen; port 0 takes a free one.
            tls: certificates to serve with; None speaks plain text.
        """
        self.address = address
        self.capabilities = capabilities
        self.requests: list[GenerateRequest] = []
        self.resumed: list[tuple[str, int]] = []
        self.cancelled_sessions: list[str] = []
        self.metadata: list[dict[str, str]] = []
        self.cancelled = threading.Event()
        self._answers = answers
        self._api_keys = tuple(api_keys)
        self._tls = tls
        self._store = store or FakeStore()
        self._loop: LoopThread | None = None
        self._server: grpc.aio.Server | None = None

    def __enter__(self) -> Self:
        self._loop = LoopThread()
        try:
            self.address = self._loop.run(self._serve())
        except BaseException:
            self._loop.stop(self._stop())
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cut off what is under way and end the server; closing again does nothing."""
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.stop(self._stop())

    async def _serve(self) -> str:
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        host, _, _ = self.address.rpartition(":")
        if self._tls is None:
            port = self._server.add_insecure_port(self.address)
        else:
            port = self._server.add_secure_port(self.address, self._tls.server_credentials())
        router_pb2_grpc.add_GenerationServiceServicer_to_server(self, self._server)
        await self._server.start()
        return f"{host}:{port}"

    async def _stop(self) -> None:
        if self._server is not None:
            await self._server.stop(0)

    async def Generate(
        self, request: router_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[router_pb2.GenerateResponse]:
        """Answer one request."""
        try:
            self._check(_metadata(context))
            parsed = request_from_wire(request)
            self.requests.append(parsed)
            self.metadata.append(_metadata(context))
            async for event in self.events(parsed):
                yield event_to_wire(event)
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise
        except (SpecinferError, ConnectionResetError) as error:
            await _abort(context, error)

    async def Resume(
        self, request: router_pb2.ResumeRequest, context: Any
    ) -> AsyncIterator[router_pb2.ResumeResponse]:
        """Go on with a session."""
        try:
            self._check(_metadata(context))
            parsed = resume_from_wire(request)
            self.resumed.append((parsed.session_id, parsed.offset))
            self.metadata.append(_metadata(context))
            async for event in self.resumed_events(parsed.session_id, parsed.offset):
                yield router_pb2.ResumeResponse(event=event_to_wire(event))
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise
        except (SpecinferError, ConnectionResetError) as error:
            await _abort(context, error)

    async def Multiplex(
        self, request_iterator: AsyncIterator[router_pb2.MultiplexRequest], context: Any
    ) -> AsyncIterator[router_pb2.MultiplexResponse]:
        """Answer the calls of a shared stream."""
        stream = ServedStream(partial(self._shared_call, _metadata(context)))
        async with aclosing(stream.frames(request_iterator)) as frames:
            async for frame in frames:
                yield frame

    async def _shared_call(
        self, metadata: dict[str, str], begin: router_pb2.BeginCall, reader: CallReader
    ) -> None:
        """Answer one call of a shared stream, whose metadata stands for the call's own."""
        self._check(metadata)
        said = {"traceparent": begin.traceparent, "tracestate": begin.tracestate}
        said["x-request-id"] = begin.generate.request_id or begin.resume.request_id
        said[RESUMES_KEY] = RESUMES if begin.resumes else ""
        self.metadata.append(metadata | {name: value for name, value in said.items() if value})
        try:
            if begin.HasField("resume"):
                resume = resume_from_wire(begin.resume)
                self.resumed.append((resume.session_id, resume.offset))
                events = self.resumed_events(resume.session_id, resume.offset)
            else:
                request = request_from_wire(begin.generate)
                self.requests.append(request)
                events = self.events(request)
            async with aclosing(cast(AsyncGenerator[GenerateEvent, None], events)) as told:
                async for event in told:
                    await reader.room()
                    reader.put(event)
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise
        except ConnectionResetError as error:
            raise Unavailable("Socket closed") from error

    async def Cancel(
        self, request: router_pb2.CancelRequest, context: Any
    ) -> router_pb2.CancelResponse:
        """End a session."""
        try:
            self._check(_metadata(context))
            self._store.find(request.session_id).outcome = "cancelled"
            self.cancelled_sessions.append(request.session_id)
        except SpecinferError as error:
            await _abort(context, error)
        return router_pb2.CancelResponse()

    async def Explain(
        self, request: router_pb2.ExplainRequest, context: Any
    ) -> router_pb2.ExplainResponse:
        """Report a request's rounds, with made-up times."""
        try:
            self._check(_metadata(context))
            return report_to_wire(report_of(self._store.find(request.request_id)))
        except SpecinferError as error:
            await _abort(context, error)

    async def GetCapabilities(
        self, request: router_pb2.GetCapabilitiesRequest, context: Any
    ) -> router_pb2.GetCapabilitiesResponse:
        """Say what was scripted."""
        try:
            self._check(_metadata(context))
            return capabilities_to_wire(await self.tell_capabilities())
        except SpecinferError as error:
            await _abort(context, error)

    async def tell_capabilities(self) -> Capabilities:
        """What the cluster says of itself: override this to fail."""
        return self.capabilities or fake_capabilities()

    async def events(self, request: GenerateRequest) -> AsyncIterator[GenerateEvent]:
        """The events of a request: override this where the scripts are not enough."""
        session = open_session(request, self._next_reply(request), len(self.requests))
        self._store.add(session)
        async for event in play(session, 0):
            yield event

    async def resumed_events(self, session_id: str, offset: int) -> AsyncIterator[GenerateEvent]:
        """The events of a session from a token offset on."""
        session = self._store.find(session_id)
        if offset > len(session.words):
            raise InvalidRequest(
                f"offset {offset} is beyond the session's {len(session.words)} tokens",
                field="offset",
            )
        async for event in play(session, offset):
            yield event

    def _next_reply(self, request: GenerateRequest) -> FakeReply:
        answers = self._answers
        answer: Any
        if callable(answers):
            answer = answers(request)
        elif isinstance(answers, str | FakeReply):
            answer = answers
        else:
            answer = answers[min(len(self.requests), len(answers)) - 1]
        return FakeReply(answer) if isinstance(answer, str) else answer

    def _check(self, metadata: dict[str, str]) -> None:
        if not self._api_keys:
            return
        given = metadata.get("authorization", "")
        if not given.startswith("Bearer ") or given[len("Bearer ") :] not in self._api_keys:
            raise Unauthenticated("this call needs a key that is known")


def _metadata(context: Any) -> dict[str, str]:
    return {str(key): str(value) for key, value in context.invocation_metadata() or ()}


async def _abort(context: Any, error: SpecinferError | ConnectionResetError) -> NoReturn:
    if isinstance(error, ConnectionResetError):
        # What a caller sees of a connection that breaks: a status without our details.
        await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
        raise AssertionError("abort returns to nobody")
    context.set_trailing_metadata(error_metadata(error))
    await context.abort(status_code(error), error_text(error))
    raise AssertionError("abort returns to nobody")
