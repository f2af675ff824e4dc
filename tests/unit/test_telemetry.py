"""Logs are one JSON object a line; spans exist only when asked for."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from specinfer.errors import InvalidRequest
from specinfer.telemetry import Telemetry, set_up


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield io.StringIO()
    root.handlers[:] = handlers
    root.setLevel(level)


def test_a_line_is_json_with_its_extras(stream: io.StringIO) -> None:
    set_up("unit", level="info", stream=stream)
    logging.getLogger("a.b").info("served %d", 3, extra={"request_id": "mine"})
    logging.getLogger("a.b").debug("not shown")
    (line,) = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert line["time"] > 0
    del line["time"]
    assert line == {
        "level": "info",
        "service": "unit",
        "logger": "a.b",
        "message": "served 3",
        "request_id": "mine",
    }


def test_an_exception_stays_on_its_line(stream: io.StringIO) -> None:
    set_up("unit", stream=stream)
    try:
        raise ValueError("what went\nwrong")
    except ValueError:
        logging.getLogger().exception("failed")
    (line,) = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert "what went\nwrong" in line["exception"]


def test_setting_up_twice_writes_each_line_once(stream: io.StringIO) -> None:
    set_up("unit", stream=stream)
    set_up("unit", stream=stream)
    logging.getLogger().warning("once")
    assert len(stream.getvalue().splitlines()) == 1


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="log level"):
        set_up("unit", level="loud")


def test_without_an_endpoint_a_span_is_nothing() -> None:
    telemetry = Telemetry()
    with telemetry.span("generate", request_id="mine"):
        pass
    telemetry.shut_down()


class Tracer:
    """Remembers its spans; stands for OpenTelemetry's."""

    def __init__(self) -> None:
        self.spans: list[dict[str, Any]] = []

    def start_span(self, name: str, attributes: dict[str, Any]) -> Any:
        found: dict[str, Any] = {"name": name, "attributes": attributes, "errors": []}
        self.spans.append(found)

        class Span:
            def record_exception(self, error: Exception) -> None:
                found["errors"].append(error)

            def end(self) -> None:
                found["ended"] = True

        return Span()


def test_a_span_ends_with_its_block_and_keeps_its_error() -> None:
    tracer = Tracer()
    with Telemetry(tracer).span("generate", request_id="mine"):
        pass
    with pytest.raises(ValueError, match="no"), Telemetry(tracer).span("generate"):
        raise ValueError("no")
    fine, failed = tracer.spans
    assert fine == {
        "name": "generate",
        "attributes": {"request_id": "mine"},
        "errors": [],
        "ended": True,
    }
    assert [str(error) for error in failed["errors"]] == ["no"]


def test_tracing_that_is_not_installed_says_what_to_install(stream: io.StringIO) -> None:
    if importlib.util.find_spec("opentelemetry") is not None:
        pytest.skip("OpenTelemetry is installed")
    with pytest.raises(InvalidRequest, match="opentelemetry-exporter-otlp"):
        set_up("unit", otlp_endpoint="http://127.0.0.1:4317", stream=stream)
