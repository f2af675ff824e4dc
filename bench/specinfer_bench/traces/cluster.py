"""A local cluster whose spans come here, with a Redis of its own.

This module knows nothing of what is asked of the cluster or done with the spans.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from specinfer.errors import Unavailable
from specinfer_bench.chaos.redis import answers, redis_command
from specinfer_bench.traces.collector import Collector, running_collector
from specinfer_cli.cluster import ClusterSettings, RunningCluster, running_cluster
from specinfer_cli.processes import free_port

REDIS_SECONDS = 10.0
POLL_SECONDS = 0.02
_TIERS = ("ROUTER", "DRAFT", "VERIFY")


@dataclass(frozen=True)
class TracedCluster:
    """A cluster and whoever hears of it."""

    cluster: RunningCluster
    collector: Collector


@asynccontextmanager
async def traced_cluster(
    settings: ClusterSettings, *, traced: bool = True
) -> AsyncIterator[TracedCluster]:
    """Start a cluster with a Redis, and a collector for its spans; all end with the block.

    Args:
        settings: of the cluster; `redis` is replaced unless it is given.
        traced: whether the cluster is told of the collector.
    """
    async with AsyncExitStack() as stack:
        collector = await stack.enter_async_context(running_collector())
        if settings.redis is None:
            url = await stack.enter_async_context(_running_redis())
            settings = replace(settings, redis=url)
        endpoint = collector.endpoint if traced else ""
        stack.enter_context(
            _environment({f"SPECINFER_{t}_OTLP_ENDPOINT": endpoint for t in _TIERS})
        )
        # Starting and ending block; the collector answers meanwhile.
        running = running_cluster(settings)
        cluster = await asyncio.to_thread(running.__enter__)
        try:
            yield TracedCluster(cluster, collector)
        finally:
            await asyncio.to_thread(running.__exit__, None, None, None)


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


@contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    """Settings of the processes that are started in the block."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@asynccontextmanager
async def _running_redis() -> AsyncIterator[str]:
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="specinfer-") as folder:
        command = redis_command(port, Path(folder))
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.DEVNULL)
        try:
            await _answering(port)
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            process.terminate()
            await process.wait()


async def _answering(port: int) -> None:
    ready = answers(port)
    for _ in range(round(REDIS_SECONDS / POLL_SECONDS)):
        if await ready():
            return
        await asyncio.sleep(POLL_SECONDS)
    raise Unavailable("redis-server did not start")
