"""A local cluster of one worker of each kind whose spans come here, with a Redis of its own.

This module knows nothing of what is asked of the cluster or done with the spans.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from specinfer_bench.chaos.cluster import ClusterOptions, chaos_cluster
from specinfer_bench.traces.collector import Collector, running_collector

ROUTER = "router 1"


@dataclass(frozen=True)
class Models:
    """Folders of the checkpoints; clients call the model by the name of the target's."""

    target: Path
    draft: Path


@dataclass(frozen=True)
class TracedCluster:
    """A cluster and whoever hears of it.

    Attributes:
        router: gRPC address for clients.
        gateway: its HTTP address.
        collector: receives the spans.
    """

    router: str
    gateway: str
    collector: Collector


@asynccontextmanager
async def traced_cluster(
    models: Models,
    *,
    traced: bool = True,
    flags: Sequence[str] = (),
    router_flags: Sequence[str] = (),
    logs: Path | None = None,
) -> AsyncIterator[TracedCluster]:
    """Start a cluster and a collector for its spans; all end with the block.

    Args:
        models: what is served.
        traced: whether the cluster is told of the collector.
        flags: more flags of every process.
        router_flags: more flags of the router.
        logs: keeps what the processes write.
    """
    async with running_collector() as collector:
        shared = (*flags, *(("--otlp-endpoint", collector.endpoint) if traced else ()))
        options = ClusterOptions(
            models.target,
            models.draft,
            num_routers=1,
            num_verifiers=1,
            num_drafters=1,
            worker_flags=shared,
            router_flags=(*shared, *router_flags),
        )
        async with chaos_cluster(options, logs) as cluster:
            # Past the links, which are for faults.
            yield TracedCluster(cluster.addresses[ROUTER], cluster.metrics[ROUTER], collector)


@asynccontextmanager
async def traced_application(collector: Collector) -> AsyncIterator[None]:
    """Let this process be an application that traces itself; once in a process."""
    provider = TracerProvider(resource=Resource.create({"service.name": "application"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=collector.endpoint)))
    trace.set_tracer_provider(provider)
    try:
        yield
    finally:
        # It waits for the collector, which answers on this loop.
        await asyncio.to_thread(provider.shutdown)
