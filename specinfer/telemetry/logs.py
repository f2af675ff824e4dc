"""Logs as one JSON object a line on stderr, of the standard library's records.

structlog keeps the ids that belong to a task.
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
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, TextIO

import structlog

from specinfer.errors import InternalError, InvalidRequest, SpecinferError
from specinfer.telemetry.traces import current_span

LOG_LEVELS = ("debug", "info", "warning", "error")
MAX_FRAMES = 30
MAX_VALUE_LENGTH = 1_000
# Kinds whose messages are of the system and not of what somebody sent.
_OUR_MESSAGES = (OSError, MemoryError, ArithmeticError)
_IDENTITY = re.compile(r"[!-~]{1,128}")
_IDENTITIES = ("request_id", "session_id")
# What every record has; whatever else one has was given with it.
_OF_A_RECORD = frozenset(vars(logging.makeLogRecord({})))


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
    handler.setFormatter(_Lines(service))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())


def _from_us_or_urgent(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or record.name.startswith("specinfer")


class _Lines(logging.Formatter):
    """One JSON object of a record: what it is, what was given with it, and whose task wrote it.

    Written here because structlog's formatter takes three times as long, at every request.
    """

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service
        self._encode = json.JSONEncoder(default=str, ensure_ascii=False).encode

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds")
        line: dict[str, Any] = {
            "time": when.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: given for name, given in vars(record).items() if name not in _OF_A_RECORD}
        for name, value in structlog.contextvars.get_contextvars().items():
            line.setdefault(name, value)
        span = current_span()
        if span.trace_id:
            line["trace_id"], line["span_id"] = span.trace_id, span.span_id
        _check_identities(line)
        if record.exc_info and record.exc_info[1] is not None:
            line["exception"] = _description(record.exc_info[1], record.exc_info[2])
        return self._encode(line)


def _check_identities(line: dict[str, Any]) -> None:
    """An id that came from outside is an id or it is not logged."""
    for name in _IDENTITIES:
        value = line.get(name)
        if value is not None and not _IDENTITY.fullmatch(str(value)):
            line[name] = "not an id"


def _description(error: BaseException, trace: TracebackType | None) -> str:
    frames = traceback.extract_tb(trace)[-MAX_FRAMES:]
    lines = [f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in frames]
    kind = f"{type(error).__module__}.{type(error).__qualname__}"
    if isinstance(error, _OUR_MESSAGES):
        kind = f"{kind}: {str(error)[:MAX_VALUE_LENGTH]}"
    elif isinstance(error, SpecinferError):
        kind = f"{kind}: {error.reason}"
    return "\n".join([*lines, kind])
