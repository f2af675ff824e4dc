"""A worker's part of a trace: one span for each item that a router traces in detail.

The queue and the passes are drawn from the times that the engine measured anyway, so an engine's
thread knows nothing of spans. This module knows nothing of what the items ask for.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import Any, Protocol

from specinfer.messages import DraftResult, VerifyResult
from specinfer.telemetry.traces import Attributes, Span, Telemetry, TraceContext


class TracedItem(Protocol):
    """What the items of both worker protocols have in common."""

    @property
    def session_id(self) -> str:
        """Session that it belongs to."""
        ...

    @property
    def epoch(self) -> int:
        """Epoch of the session."""
        ...

    @property
    def traceparent(self) -> str:
        """The router's span, or ""."""
        ...


def trace_work(telemetry: Telemetry, name: str, item: TracedItem, future: Future[Any]) -> None:
    """Follow an item from now until its future is done; nothing where the router does not ask.

    Args:
        telemetry: of this worker.
        name: of the span, such as "verify step".
        item: as it came.
        future: what the engine answers.
    """
    if not item.traceparent:
        return
    span = telemetry.span(
        name,
        {"specinfer.session.id": item.session_id, "specinfer.epoch": item.epoch},
        parent=TraceContext(item.traceparent),
    )
    if span.recording:
        began = time.time_ns()
        future.add_done_callback(lambda done: _end(span, began, done))


def _end(span: Span, began: int, done: Future[Any]) -> None:
    ended = time.time_ns()
    error = None if done.cancelled() else done.exception()
    if error is not None:
        span.fail(error)
    elif not done.cancelled():
        result = done.result()
        if isinstance(result, DraftResult | VerifyResult):
            span.set(_facts(result))
            _draw_times(span, began, ended, result)
    span.end(end_ns=ended)


def _draw_times(span: Span, began: int, ended: int, result: DraftResult | VerifyResult) -> None:
    """Waiting comes first and passes last; what lies between them are pauses between passes."""
    waited = min(began + round(1e9 * result.queue_seconds), ended)
    passes = max(ended - round(1e9 * result.compute_seconds), began)
    span.child("queue", start_ns=began).end(end_ns=min(waited, passes))
    span.child("passes", start_ns=passes).end(end_ns=ended)


def _facts(result: DraftResult | VerifyResult) -> Attributes:
    if isinstance(result, DraftResult):
        return {
            "specinfer.tree.nodes": len(result.tree),
            "specinfer.tree.depth": result.tree.max_depth,
        }
    return {
        "specinfer.accepted_tokens": len(result.accepted),
        "specinfer.cached_tokens": result.num_cached_tokens,
        "specinfer.pass.rows": result.num_rows,
    }
