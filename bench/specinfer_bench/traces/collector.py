"""A real OTLP/gRPC receiver that keeps the spans it is sent, and spans put together as trees.

Needs the `dev` extra. This module knows nothing of what sends them.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc.aio
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1 import common_pb2
from opentelemetry.proto.trace.v1 import trace_pb2


@dataclass(frozen=True)
class ReceivedSpan:
    """A span as it came over the wire.

    Attributes:
        start: nanoseconds after 1970.
        end: nanoseconds after 1970.
        events: when, name and attributes.
        links: span ids.
    """

    service: str
    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    start: int
    end: int
    attributes: dict[str, Any]
    events: tuple[tuple[int, str, dict[str, Any]], ...]
    links: tuple[str, ...]
    failed: bool


@dataclass
class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes spans in; safe from any thread.

    Attributes:
        gate: cleared, exports are not answered until it is set again.
    """

    spans: list[ReceivedSpan] = field(default_factory=list)
    endpoint: str = ""
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    num_exports: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    async def Export(self, request: Any, context: Any) -> Any:
        """Keep a batch."""
        self.num_exports += 1
        await self.gate.wait()
        self.spans += received(request)
        self.arrived.set()
        return trace_service_pb2.ExportTraceServiceResponse()

    async def wait_for(self, enough: Callable[[Sequence[ReceivedSpan]], bool]) -> None:
        """Return once the spans that came are enough; fails after a while."""
        async with asyncio.timeout(20):
            while not enough(self.spans):
                self.arrived.clear()
                await self.arrived.wait()

    async def named(self, name: str, number: int = 1) -> list[ReceivedSpan]:
        """The spans of a name, once there are so many."""
        await self.wait_for(lambda spans: sum(span.name == name for span in spans) >= number)
        return [span for span in self.spans if span.name == name]

    def trace(self, trace_id: str) -> list[ReceivedSpan]:
        """The spans of one trace so far."""
        return [span for span in self.spans if span.trace_id == trace_id]


@asynccontextmanager
async def running_collector(
    credentials: grpc.ServerCredentials | None = None,
) -> AsyncIterator[Collector]:
    """A receiver on a free port, over TLS where there are credentials."""
    collector = Collector()
    collector.gate.set()
    server = grpc.aio.server()
    add: Any = trace_service_pb2_grpc.add_TraceServiceServicer_to_server
    add(collector, server)
    if credentials is None:
        collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    else:
        port = server.add_secure_port("localhost:0", credentials)
        collector.endpoint = f"https://localhost:{port}"
    await server.start()
    try:
        yield collector
    finally:
        collector.gate.set()
        await server.stop(None)


def received(request: Any) -> Iterator[ReceivedSpan]:
    """The spans of one export."""
    for resource in request.resource_spans:
        service = _values(resource.resource.attributes).get("service.name", "")
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield ReceivedSpan(
                    service=service,
                    name=span.name,
                    kind=trace_pb2.Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent_id=span.parent_span_id.hex(),
                    start=span.start_time_unix_nano,
                    end=span.end_time_unix_nano,
                    attributes=_values(span.attributes),
                    events=tuple(
                        (event.time_unix_nano, event.name, _values(event.attributes))
                        for event in span.events
                    ),
                    links=tuple(link.span_id.hex() for link in span.links),
                    failed=span.status.code == trace_pb2.Status.STATUS_CODE_ERROR,
                )


def roots_of(spans: Sequence[ReceivedSpan]) -> list[ReceivedSpan]:
    """Spans whose parent is not among them, in the order in which they began."""
    known = {span.span_id for span in spans}
    return _in_order(span for span in spans if span.parent_id not in known)


def children_of(parent: ReceivedSpan, spans: Sequence[ReceivedSpan]) -> list[ReceivedSpan]:
    """The spans below one, in the order in which they began."""
    return _in_order(span for span in spans if span.parent_id == parent.span_id)


def tree_of(spans: Sequence[ReceivedSpan]) -> list[str]:
    """One line a span: service, name and kind, indented below its parent."""
    lines: list[str] = []

    def add(span: ReceivedSpan, depth: int) -> None:
        lines.append("  " * depth + f"{span.service}: {span.name} {span.kind}")
        for child in children_of(span, spans):
            add(child, depth + 1)

    for root in roots_of(spans):
        add(root, 0)
    return lines


def _in_order(spans: Iterable[ReceivedSpan]) -> list[ReceivedSpan]:
    return sorted(spans, key=lambda span: (span.start, span.end))


def _values(attributes: Iterable[common_pb2.KeyValue]) -> dict[str, Any]:
    return {attribute.key: _value(attribute.value) for attribute in attributes}


def _value(value: common_pb2.AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(one) for one in value.array_value.values]
    return None if kind is None else getattr(value, kind)
