"""Spans reach a collector when there is one, and neither it nor its absence holds anything up."""

from __future__ import annotations

import asyncio
import builtins
import logging
import time
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from specinfer.errors import InvalidRequest, Unavailable
from specinfer.messages import DraftResult, VerifyResult
from specinfer.rpc import TlsSettings
from specinfer.telemetry import (
    NO_SPAN,
    Telemetry,
    TraceContext,
    TraceSettings,
    current_span,
)
from specinfer.telemetry.export import MAX_EVENTS, set_up_tracing
from specinfer.telemetry.traces import FLUSH_SECONDS
from specinfer.telemetry.work import trace_work
from specinfer.tree import TokenTree
from specinfer_bench.traces.collector import Collector, running_collector, tree_of
from tests.kit.certificates import make_certificates

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNSAMPLED = PARENT[:-1] + "0"


@pytest.fixture
async def collector() -> AsyncGenerator[Collector, None]:
    async with running_collector() as running:
        yield running


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """A collector that cannot be reached is complained of; not here."""
    logger = logging.getLogger("opentelemetry")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


async def sent(telemetry: Telemetry) -> None:
    """Let a process's spans reach the collector, which runs on this loop."""
    await asyncio.to_thread(telemetry.shut_down)


def test_without_an_endpoint_a_span_is_nothing() -> None:
    telemetry = Telemetry()
    with telemetry.span("chat", {"a": 1}) as span, span.child("round") as below:
        assert span is below is NO_SPAN
        below.event("moment")
        assert current_span() is NO_SPAN
    assert (span.trace_id, span.detail_parent, telemetry.trace_id_of(span)) == ("", "", "")
    telemetry.shut_down()


def test_without_an_endpoint_a_callers_trace_is_known_by_its_id() -> None:
    telemetry = Telemetry()
    span = telemetry.span("chat", parent=TraceContext(PARENT))
    assert not span.recording
    assert telemetry.trace_id_of(span) == "0af7651916cd43dd8448eb211c80319c"
    # A trace that the caller does not keep is no use as an example.
    assert telemetry.trace_id_of(telemetry.span("chat", parent=TraceContext(UNSAMPLED))) == ""
    assert telemetry.span("chat", parent=TraceContext("00-nonsense-01")) is NO_SPAN


async def test_a_span_arrives_with_what_was_noted(collector: Collector) -> None:
    telemetry = set_up_tracing("unit", TraceSettings(collector.endpoint), instance="one")
    with telemetry.span("chat", {"a": 1}, parent=TraceContext(PARENT)) as span:
        assert current_span() is span
        other = span.child("other")
        with span.child("round", kind="CLIENT", links=[other, NO_SPAN]) as below:
            below.set({"b": (1, 2)})
            below.event("moment", {"c": "d"})
        other.end()
    assert current_span() is NO_SPAN
    assert telemetry.trace_id_of(span) == span.trace_id == PARENT.split("-")[1]
    await sent(telemetry)
    root, *_ = await collector.named("chat")
    (child,) = await collector.named("round")
    assert (root.service, root.kind, root.parent_id) == ("unit", "SERVER", PARENT.split("-")[2])
    assert root.attributes == {"a": 1}
    assert (child.kind, child.parent_id, child.links) == ("CLIENT", root.span_id, (other.span_id,))
    assert child.attributes == {"b": [1, 2]}
    assert [event[1:] for event in child.events] == [("moment", {"c": "d"})]


async def test_an_error_is_noted_by_its_kind_alone(collector: Collector) -> None:
    telemetry = set_up_tracing("unit", TraceSettings(collector.endpoint))
    with pytest.raises(Unavailable), telemetry.span("ours"):
        raise Unavailable("marker")
    with pytest.raises(ValueError, match="marker"), telemetry.span("theirs"):
        raise ValueError("marker")
    with pytest.raises(asyncio.CancelledError), telemetry.span("left"):
        raise asyncio.CancelledError
    await sent(telemetry)
    (ours,), (theirs,), (left,) = [await collector.named(n) for n in ("ours", "theirs", "left")]
    assert (ours.failed, ours.attributes) == (True, {"error.type": "UNAVAILABLE"})
    assert (theirs.failed, theirs.attributes) == (True, {"error.type": "ValueError"})
    assert (left.failed, left.attributes) == (False, {})
    assert "marker" not in str(collector.spans)


