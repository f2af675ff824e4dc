"""The SDK's span of a call, for applications that trace themselves with OpenTelemetry.

The SDK does not depend on OpenTelemetry: an application that traces has imported it, and in one
that has not there is nothing to do. Baggage is not sent. This module knows nothing of the wire.
"""

from __future__ import annotations

import sys
from typing import Any

from specinfer.errors import SpecinferError
from specinfer.messages import Finished, GenerateRequest, ResumeRequest, Started
from specinfer.telemetry.generation import (
    finished_attributes,
    operation_of,
    request_attributes,
    started_attributes,
)
from specinfer.unix_sockets import socket_path

_LIBRARY = "opentelemetry.trace"


class ClientTrace:
    """One CLIENT span from the first attempt to the end, or nothing."""

    def __init__(self) -> None:
        self._span: Any = None

    def begin(self, request: GenerateRequest | ResumeRequest, address: str) -> None:
        """Start the span below the application's current one; again it does nothing.

        Args:
            request: what is asked for.
            address: the first router's, as the application gave it.
        """
        library: Any = sys.modules.get(_LIBRARY)
        if library is None or self._span is not None:
            return
        model = "" if isinstance(request, ResumeRequest) else request.model
        attributes = request_attributes(request, model)
        host, _, port = address.rpartition(":")
        path = socket_path(address)
        attributes["server.address"] = str(path) if path else host.rpartition("/")[2] or address
        if port.isdecimal():
            attributes["server.port"] = int(port)
        operation = operation_of(request)
        self._span = library.get_tracer("specinfer").start_span(
            f"{operation} {model}" if model else operation,
            kind=library.SpanKind.CLIENT,
            attributes=attributes,
        )

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """W3C trace context of the span, for the router; empty without one."""
        context: Any = None if self._span is None else self._span.get_span_context()
        if context is None or not context.is_valid:
            return ()
        trace_id, span_id = f"{context.trace_id:032x}", f"{context.span_id:016x}"
        found = (("traceparent", f"00-{trace_id}-{span_id}-{int(context.trace_flags):02x}"),)
        state = context.trace_state.to_header()
        return (*found, ("tracestate", state)) if state else found

    def started(self, started: Started) -> None:
        """Note that the router has begun."""
        if self._span is not None:
            self._span.set_attributes(started_attributes(started))

    def again(self, error: SpecinferError, num_tokens: int) -> None:
        """Note that the call is made once more, after so many tokens."""
        if self._span is not None:
            attributes = {"error.type": error.reason, "specinfer.resume.offset": num_tokens}
            self._span.add_event("resume" if num_tokens else "retry", attributes)

    def end(self, finished: Finished | None = None, error: SpecinferError | None = None) -> None:
        """End the span: with what came, with what went wrong, or left early; again does nothing."""
        if self._span is None or not self._span.is_recording():
            return
        if finished is not None:
            self._span.set_attributes(finished_attributes(finished))
        if error is not None:
            # By its kind: an error's text may quote a prompt.
            self._span.set_attribute("error.type", error.reason)
            self._span.set_status(sys.modules[_LIBRARY].StatusCode.ERROR)
        self._span.end()
