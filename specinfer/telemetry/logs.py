"""Logs as one JSON object a line on stderr, made by structlog of the standard library's records.

No line holds a prompt or an output: messages of errors, which may quote what a caller sent, are
left out unless their kind cannot. Needs the `serve` extra. This module knows nothing of what the
services do.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import traceback
from collections.abc import MutableMapping
from types import TracebackType
from typing import Any, TextIO

import structlog
from structlog.types import EventDict

from specinfer.errors import InternalError, InvalidRequest, SpecinferError
from specinfer.telemetry.traces import current_span

LOG_LEVELS = ("debug", "info", "warning", "error")
MAX_FRAMES = 30
MAX_VALUE_LENGTH = 1_000
# Kinds whose messages are of the system and not of what somebody sent.
_OUR_MESSAGES = (OSError, MemoryError, ArithmeticError)
_IDENTITY = re.compile(r"[!-~]{1,128}")
_IDENTITIES = ("request_id", "session_id")


def bind_log(**identities: str) -> None:
    """Add ids to every later line of the running task; those that are no ids are left out.

    Args:
        identities: request_id, session_id and the like; "" is left out too.
    """
    fit = {name: value for name, value in identities.items() if _IDENTITY.fullmatch(value)}
    structlog.contextvars.bind_contextvars(**fit)


def loggable(error: SpecinferError) -> str:
    """What a line may say of an error of ours: its reason, and its message where that is ours too.

    What is said of a request that is at fault may quote it, and an internal error may quote
    anything.
    """
    if isinstance(error, InvalidRequest | InternalError):
        return error.reason
    return f"{error.reason}: {error.message[:MAX_VALUE_LENGTH]}"


def set_up_logs(service: str, *, level: str, stream: TextIO | None = None) -> None:
    """Send the process's logs to stderr.

    Libraries' own lines are kept from "warning" on only: what they tell of their work may be what
    our callers sent.

    Args:
        service: name of the process, such as "specinfer-router".
        level: one of LOG_LEVELS.
        stream: where logs go instead of stderr.

    Raises:
        InvalidRequest: the level is none.
    """
    if level not in LOG_LEVELS:
        raise InvalidRequest(f"log level {level!r} is none of {LOG_LEVELS}", field="log_level")
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.addFilter(_from_us_or_urgent)
    handler.setFormatter(_formatter(service))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())


def _from_us_or_urgent(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or record.name.startswith("specinfer")


def _formatter(service: str) -> logging.Formatter:
    def head(logger: Any, method: str, event: EventDict) -> EventDict:
        record: logging.LogRecord = event.pop("_record")
        event.pop("_from_structlog", None)
        first = {
            "time": event.pop("timestamp"),
            "level": record.levelname.lower(),
            "service": service,
            "logger": record.name,
            "message": event.pop("event"),
        }
        return {**first, **event}

    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[
            structlog.stdlib.ExtraAdder(),
            structlog.contextvars.merge_contextvars,
        ],
        processors=[
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            head,
            _add_trace,
            _checked_identities,
            _described_error,
            structlog.processors.JSONRenderer(json.dumps, default=str, ensure_ascii=False),
        ],
    )


def _add_trace(logger: Any, method: str, event: EventDict) -> EventDict:
    span = current_span()
    if span.trace_id:
        event["trace_id"], event["span_id"] = span.trace_id, span.span_id
    return event


def _checked_identities(logger: Any, method: str, event: EventDict) -> EventDict:
    """An id that came from outside is an id or it is not logged."""
    for name in _IDENTITIES:
        value = event.get(name)
        if value is not None and not _IDENTITY.fullmatch(str(value)):
            event[name] = "not an id"
    return event


def _described_error(
    logger: Any, method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """The exception of a record: its kind and where it rose, and its message where that is safe."""
    found = event.pop("exc_info", None)
    if isinstance(found, BaseException):
        found = (type(found), found, found.__traceback__)
    elif found is True:
        found = sys.exc_info()
    if found and found[1] is not None:
        event["exception"] = _description(found[1], found[2])
    return event


def _description(error: BaseException, trace: TracebackType | None) -> str:
    frames = traceback.extract_tb(trace)[-MAX_FRAMES:]
    lines = [f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in frames]
    kind = f"{type(error).__module__}.{type(error).__qualname__}"
    if isinstance(error, _OUR_MESSAGES):
        kind = f"{kind}: {str(error)[:MAX_VALUE_LENGTH]}"
    elif isinstance(error, SpecinferError):
        kind = f"{kind}: {error.reason}"
    return "\n".join([*lines, kind])
