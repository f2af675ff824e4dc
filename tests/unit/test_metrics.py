"""Metrics: names and bounds of the catalogue, exemplars, the workers' endpoint, and the cost."""

from __future__ import annotations

import asyncio
import re
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import chain

import httpx
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import parser

from specinfer.errors import InvalidRequest, SpecinferError, Unavailable
from specinfer.messages import DraftResult, RoundFacts, StepCost
from specinfer.metrics import MetricsServer, RouterMetrics, VerifyMetrics, expose, exposition
from specinfer.metrics.catalogue import CATALOGUE, OUTCOME
from specinfer.metrics.exposition import MAX_CONNECTIONS, MAX_HEAD_BYTES
from specinfer.metrics.instruments import Bound, Instruments
from specinfer.metrics.metric import OTHER, Kind, Label, Source
from specinfer.rpc import TlsSettings
from specinfer.telemetry import Span
from specinfer.tree import TokenTree
from specinfer_router.answer import Answer
from specinfer_router.tier_counts import TierCounts
from tests.kit.certificates import Certificates
from tests.kit.fake_workers import info_of
from tools.generate_metrics import TARGET, reference

NAME = re.compile(r"[a-z][a-z0-9_]*")
FACTS = RoundFacts(
    epoch=1,
    num_draft_tokens=12,
    num_accepted_tokens=3,
    draft_seconds=0.002,
    verify_seconds=0.01,
    queue_seconds=0.001,
    network_seconds=0.001,
    router_seconds=0.001,
    commit_seconds=0.0004,
    draft_depth=5,
)
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


class Traced(Span):
    """A span whose trace a collector has."""

    traced = True
    trace_id = "0af7651916cd43dd8448eb211c80319c"


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(f"specinfer_{name}", {"model_name": "tiny", **labels})


def test_names_are_prometheus_names_and_each_is_there_once() -> None:
    assert len({metric.name for metric in CATALOGUE}) == len(CATALOGUE)
    for metric in CATALOGUE:
        assert NAME.fullmatch(metric.name), metric.name
        assert not metric.name.endswith(("_total", "_count", "_sum", "_bucket"))
        assert metric.help.endswith("."), metric.name
        assert metric.sources
        assert (metric.kind is Kind.HISTOGRAM) == bool(metric.buckets), metric.name
        assert list(metric.buckets) == sorted(set(metric.buckets)), metric.name
        if metric.unit in ("seconds", "ratio"):
            assert metric.name.endswith((metric.unit, "vllm")) or "seconds" in metric.name


def test_every_label_is_bounded() -> None:
    for metric in CATALOGUE:
        num_series = 1
        for label in metric.labels:
            assert bool(label.values) != bool(label.most), f"{metric.name} {label.name}"
            num_series *= label.num_values
        assert num_series <= 1200, f"{metric.name} may have {num_series} series"


def test_every_error_is_an_outcome() -> None:
    def kinds(kind: type[SpecinferError]) -> Iterator[type[SpecinferError]]:
        yield kind
        yield from chain.from_iterable(map(kinds, kind.__subclasses__()))

    ours = {kind for kind in kinds(SpecinferError) if kind.__module__ == "specinfer.errors"}
    assert {kind.reason.lower() for kind in ours} <= set(OUTCOME.values)


def test_the_document_is_what_the_catalogue_says() -> None:
    assert TARGET.read_text(encoding="utf-8") == reference()


def test_unknown_values_are_other() -> None:
    known = Bound(Label("reason", ("a", "b")))
    assert [known("a"), known("c"), known("")] == ["a", OTHER, OTHER]
    first = Bound(Label("key", most=2))
    assert [first("x"), first("y"), first("z"), first("x")] == ["x", "y", OTHER, "x"]
    first.forget("x")
    assert [first("z"), first("x")] == ["z", OTHER]


def test_nobody_makes_series_at_will() -> None:
    registry = CollectorRegistry()
    metrics = RouterMetrics(registry, "tiny")
    for number in range(500):
        metrics.observe_admitted(f"key{number}", 0.0)
        metrics.observe_round(FACTS._replace(num_draft_tokens=0, root_only_reason=f"r{number}"), 1)
    families = {family.name: family for family in registry.collect()}
    keys = families["specinfer_key_requests"].samples
    assert len(keys) == 101
    assert value(registry, "key_requests_total", key="key99") == 1
    assert value(registry, "key_requests_total", key=OTHER) == 400
    assert value(registry, "root_only_rounds_total", reason=OTHER) == 500
    assert value(registry, "root_only_rounds_total", reason="no_drafter") == 0