@pytest.mark.parametrize(
    ("settings", "context", "recorded", "detailed"),
    [
        ({"ratio": 0.0}, TraceContext(), False, False),
        ({"ratio": 1.0}, TraceContext(), True, False),
        # The caller's decision stands, either way.
        ({"ratio": 0.0}, TraceContext(PARENT), True, False),
        ({"ratio": 1.0}, TraceContext(UNSAMPLED), False, False),
        ({"rounds": 1.0}, TraceContext(PARENT), True, True),
        ({}, TraceContext(PARENT, "other=1, specinfer=rounds"), True, True),
        ({}, TraceContext(PARENT, "specinfer=other"), True, False),
    ],
)
async def test_what_is_sampled(
    collector: Collector,
    settings: dict[str, float],
    context: TraceContext,
    recorded: bool,
    detailed: bool,
) -> None:
    telemetry = set_up_tracing("unit", TraceSettings(collector.endpoint, **settings))
    with telemetry.span("chat", parent=context) as span:
        assert (span.recording, span.detailed) == (recorded, detailed)
        assert span.child("round").recording is recorded
        assert span.detail_parent == (span.traceparent if detailed else "")
    await sent(telemetry)
    assert len(collector.spans) == (1 if recorded else 0)


async def test_a_share_of_traces_is_sampled_the_same_everywhere(collector: Collector) -> None:
    settings = TraceSettings(collector.endpoint, rounds=0.5)
    first, second = (set_up_tracing("unit", settings) for _ in range(2))
    agreed = [
        (
            first.span("a", parent=TraceContext(parent)).detailed,
            second.span("a", parent=TraceContext(parent)).detailed,
        )
        for parent in (
            f"00-{i * 0x9E3779B97F4A7C15 % 2**128:032x}-{1:016x}-01" for i in range(1, 99)
        )
    ]
    assert all(one == other for one, other in agreed)
    assert {one for one, _ in agreed} == {False, True}
    await asyncio.gather(sent(first), sent(second))


async def test_muted_only_moments_remain(collector: Collector) -> None:
    telemetry = set_up_tracing("unit", TraceSettings(collector.endpoint))
    with telemetry.span("chat") as span:
        muted = span.muted()
        with muted.child("round") as silent:
            silent.set({"lost": 1})
            silent.event("worker lost")
        assert (muted.trace_id, muted.detail_parent) == (span.trace_id, "")
        assert telemetry.trace_id_of(muted) == span.trace_id
    await sent(telemetry)
    (only,) = collector.spans
    assert only.attributes == {}
    assert [event[1:] for event in only.events] == [("worker lost", {})]


async def test_a_generator_closed_by_another_task_leaves_its_span_alone(
    collector: Collector,
) -> None:
    telemetry = set_up_tracing("unit", TraceSettings(collector.endpoint))

    async def generate() -> AsyncGenerator[int, None]:
        with telemetry.span("inner"):
            yield 1
            yield 2

    generator = generate()
    await asyncio.create_task(anext(generator))
    with telemetry.span("outer") as outer:
        await generator.aclose()
        assert current_span() is outer
    assert current_span() is NO_SPAN
    await sent(telemetry)
    (inner,) = await collector.named("inner")
    assert not inner.failed


async def test_moments_are_bounded(collector: Collector) -> None:
    telemetry = set_up_tracing("unit", TraceSettings(collector.endpoint))
    with telemetry.span("chat") as span:
        for _ in range(2 * MAX_EVENTS):
            span.event("moment")
    await sent(telemetry)
    assert len(collector.spans[0].events) == MAX_EVENTS


