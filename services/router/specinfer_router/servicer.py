"""The public gRPC service: checks, calls, translates.

Everything else happens in `router.py`. This module knows nothing of workers, trees or text.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

from specinfer.convert import (
    capabilities_to_wire,
    event_to_wire,
    report_to_wire,
    request_from_wire,
    resume_from_wire,
)
from specinfer.errors import InvalidRequest, SpecinferError
from specinfer.messages import GenerateRequest, ResumeRequest
from specinfer.multiplex.server import CallReader, ServedStream
from specinfer.rpc import RESUMES, RESUMES_KEY
from specinfer.server import RpcServer
from specinfer.telemetry import TraceContext
from specinfer.v1 import router_pb2, router_pb2_grpc
from specinfer_router.access import Caller
from specinfer_router.keys.control import AccessControl, bearer_token
from specinfer_router.router import Router

SERVICE = router_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name


class GenerationServicer(router_pb2_grpc.GenerationServiceServicer):
    """Streams generations to users."""

    def __init__(self, router: Router, access: AccessControl) -> None:
        self._router = router
        self._access = access

    async def Generate(
        self, request: router_pb2.GenerateRequest, context: Any
    ) -> AsyncGenerator[router_pb2.GenerateResponse, None]:
        """Stream one request's events; the caller's leaving cancels it."""
        try:
            caller = self._caller(context)
            parsed = request_from_wire(request)
        except SpecinferError as error:
            error.request_id = request.request_id
            raise
        async with aclosing(self._router.generate(parsed, caller)) as events:
            async for event in events:
                yield event_to_wire(event)

    async def Resume(
        self, request: router_pb2.ResumeRequest, context: Any
    ) -> AsyncGenerator[router_pb2.ResumeResponse, None]:
        """Stream the rest of a session's events."""
        caller = self._caller(context)
        async with aclosing(self._router.resume(resume_from_wire(request), caller)) as events:
            async for event in events:
                yield router_pb2.ResumeResponse(event=event_to_wire(event))

    async def Multiplex(
        self, request_iterator: AsyncIterator[router_pb2.MultiplexRequest], context: Any
    ) -> AsyncGenerator[router_pb2.MultiplexResponse, None]:
        """Stream the events of all calls that the caller makes; its leaving cancels them all."""
        stream, refusal = ServedStream(partial(self._serve, context)), None
        try:
            self._caller(context)
        except SpecinferError as error:
            # Told of the calls of one frame first: a client that is writing does not learn why a
            # stream is refused (grpc/grpc#36066).
            refusal, request_iterator = error, _first(request_iterator)
        async with aclosing(stream.frames(request_iterator)) as frames:
            async for frame in frames:
                yield frame
        if refusal is not None:
            raise refusal

    async def _serve(self, context: Any, begin: router_pb2.BeginCall, reader: CallReader) -> None:
        """Serve one call of a shared stream."""
        request: GenerateRequest | ResumeRequest
        try:
            # For each call: a key may be withdrawn meanwhile.
            caller = replace(
                self._caller(context),
                seconds_left=begin.timeout_seconds if begin.HasField("timeout_seconds") else None,
                resumes=begin.resumes,
                trace=TraceContext(begin.traceparent, begin.tracestate),
            )
            kind = begin.WhichOneof("request")
            if kind is None:
                raise InvalidRequest("a call generates or resumes", field="request")
            if kind == "resume":
                request = resume_from_wire(begin.resume)
            else:
                request = request_from_wire(begin.generate)
        except SpecinferError as error:
            error.request_id = begin.generate.request_id or begin.resume.request_id
            raise
        await self._router.feed(request, reader, caller)

    async def Cancel(
        self, request: router_pb2.CancelRequest, context: Any
    ) -> router_pb2.CancelResponse:
        """End a session for good."""
        await self._router.cancel(request.session_id, self._caller(context))
        return router_pb2.CancelResponse()

    async def Explain(
        self, request: router_pb2.ExplainRequest, context: Any
    ) -> router_pb2.ExplainResponse:
        """Say where the time of a request went."""
        caller = self._caller(context)
        return report_to_wire(await self._router.explain(request.request_id, caller))

    async def GetCapabilities(
        self, request: router_pb2.GetCapabilitiesRequest, context: Any
    ) -> router_pb2.GetCapabilitiesResponse:
        """Say what this cluster accepts."""
        self._caller(context)
        return capabilities_to_wire(self._router.capabilities())

    def _caller(self, context: Any) -> Caller:
        """Who calls and how long they wait; raises Unauthenticated."""
        metadata = dict(context.invocation_metadata() or ())
        caller = self._access.authenticate(bearer_token(metadata.get("authorization")))
        trace = TraceContext(metadata.get("traceparent", ""), metadata.get("tracestate", ""))
        return replace(
            caller,
            seconds_left=context.time_remaining(),
            resumes=metadata.get(RESUMES_KEY) == RESUMES,
            trace=trace,
        )


async def _first(
    frames: AsyncIterator[router_pb2.MultiplexRequest],
) -> AsyncIterator[router_pb2.MultiplexRequest]:
    async for frame in frames:
        yield frame
        return


def add_generation(server: RpcServer, router: Router, access: AccessControl | None = None) -> None:
    """Let a server answer for a router, to those whom `access` lets in."""
    router_pb2_grpc.add_GenerationServiceServicer_to_server(
        GenerationServicer(router, access or AccessControl()), server.server
    )
