"""A request's span and log lines: what they say, and where they become those of its task.

This module knows nothing of how requests are served.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from specinfer.messages import (
    Finished,
    GenerateEvent,
    GenerateRequest,
    ResumeRequest,
    Started,
    TokensEvent,
)
from specinfer.telemetry import INTERNAL, SERVER, Span, Telemetry, TraceContext, current_span
from specinfer.telemetry.generation import (
    finished_attributes,
    operation_of,
    request_attributes,
    started_attributes,
)
from specinfer.telemetry.logs import bind_log


def request_span(
    telemetry: Telemetry,
    model: str,
    request: GenerateRequest | ResumeRequest,
    trace: TraceContext,
    *,
    detailed: bool,
) -> Span:
    """The span of a request, for whoever serves it to end.

    Args:
        telemetry: of this process.
        model: served name.
        request: with its id.
        trace: what the caller says of its trace; below our own HTTP span it is an internal one.
        detailed: whether the request asks for the detail of its rounds.
    """
    return telemetry.span(
        f"{operation_of(request)} {model}",
        request_attributes(request, model),
        kind=INTERNAL if trace.local else SERVER,
        parent=trace,
        detailed=detailed,
    )


async def traced(
    source: AsyncGenerator[GenerateEvent, None], span: Span, request_id: str
) -> AsyncGenerator[GenerateEvent, None]:
    """The events of `source`, whose task logs and traces under `span` from here on."""
    span.adopt()
    bind_log(request_id=request_id)
    waiting = True
    async with aclosing(source) as events:
        async for event in events:
            if isinstance(event, Started):
                bind_log(session_id=event.session_id)
                span.set(started_attributes(event))
            elif isinstance(event, Finished):
                span.set(finished_attributes(event))
            elif waiting and isinstance(event, TokensEvent):
                span.event("first tokens")
                waiting = False
            yield event


def trace_queue(seconds: float) -> None:
    """Draw the wait for a place that has just ended."""
    now = time.time_ns()
    span = current_span()
    if span.recording:
        span.child("queue", start_ns=now - round(1e9 * seconds)).end(end_ns=now)
