"""Our series show what the client library's would, to the letter."""

from __future__ import annotations

import random

import prometheus_client
from prometheus_client import CollectorRegistry

from specinfer.metrics.catalogue import CATALOGUE
from specinfer.metrics.exposition import expose
from specinfer.metrics.instruments import Instruments
from specinfer.metrics.metric import Source
from specinfer.metrics.series import Distribution

FIXED = {"model_name": "tiny"}
NAME = "round_duration_seconds"


def lines_of(registry: CollectorRegistry, name: str, accept: str = "") -> list[str]:
    text, _ = expose(registry, accept)
    return [
        line
        for line in text.decode().splitlines()
        if name in line and "_created" not in line and not line.startswith("#")
    ]


def test_a_distribution_is_written_as_the_library_writes_it() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    metric = next(metric for metric in CATALOGUE if metric.name == NAME)
    family = Instruments(ours, Source.ROUTER, FIXED).histogram(NAME).of()
    library = prometheus_client.Histogram(
        metric.family, metric.help, list(FIXED), registry=theirs, buckets=metric.buckets
    ).labels(*FIXED.values())
    chance = random.Random(3)
    values = [*metric.buckets, *(chance.expovariate(5) for _ in range(200)), 0.0, 1e9]
    for value in values:
        family.observe(value)
        library.observe(value)
    written = lines_of(ours, NAME)
    assert sorted(written) == sorted(lines_of(theirs, NAME))
    assert len(written) == len(metric.buckets) + 3
    name, accept = f"{NAME}_bucket", "application/openmetrics-text; version=1.0.0"
    assert lines_of(ours, name, accept) == lines_of(theirs, name, accept)


def test_counters_and_levels_are_written_as_the_library_writes_them() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    instruments = Instruments(ours, Source.ROUTER, FIXED)
    level, count = "num_streams_running", "key_requests"
    instruments.gauge(level).of("follow").inc(3)
    instruments.counter(count).of("k").inc(3)
    names = [*FIXED, "kind"]
    gauge = prometheus_client.Gauge(f"specinfer_{level}", "", names, registry=theirs)
    gauge.labels(*FIXED.values(), "follow").inc(3)
    names = [*FIXED, "key"]
    counter = prometheus_client.Counter(f"specinfer_{count}", "", names, registry=theirs)
    counter.labels(*FIXED.values(), "k").inc(3)
    for name in (level, count):
        (expected,) = lines_of(theirs, name)
        assert expected in lines_of(ours, name)


def test_a_value_on_a_bound_belongs_to_its_bucket() -> None:
    distribution = Distribution((1.0, 2.0))
    for value in (1.0, 1.5, 2.0, 2.5):
        distribution.observe(value)
    assert distribution._counts == [1, 2, 1]
