"""Logs and traces of a process: one call sets both up.

Logs are one JSON object a line on stderr. Spans leave the process only when an OTLP endpoint is
given. Neither ever holds a prompt or an output; callers log ids and numbers. This module knows
nothing of what the services do.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO

from specinfer.errors import InvalidRequest

LOG_LEVELS = ("debug", "info", "warning", "error")


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, service, logger, message, and `extra` fields."""

    _STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        """The line of one record."""
        line: dict[str, Any] = {
            "time": round(record.created, 6),
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {key: value for key, value in vars(record).items() if key not in self._STANDARD}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


@dataclass(frozen=True)
class Telemetry:
    """What `set_up` made; `span` costs next to nothing without an endpoint."""

    tracer: Any = None
    provider: Any = None

    @contextmanager
    def span(self, name: str, **attributes: str | int | float | bool) -> Iterator[None]:
        """A span around a block; an error that leaves the block is recorded on it."""
        if self.tracer is None:
            yield
            return
        # Not made the current span: a generator may be closed in another task than it began in.
        span = self.tracer.start_span(name, attributes=attributes)
        try:
            yield
        except Exception as error:
            span.record_exception(error)
            raise
        finally:
            span.end()

    def shut_down(self) -> None:
        """Send what has not been sent yet."""
        if self.provider is not None:
            self.provider.shutdown()


def set_up(
    service: str, *, level: str = "info", otlp_endpoint: str = "", stream: TextIO | None = None
) -> Telemetry:
    """Send the process's logs to stderr and, with an endpoint, its spans to a collector.

    Args:
        service: name of the process, such as "specinfer-router".
        level: one of LOG_LEVELS.
        otlp_endpoint: gRPC address of an OTLP collector, such as "http://127.0.0.1:4317".
        stream: where logs go instead of stderr.

    Raises:
        InvalidRequest: the level is none, or tracing is asked for and not installed.
    """
    if level not in LOG_LEVELS:
        raise InvalidRequest(f"log level {level!r} is none of {LOG_LEVELS}", field="log_level")
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(service))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    return _set_up_tracing(service, otlp_endpoint) if otlp_endpoint else Telemetry()


def _set_up_tracing(service: str, endpoint: str) -> Telemetry:
    try:
        exporters = importlib.import_module("opentelemetry.exporter.otlp.proto.grpc.trace_exporter")
        sdk = importlib.import_module("opentelemetry.sdk.trace")
        export = importlib.import_module("opentelemetry.sdk.trace.export")
        resources = importlib.import_module("opentelemetry.sdk.resources")
    except ImportError as error:
        raise InvalidRequest(
            "tracing needs the package opentelemetry-exporter-otlp-proto-grpc; "
            "install it or leave the endpoint out",
            field="otlp_endpoint",
        ) from error
    resource = resources.Resource.create({"service.name": service})
    provider = sdk.TracerProvider(resource=resource)
    exporter = exporters.OTLPSpanExporter(endpoint=endpoint, insecure=True)
    provider.add_span_processor(export.BatchSpanProcessor(exporter))
    return Telemetry(provider.get_tracer("specinfer"), provider)