def test_a_worker_that_left_is_not_shown_any_more() -> None:
    registry = CollectorRegistry()
    metrics = RouterMetrics(registry, "tiny")
    tree = TokenTree((1, 2, 3, 4), (-1, 0, 0, 1))
    for worker in ("a:1", "b:1"):
        metrics.observe_tree(tree, (1, 3), num_draft_nodes=4, drafter="d", worker=worker)
    metrics.worker_left("a:1")
    name = "drafter_accepted_tokens_total"
    assert value(registry, name, drafter="d", worker="a:1") is None
    assert value(registry, name, drafter="d", worker="b:1") == 2
    metrics.observe_tree(tree, (2,), num_draft_nodes=4, drafter="d", worker="a:1")
    assert value(registry, name, drafter="d", worker="a:1") == 1


def test_ranks_are_places_among_siblings() -> None:
    registry = CollectorRegistry()
    metrics = RouterMetrics(registry, "tiny")
    #            root: 1, 2, 3      below 2: 4, 5     below 5: 6
    tree = TokenTree((0, 1, 2, 3, 4, 5, 6), (-1, 0, 0, 0, 2, 2, 5))
    metrics.observe_tree(tree, (2, 5, 6), num_draft_nodes=6, drafter="d", worker="w")
    drafted = [
        value(registry, "spec_decode_num_draft_tokens_per_rank_total", rank=str(rank))
        for rank in range(4)
    ]
    accepted = [
        value(registry, "spec_decode_num_accepted_tokens_per_rank_total", rank=str(rank))
        for rank in range(4)
    ]
    assert drafted == [3, 2, 1, 0]
    assert accepted == [1, 2, 0, 0]
    assert value(registry, "drafter_accepted_tokens_total", drafter="d", worker="w") == 2
    assert value(registry, "drafter_accepted_tokens_total", drafter="prediction", worker="") == 1


def test_a_metric_that_is_not_in_the_catalogue_is_refused() -> None:
    instruments = Instruments(CollectorRegistry(), Source.VERIFY, {})
    for name in ("nothing", "requests", "step_seconds"):
        with pytest.raises(KeyError):
            instruments.counter(name)


def test_times_carry_traces_for_who_asks_for_openmetrics() -> None:
    registry = CollectorRegistry()
    metrics = RouterMetrics(registry, "tiny")
    metrics.observe_request("stop", 0.2, Traced())
    metrics.observe_request("stop", 7.0, Span())
    parse: Callable[[str], Iterable[Metric]] = parser.text_string_to_metric_families
    text, kind = expose(registry, OPENMETRICS)
    assert kind.startswith("application/openmetrics-text")
    exemplars = [
        (sample.labels["le"], sample.exemplar.labels)
        for family in parse(text.decode())
        for sample in family.samples
        if sample.exemplar is not None
    ]
    assert exemplars == [("0.25", {"trace_id": Traced.trace_id})]
    plain, kind = expose(registry)
    assert kind.startswith("text/plain")
    assert b"trace_id" not in plain


def test_a_pass_is_compared_with_what_it_was_measured_to_cost() -> None:
    registry = CollectorRegistry()
    info = replace(
        info_of("verify"),
        model_name="tiny",
        step_costs=(StepCost(1, 8, 0.01), StepCost(9, 8, 0.05)),
    )
    metrics = VerifyMetrics(registry, info)
    metrics.observe_pass(0.06, num_sessions=2, num_prefill=0, num_roots=2, num_rows=5)
    assert value(registry, "step_cost_ratio_sum", tier="verify") == pytest.approx(2.0)
    assert value(registry, "rows_total", tier="verify", kind="guess") == 3


def test_counting_costs_microseconds() -> None:
    metrics = RouterMetrics(CollectorRegistry(), "tiny")
    worker = VerifyMetrics(CollectorRegistry(), info_of("verify"))
    tree = TokenTree(tuple(range(13)), (-1, 0, 0, 0, 1, 1, 2, 4, 4, 5, 7, 7, 8))

    def count_round() -> None:
        metrics.observe_round(FACTS, 4)
        metrics.observe_tree(tree, (1, 4, 7), num_draft_nodes=13, drafter="d", worker="w")

    def count_pass() -> None:
        worker.observe_pass(0.01, num_sessions=8, num_prefill=0, num_roots=8, num_rows=100)

    # Measured 25 and 6 microseconds on a busy machine; the bounds leave room for a busier one.
    assert fastest(count_round) < 400e-6
    assert fastest(count_pass) < 80e-6


