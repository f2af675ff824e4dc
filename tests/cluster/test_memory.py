"""A thousand requests leave no process larger than the thousand before them did."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from specinfer import AsyncClient
from specinfer_cli.cluster import ClusterSettings, RunningCluster, running_cluster

# As many as the router remembers for `explain`: from then on each pushes another one out.
NUM_WARM_UP = 1000
NUM_REQUESTS = 1000
CONCURRENCY = 16
# Allocators keep some slack: over eight thousand requests a draft worker went up and down by up to
# 7 MiB and was no larger after them. What leaks 8 KiB a request is seen.
ALLOWED_GROWTH_KIB = 8 * 1024


def resident_kib(cluster: RunningCluster) -> dict[str, int]:
    """Resident memory of each process."""
    sizes = {}
    for child in cluster.children:
        status = Path(f"/proc/{child.process.pid}/status").read_text(encoding="utf-8")
        line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
        sizes[child.name] = int(line.split()[1])
    return sizes


async def run_requests(client: AsyncClient, indices: range) -> None:
    async def work(share: range) -> None:
        for index in share:
            token_ids = [5 + (index * 31 + place) % 300 for place in range(8 + index % 40)]
            await client.generate(
                token_ids=token_ids, max_tokens=4 + index % 9, seed=index, ignore_eos=True
            )

    async with asyncio.TaskGroup() as group:
        for worker in range(CONCURRENCY):
            group.create_task(work(indices[worker::CONCURRENCY]))


# One core shared with others does a thousand requests in a few minutes.
@pytest.mark.timeout(300)
async def test_nothing_grows_over_a_thousand_requests(tiny_settings: ClusterSettings) -> None:
    with running_cluster(tiny_settings) as running:
        async with AsyncClient(running.router) as client:
            await run_requests(client, range(NUM_WARM_UP))
            before = resident_kib(running)
            await run_requests(client, range(NUM_WARM_UP, NUM_WARM_UP + NUM_REQUESTS))
            after = resident_kib(running)
    growth = {name: after[name] - size for name, size in before.items()}
    assert max(growth.values()) < ALLOWED_GROWTH_KIB, growth
