"""Logs and traces of a process: one call sets both up.

Neither ever holds a prompt or an output: callers give ids, numbers and names of our own. Importing
this needs nothing beyond the standard library; setting up needs the `serve` extra, and `tracing`
where spans are sent. This module knows nothing of what the services do.
"""

from __future__ import annotations

from typing import TextIO

from specinfer.telemetry.export import set_up_tracing
from specinfer.telemetry.traces import (
    CLIENT,
    INTERNAL,
    NO_SPAN,
    SERVER,
    AttributeValue,
    Span,
    Telemetry,
    TraceContext,
    TraceSettings,
    current_span,
)

__all__ = (
    "CLIENT",
    "INTERNAL",
    "NO_SPAN",
    "SERVER",
    "AttributeValue",
    "Span",
    "Telemetry",
    "TraceContext",
    "TraceSettings",
    "current_span",
    "set_up",
)


def set_up(
    service: str,
    *,
    level: str = "info",
    traces: TraceSettings | None = None,
    instance: str = "",
    stream: TextIO | None = None,
) -> Telemetry:
    """Send the process's logs to stderr and, where an endpoint is given, its spans to a collector.

    Args:
        service: name of the process, such as "specinfer-router".
        level: one of logs.LOG_LEVELS.
        traces: where spans go and how many; None makes none.
        instance: tells processes of one service apart, such as a worker's id; "" leaves it out.
        stream: where logs go instead of stderr.

    Raises:
        InvalidRequest: the level is none, or tracing is asked for and cannot be set up.
    """
    # The SDK imports this package without structlog.
    from specinfer.telemetry.logs import set_up_logs

    set_up_logs(service, level=level, stream=stream)
    if traces is None or not traces.endpoint:
        return Telemetry()
    return set_up_tracing(service, traces, instance=instance)