def fastest(count: Callable[[], None]) -> float:
    """Seconds of one call, in the best of some batches."""
    times = []
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(50):
            count()
        times.append((time.perf_counter() - start) / 50)
    return min(times)


@pytest.fixture
async def server() -> AsyncIterator[MetricsServer]:
    registry = CollectorRegistry()
    RouterMetrics(registry, "tiny")
    serving = MetricsServer("127.0.0.1:0", registry)
    await serving.start()
    yield serving
    await serving.stop()


async def test_the_endpoint_shows_metrics_and_nothing_else(server: MetricsServer) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as client:
        plain = await client.get("/metrics?x=1")
        assert plain.status_code == 200
        assert "specinfer_generation_tokens_total{" in plain.text
        open_metrics = await client.get("/metrics", headers={"accept": OPENMETRICS})
        assert open_metrics.headers["content-type"].startswith("application/openmetrics-text")
        assert open_metrics.text.endswith("# EOF\n")
        head = await client.head("/metrics")
        assert (head.status_code, head.content) == (200, b"")
        assert (await client.post("/metrics", content=b"x")).status_code == 405
        for path in ("/", "/metrics/", "/metrics2", "/debug", "/x/metrics"):
            assert (await client.get(path)).status_code == 404


async def test_what_is_no_request_is_let_go(server: MetricsServer) -> None:
    for garbage in (b"\r\n\r\n", b"\x16\x03\x01\r\n\r\n", b"x" * (4 * MAX_HEAD_BYTES)):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(garbage)
        async with asyncio.timeout(5):
            answer = await reader.read()
        assert b"specinfer" not in answer
        writer.close()


async def test_silent_connections_do_not_keep_others_out(server: MetricsServer) -> None:
    """The oldest of them go at once: nobody waits for them to run out of time."""
    silent = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(40)]
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as client:
        for _ in range(MAX_CONNECTIONS + 1):
            assert (await client.get("/metrics")).status_code == 200
    async with asyncio.timeout(2):
        with suppress(ConnectionResetError):
            assert await silent[0][0].read() == b""
    for _, writer in silent:
        writer.close()


async def test_a_silent_connection_has_seconds(
    server: MetricsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exposition, "CONNECTION_SECONDS", 0.2)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    async with asyncio.timeout(3):
        assert await reader.read() == b""
    writer.close()


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1", "127.0.0.1:99999", ":9100"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(InvalidRequest, match="address"):
        MetricsServer(address, CollectorRegistry())


async def test_binding_wide_needs_a_flag_and_ports_are_not_shared(server: MetricsServer) -> None:
    with pytest.raises(InvalidRequest, match="--insecure-bind"):
        MetricsServer("0.0.0.0:0", CollectorRegistry())
    MetricsServer("0.0.0.0:0", CollectorRegistry(), insecure_bind=True)
    second = MetricsServer(f"127.0.0.1:{server.port}", CollectorRegistry())
    with pytest.raises(InvalidRequest, match="cannot listen"):
        await second.start()


async def test_metrics_go_over_tls_where_the_worker_does(certificates: Certificates) -> None:
    tls = TlsSettings(None, certificates.server.certificate, certificates.server.key)
    serving = MetricsServer("127.0.0.1:0", CollectorRegistry(), tls=tls)
    await serving.start()
    trusted = ssl.create_default_context(cafile=str(certificates.ca))
    async with httpx.AsyncClient(verify=trusted) as client:
        answer = await client.get(f"https://127.0.0.1:{serving.port}/metrics")
        assert answer.status_code == 200
    await serving.stop()


def test_guesses_that_come_too_late_are_wasted() -> None:
    counts = TierCounts()
    tree = TokenTree((1, 2, 3), (-1, 0, 0))
    answers = [Answer[DraftResult]() for _ in range(3)]
    for answer, reason in zip(answers, ("late", "late", "lost_hedge"), strict=True):
        counts.waste(answer, reason)
    answers[0].succeed(DraftResult(1, tree))
    answers[1].fail(Unavailable("gone"))
    answers[2].succeed(DraftResult(1, tree))
    assert counts.wasted == {"late": 2, "lost_hedge": 2}


def test_counters_that_are_read_begin_at_zero_too() -> None:
    """Or the first refusal would be no rise."""
    registry = CollectorRegistry()
    instruments = Instruments(registry, Source.ROUTER, {"model_name": "m"})
    instruments.watch("admission_refusals", lambda: {("queue_full",): 2.0})
    (family,) = [each for each in registry.collect() if each.name.endswith("refusals")]
    values = {sample.labels["reason"]: sample.value for sample in family.samples}
    assert values["queue_full"] == 2.0
    assert values["draining"] == 0.0
