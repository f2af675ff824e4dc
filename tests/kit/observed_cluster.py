"""A cluster of processes with a real Redis, under load, and a real Prometheus that scrapes it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from specinfer_bench.chaos.cluster import ChaosCluster, ClusterOptions, chaos_cluster
from specinfer_bench.chaos.load import Load, LoadOptions
from specinfer_bench.chaos.readings import Case
from tests.kit.prometheus import Prometheus, prometheus


@dataclass(frozen=True)
class Observed:
    """What runs."""

    cluster: ChaosCluster
    load: Load
    prometheus: Prometheus


@asynccontextmanager
async def observed_cluster(
    folder: Path, options: ClusterOptions, cases: tuple[Case, ...], num_clients: int = 4
) -> AsyncIterator[Observed]:
    """All of it until the block ends; half of the clients speak gRPC, half HTTP."""
    async with chaos_cluster(options, folder / "cluster") as cluster:
        jobs = {
            kind: [place for name, place in cluster.metrics.items() if name.startswith(kind)]
            for kind in ("router", "verify", "draft")
        }
        half = num_clients // 2
        load = Load(
            LoadOptions(cluster.routers, cluster.gateways, cluster.model_name, cases, half, half)
        )
        async with prometheus(folder / "prometheus", jobs) as asked:
            load.start()
            try:
                await load.flowing()
                yield Observed(cluster, load, asked)
            finally:
                await load.finish(20.0)
