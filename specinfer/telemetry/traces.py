"""Spans that cost next to nothing while nobody records them.

`Span` stands for a span of OpenTelemetry, or for none: code that is traced asks `current_span()`
and never whether tracing is on. A span that is not recorded has only children that are not either.
The current span belongs to the asyncio task or the thread. Baggage is neither read nor sent. This
module knows nothing of what is traced.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from specinfer.errors import InvalidRequest, SpecinferError

AttributeValue = str | bool | int | float | Sequence[str] | Sequence[int] | Sequence[float]
Attributes = Mapping[str, AttributeValue]

INTERNAL, SERVER, CLIENT = "INTERNAL", "SERVER", "CLIENT"
# Key of our entry in W3C tracestate; "rounds" asks for the rounds of this trace as spans.
STATE_KEY, STATE_ROUNDS = "specinfer", "rounds"
FLUSH_SECONDS = 2.0

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")


@dataclass(frozen=True)
class TraceContext:
    """What a caller says of its trace, in the W3C format; empty when it says nothing.

    Attributes:
        traceparent: version, trace id, span id and flags.
        tracestate: what tracing systems add, ours among them.
        local: whether the parent is a span of this process.
    """

    traceparent: str = ""
    tracestate: str = ""
    local: bool = False

    @property
    def wants_rounds(self) -> bool:
        """Whether the caller asks for rounds as spans."""
        entries = self.tracestate.replace(" ", "").split(",")
        return f"{STATE_KEY}={STATE_ROUNDS}" in entries


@dataclass(frozen=True)
class TraceSettings:
    """Where spans go and which are recorded.

    Attributes:
        endpoint: address of an OTLP collector over gRPC, such as "http://127.0.0.1:4317", or
            https:// for TLS; "" records nothing.
        ratio: share of the traces begun here that are recorded; a caller's own decision stands.
        rounds: share of the recorded traces whose rounds are spans too.
    """

    endpoint: str = ""
    ratio: float = 1.0
    rounds: float = 0.0

    def __post_init__(self) -> None:
        for name in ("ratio", "rounds"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidRequest(f"trace_{name} is between 0 and 1", field=f"trace_{name}")
        if self.endpoint and not self.endpoint.startswith(("http://", "https://")):
            raise InvalidRequest(
                f"{self.endpoint!r} is no OTLP endpoint; one looks like http://127.0.0.1:4317",
                field="otlp_endpoint",
            )


class Span:
    """One span, or none. `with` makes it the current one of the block and ends it.

    Attributes:
        recording: whether anything of it is kept; ask before making costly attributes.
        traced: whether its trace is kept, here or by the caller.
        detailed: whether rounds are to be spans.
        trace_id: 32 hex digits, or "".
        span_id: 16 hex digits, or "".
        traceparent: what another process continues this trace from, or "".
        detail_parent: the same for processes whose part is of rounds; "" where those are summed up.
    """

    recording = False
    traced = False
    detailed = False
    trace_id = ""
    span_id = ""
    traceparent = ""
    detail_parent = ""

    def child(
        self,
        name: str,
        attributes: Attributes | None = None,
        *,
        kind: str = INTERNAL,
        links: Sequence[Span] = (),
        start_ns: int | None = None,
    ) -> Span:
        """A span below this one, begun now or at `start_ns` after 1970."""
        return self

    def rename(self, name: str) -> None:
        """Give it another name."""

    def set(self, attributes: Attributes) -> None:
        """Add or replace attributes."""

    def event(self, name: str, attributes: Attributes | None = None) -> None:
        """Note a moment; of too many the oldest go."""

    def fail(self, error: BaseException) -> None:
        """Note what went wrong, by its kind and never its text, which may quote a prompt."""

    def end(self, *, end_ns: int | None = None) -> None:
        """End it, now or at `end_ns` after 1970; again it does nothing."""

    def muted(self) -> Span:
        """Stands for this span where nothing below it is to be recorded; it keeps the ids."""
        return self

    def adopt(self) -> None:
        """Make it the current span of the running task from here on."""
        _current.set(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None


NO_SPAN = Span()
_current: ContextVar[Span] = ContextVar("specinfer_span", default=NO_SPAN)


def current_span() -> Span:
    """The span of the running task or thread, or NO_SPAN."""
    return _current.get()


class _MutedSpan(Span):
    """Only the ids of a span, and the moments noted below it."""

    def __init__(
        self, trace_id: str, span_id: str, *, traced: bool, above: Span | None = None
    ) -> None:
        self.trace_id = trace_id
        self.span_id = span_id
        self.traced = traced
        self.traceparent = f"00-{trace_id}-{span_id}-{traced:02x}"
        self._above = above

    def event(self, name: str, attributes: Attributes | None = None) -> None:
        """Note a moment, on the span that this one stands for."""
        if self._above is not None:
            self._above.event(name, attributes)


class _RecordedSpan(Span):
    """A span of OpenTelemetry."""

    recording = traced = True

    def __init__(self, library: Library, span: Any, *, detailed: bool) -> None:
        context = span.get_span_context()
        self.trace_id = f"{context.trace_id:032x}"
        self.span_id = f"{context.span_id:016x}"
        self.traceparent = f"00-{self.trace_id}-{self.span_id}-01"
        self.detailed = detailed
        self.detail_parent = self.traceparent if detailed else ""
        self._library = library
        self._span = span
        self._outer: Span = NO_SPAN

    def child(
        self,
        name: str,
        attributes: Attributes | None = None,
        *,
        kind: str = INTERNAL,
        links: Sequence[Span] = (),
        start_ns: int | None = None,
    ) -> Span:
        """A span below this one, begun now or at `start_ns` after 1970."""
        span = self._library.tracer.start_span(
            name,
            context=self._library.trace.set_span_in_context(self._span, self._library.nothing),
            kind=self._library.trace.SpanKind[kind],
            attributes=attributes,
            links=[self._library.trace.Link(link.context) for link in _recorded(links)],
            start_time=start_ns,
        )
        return _RecordedSpan(self._library, span, detailed=self.detailed)

    @property
    def context(self) -> Any:
        """OpenTelemetry's own name of this span."""
        return self._span.get_span_context()

    def rename(self, name: str) -> None:
        """Give it another name."""
        self._span.update_name(name)

    def set(self, attributes: Attributes) -> None:
        """Add or replace attributes."""
        self._span.set_attributes(attributes)

    def event(self, name: str, attributes: Attributes | None = None) -> None:
        """Note a moment; of too many the oldest go."""
        self._span.add_event(name, attributes)

    def fail(self, error: BaseException) -> None:
        """Note what went wrong, by its kind and never its text, which may quote a prompt."""
        reason = error.reason if isinstance(error, SpecinferError) else type(error).__name__
        self._span.set_attribute("error.type", reason)
        self._span.set_status(self._library.trace.StatusCode.ERROR)

    def end(self, *, end_ns: int | None = None) -> None:
        """End it, now or at `end_ns` after 1970; again it does nothing."""
        if self._span.is_recording():
            self._span.end(end_ns)

    def muted(self) -> Span:
        """Stands for this span where nothing below it is to be recorded; it keeps the ids."""
        return _MutedSpan(self.trace_id, self.span_id, traced=True, above=self)

    def __enter__(self) -> Self:
        self._outer = _current.get()
        _current.set(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # A generator may be closed in another task than it began in, whose span is none of ours.
        if _current.get() is self:
            _current.set(self._outer)
        # Who leaves a block early by being cancelled or closed has not failed.
        if isinstance(error, Exception):
            self.fail(error)
        self.end()


def _recorded(spans: Sequence[Span]) -> list[_RecordedSpan]:
    return [span for span in spans if isinstance(span, _RecordedSpan)]


@dataclass(frozen=True)
class Library:
    """OpenTelemetry, where it is installed and asked for.

    Attributes:
        trace: its module `opentelemetry.trace`.
        nothing: a context without parent and without baggage.
        propagator: reads and writes W3C trace context, and no baggage.
        tracer: makes spans.
    """

    trace: Any
    nothing: Any
    propagator: Any
    tracer: Any


@dataclass(frozen=True)
class Telemetry:
    """What `set_up` made of a process's traces; nothing is recorded without an endpoint."""

    library: Library | None = None
    provider: Any = None
    exporter: Any = None
    rounds: float = 0.0

    def span(
        self,
        name: str,
        attributes: Attributes | None = None,
        *,
        kind: str = SERVER,
        parent: TraceContext | None = None,
        detailed: bool = False,
    ) -> Span:
        """A span that goes on with a caller's trace, or begins one; whoever starts it ends it.

        Args:
            name: of the operation, bounded in number.
            attributes: known at the start.
            kind: INTERNAL, SERVER or CLIENT.
            parent: where the caller's trace stands; whether it is recorded is the caller's say.
            detailed: record rounds as spans too; so do a caller's tracestate and the settings.
        """
        library, parent = self.library, parent or TraceContext()
        if library is None:
            return _remote(parent)
        carrier = {"traceparent": parent.traceparent, "tracestate": parent.tracestate}
        span = library.tracer.start_span(
            name,
            context=library.propagator.extract(carrier, context=library.nothing),
            kind=library.trace.SpanKind[kind],
            attributes=attributes,
        )
        context = span.get_span_context()
        trace_id = context.trace_id
        if not span.is_recording():
            return _MutedSpan(f"{trace_id:032x}", f"{context.span_id:016x}", traced=False)
        detailed = detailed or parent.wants_rounds or _in_share(trace_id, self.rounds)
        return _RecordedSpan(library, span, detailed=detailed)

    @staticmethod
    def trace_id_of(span: Span) -> str:
        """Trace id where the trace is kept, for exemplars; "" otherwise."""
        return span.trace_id if span.traced else ""

    def shut_down(self) -> None:
        """Send what has not been sent yet, for FLUSH_SECONDS at most."""
        if self.provider is None:
            return
        # OpenTelemetry's own flush takes as long as the collector lets it.
        flush = threading.Thread(target=self.provider.shutdown, daemon=True)
        flush.start()
        flush.join(FLUSH_SECONDS)
        if flush.is_alive():
            self.exporter.shutdown()


def _remote(parent: TraceContext) -> Span:
    """Only the ids of a caller's trace, for logs and exemplars."""
    found = _TRACEPARENT.fullmatch(parent.traceparent)
    if found is None:
        return NO_SPAN
    trace_id, span_id, flags = found.groups()
    return _MutedSpan(trace_id, span_id, traced=bool(int(flags, 16) & 1))


def _in_share(trace_id: int, share: float) -> bool:
    """Whether a trace is among a share of all; equal at every process that is asked."""
    return (trace_id & 0xFFFFFFFFFFFFFFFF) < share * 2**64