def test_a_collector_that_is_not_there_holds_nothing_up() -> None:
    telemetry = set_up_tracing("unit", TraceSettings("http://127.0.0.1:1"))
    start = time.monotonic()
    for _ in range(20_000):
        telemetry.span("chat").end()
    assert time.monotonic() - start < 20
    start = time.monotonic()
    telemetry.shut_down()
    assert time.monotonic() - start < FLUSH_SECONDS + 2


async def test_a_collector_that_hangs_holds_no_shutdown_up(collector: Collector) -> None:
    collector.gate.clear()
    telemetry = set_up_tracing("unit", TraceSettings(collector.endpoint))
    telemetry.span("chat").end()
    start = time.monotonic()
    await sent(telemetry)
    assert time.monotonic() - start < FLUSH_SECONDS + 2


async def test_an_https_endpoint_means_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = make_certificates(tmp_path)
    tls = TlsSettings(None, files.server.certificate, files.server.key)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_CERTIFICATE", str(files.ca))
    async with running_collector(tls.server_credentials()) as collector:
        telemetry = set_up_tracing("unit", TraceSettings(collector.endpoint))
        telemetry.span("chat").end()
        await sent(telemetry)
        assert [span.name for span in collector.spans] == ["chat"]
        plain = collector.endpoint.replace("https", "http")
        refused = set_up_tracing("unit", TraceSettings(plain))
        refused.span("plain").end()
        await sent(refused)
        assert len(collector.spans) == 1


@pytest.mark.parametrize(
    "changes",
    [{"ratio": 1.1}, {"rounds": -0.1}, {"endpoint": "127.0.0.1:4317"}, {"endpoint": "unix:///x"}],
)
def test_settings_that_are_none_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        TraceSettings(**changes)


def test_tracing_that_is_not_installed_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = builtins.__import__

    def missing(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(InvalidRequest, match="opentelemetry-exporter-otlp"):
        set_up_tracing("unit", TraceSettings("http://127.0.0.1:4317"))


@dataclass(frozen=True)
class Item:
    """What a worker is asked."""

    traceparent: str
    session_id: str = "session"
    epoch: int = 3


async def test_a_workers_part_is_its_queue_and_its_passes(collector: Collector) -> None:
    telemetry = set_up_tracing("worker", TraceSettings(collector.endpoint))
    results = {
        "draft propose": DraftResult(3, TokenTree((1, 2, 3), (-1, 0, 1)), 0.0, 0.0),
        "verify step": VerifyResult(4, (1,), (2, 3), num_rows=7, num_cached_tokens=16),
    }
    for name, result in results.items():
        future: Future[Any] = Future()
        trace_work(telemetry, name, Item(PARENT), future)
        future.set_result(result)
    failed: Future[Any] = Future()
    trace_work(telemetry, "verify open", Item(PARENT), failed)
    failed.set_exception(Unavailable("marker"))
    silent: Future[Any] = Future()
    trace_work(telemetry, "verify close", Item(""), silent)
    silent.set_result(None)
    await sent(telemetry)
    assert tree_of(collector.spans) == [
        "worker: draft propose SERVER",
        "  worker: queue INTERNAL",
        "  worker: passes INTERNAL",
        "worker: verify step SERVER",
        "  worker: queue INTERNAL",
        "  worker: passes INTERNAL",
        "worker: verify open SERVER",
    ]
    (draft,), (verify,) = [await collector.named(name) for name in results]
    about = {"specinfer.session.id": "session", "specinfer.epoch": 3}
    tree = {"specinfer.tree.nodes": 3, "specinfer.tree.depth": 2}
    assert draft.attributes == about | tree
    assert verify.attributes == about | {
        "specinfer.accepted_tokens": 1,
        "specinfer.cached_tokens": 16,
        "specinfer.pass.rows": 7,
    }
    assert {span.parent_id for span in collector.spans if span.kind == "SERVER"} == {
        PARENT.split("-")[2]
    }
