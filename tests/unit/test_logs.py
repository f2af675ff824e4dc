"""Logs are one JSON object a line, with ids and without what callers sent."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from contextvars import copy_context
from typing import Any

import pytest

from specinfer.errors import InvalidRequest, Unavailable
from specinfer.telemetry import Telemetry, TraceContext, set_up
from specinfer.telemetry.logs import bind_log

log = logging.getLogger("specinfer.unit")
PARENT = TraceContext("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield io.StringIO()
    root.handlers[:] = handlers
    root.setLevel(level)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_is_json_with_its_extras(stream: io.StringIO) -> None:
    set_up("unit", level="info", stream=stream)
    log.info("served %d", 3, extra={"request_id": "mine"})
    log.debug("not shown")
    (line,) = lines(stream)
    assert line.pop("time").endswith("Z")
    assert list(line.items()) == [
        ("level", "info"),
        ("service", "unit"),
        ("logger", "specinfer.unit"),
        ("message", "served 3"),
        ("request_id", "mine"),
    ]


def test_an_exception_stays_on_its_line_without_what_it_says(stream: io.StringIO) -> None:
    set_up("unit", stream=stream)
    try:
        raise ValueError("a prompt\nperhaps")
    except ValueError:
        log.exception("failed")
    try:
        raise InvalidRequest("stop string 'a prompt' is none", field="stop")
    except InvalidRequest as error:
        log.error("failed", exc_info=error)
    assert "a prompt" not in stream.getvalue()
    first, second = [line["exception"].splitlines() for line in lines(stream)]
    assert __file__ in first[0]
    assert first[-1] == "builtins.ValueError"
    assert second[-1] == "specinfer.errors.InvalidRequest: INVALID_REQUEST"


def test_what_the_system_says_is_logged(stream: io.StringIO) -> None:
    set_up("unit", stream=stream)
    log.error("failed", exc_info=ConnectionRefusedError(111, "Connection refused"))
    (line,) = lines(stream)
    assert "Connection refused" in line["exception"]


def test_libraries_are_heard_when_they_warn(stream: io.StringIO) -> None:
    set_up("unit", level="debug", stream=stream)
    logging.getLogger("library").info("POST a prompt")
    logging.getLogger("library").warning("slow")
    log.debug("ours")
    assert [line["message"] for line in lines(stream)] == ["slow", "ours"]


def test_setting_up_twice_writes_each_line_once(stream: io.StringIO) -> None:
    set_up("unit", stream=stream)
    set_up("unit", stream=stream)
    log.warning("once")
    assert len(lines(stream)) == 1


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="log level"):
        set_up("unit", level="loud")


def test_ids_are_on_every_line_of_a_task_and_of_no_other(stream: io.StringIO) -> None:
    set_up("unit", stream=stream)

    async def serve(name: str, begun: asyncio.Event, other: asyncio.Event) -> None:
        bind_log(request_id=name, session_id=f"session-{name}")
        Telemetry().span("chat", parent=PARENT).adopt()
        begun.set()
        await other.wait()
        log.warning("served")

    async def both() -> None:
        first, second = asyncio.Event(), asyncio.Event()
        await asyncio.gather(serve("a", first, second), serve("b", second, first))
        log.warning("outside")

    copy_context().run(asyncio.run, both())
    *served, outside = lines(stream)
    assert {(line["request_id"], line["session_id"]) for line in served} == {
        ("a", "session-a"),
        ("b", "session-b"),
    }
    for line in served:
        assert f"00-{line['trace_id']}-{line['span_id']}-01" == PARENT.traceparent
    assert "request_id" not in outside
    assert "trace_id" not in outside


@pytest.mark.parametrize("bad", ["two words", "new\nline", 'a","level":"error', "x" * 129, "é"])
def test_what_is_no_id_does_not_reach_a_line(stream: io.StringIO, bad: str) -> None:
    set_up("unit", stream=stream)

    def write() -> None:
        bind_log(request_id=bad)
        log.warning("bound")
        log.warning("given", extra={"request_id": bad})

    copy_context().run(write)
    bound, given = lines(stream)
    if bad == 'a","level":"error':
        # Visible characters are an id; JSON keeps them in their place.
        assert (bound["request_id"], bound["level"]) == (bad, "warning")
        return
    assert "request_id" not in bound
    assert given["request_id"] == "not an id"


def test_an_error_of_ours_is_named_by_its_reason(stream: io.StringIO) -> None:
    set_up("unit", stream=stream)
    log.warning("lost", exc_info=Unavailable("gone"))
    assert lines(stream)[0]["exception"].endswith("Unavailable: UNAVAILABLE")
