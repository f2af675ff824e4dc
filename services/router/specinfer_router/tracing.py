"""A request's span and log lines: what they say, and where they become those of its task.

This module knows nothing of how requests are served.
"""

from __future__ import annotations

import logging
import time

from specinfer.messages import (
    GenerateEvent,
    GenerateRequest,
    ResumeRequest,
    RoundFacts,
    Started,
    TokensEvent,
)
from specinfer.telemetry import (
    INTERNAL,
    SERVER,
    AttributeValue,
    Span,
    Telemetry,
    TraceContext,
    current_span,
)
from specinfer.telemetry.generation import (
    finished_attributes,
    operation_of,
    request_attributes,
    round_attributes,
    started_attributes,
)
from specinfer.telemetry.logs import bind_log
from specinfer.unix_sockets import socket_path
from specinfer_router.request_log import RequestLogEntry

log = logging.getLogger(__name__)


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


class RequestTrace:
    """What a request's events add to its span and log lines, in the task that makes them."""

    def __init__(self, span: Span, request_id: str) -> None:
        self._span = span
        self._request_id = request_id
        self._waiting = True

    def begin(self) -> None:
        """Let the running task log and trace under the request's span from here on."""
        self._span.adopt()
        bind_log(request_id=self._request_id)

    def saw(self, event: GenerateEvent) -> None:
        """Note an event that was made."""
        if isinstance(event, TokensEvent):
            if self._waiting:
                self._span.event("first tokens")
                self._waiting = False
        elif isinstance(event, Started):
            bind_log(session_id=event.session_id)
            self._span.set(started_attributes(event))
        else:
            self._span.set(finished_attributes(event))


def request_ended(span: Span, entry: RequestLogEntry) -> None:
    """End a request's span, and write the one line that every request leaves."""
    span.set({"specinfer.outcome": entry.outcome})
    span.end()
    ids = {"request_id": entry.request_id}
    if entry.session_id:
        ids["session_id"] = entry.session_id
    # This is the reader's task, whose span may be another one.
    if span.trace_id:
        ids |= {"trace_id": span.trace_id, "span_id": span.span_id}
    seconds = round(entry.total_seconds, 6)
    log.info("request ended", extra={**ids, "outcome": entry.outcome, "seconds": seconds})


def trace_queue(seconds: float) -> None:
    """Draw the wait for a place that has just ended."""
    now = time.time_ns()
    span = current_span()
    if span.recording:
        span.child("queue", start_ns=now - round(1e9 * seconds)).end(end_ns=now)


class SessionTrace:
    """What a session's rounds add to the current span: spans where it is detailed, else sums."""

    def __init__(self) -> None:
        self._span = current_span()
        self._rounds = self._span if self._span.detailed else self._span.muted()
        self._rounds.adopt()
        self._drafter = self._verifier = ""
        self._num_moves = 0

    def round(self) -> Span:
        """The span of a round, as a block; silence below it where rounds are summed up."""
        return self._rounds.child("round")

    def asked_drafter(self, span: Span, worker: str, *, hedged: bool) -> None:
        """Note who guessed.

        Args:
            span: of asking.
            worker: address, or "" when nobody answered.
            hedged: whether a second drafter was asked too.
        """
        self._drafter = worker or self._drafter
        if span.recording:
            span.set({"specinfer.hedged": hedged, **_place(worker)})

    def asked_verifier(self, span: Span, worker: str) -> None:
        """Note who verified, and that the session has moved where it is somebody else."""
        if worker != self._verifier:
            if self._verifier:
                self._num_moves += 1
                self._span.event("moved", {"specinfer.verifier": worker})
            self._verifier = worker
        if span.recording:
            span.set(_place(worker))

    def told(self, span: Span, facts: RoundFacts) -> None:
        """Note what a round did."""
        if span.recording:
            span.set(round_attributes(facts))

    def end(self) -> None:
        """Sum up; what comes later is the span's own again."""
        self._span.adopt()
        if self._span.recording:
            self._span.set(
                {
                    "specinfer.drafter": self._drafter,
                    "specinfer.verifier": self._verifier,
                    "specinfer.moves": self._num_moves,
                }
            )


def _place(address: str) -> dict[str, AttributeValue]:
    path = socket_path(address)
    if path is not None:
        return {"server.address": str(path)}
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        return {}
    return {"server.address": host.strip("[]"), "server.port": int(port)}
