"""Processes that die in the middle of a stream: the same tokens, later at most."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import redis.asyncio

from specinfer import AsyncClient, Completion
from specinfer.options import GenerateOptions
from specinfer_cli.cluster import ClusterSettings, RunningCluster, running_cluster
from specinfer_cli.processes import Child

# Long enough that a stream is still under way when its first tokens have been read.
LONG: GenerateOptions = {
    "token_ids": [5, 9, 12],
    "max_tokens": 400,
    "temperature": 0.8,
    "seed": 11,
    "ignore_eos": True,
}


@pytest.fixture
def cluster(tiny_settings: ClusterSettings) -> Iterator[RunningCluster]:
    settings = dataclasses.replace(tiny_settings, num_verifiers=2)
    with running_cluster(settings) as running:
        yield running


def child(cluster: RunningCluster, name: str) -> Child:
    return next(child for child in cluster.children if child.name == name)


async def run_and_kill(client: AsyncClient, victims: list[Child]) -> Completion:
    """Stream LONG and kill the victims once the first tokens have come."""
    async with client.stream(**LONG) as stream:
        async for event in stream:
            if event.offset == 0:
                for victim in victims:
                    victim.process.kill()
        return stream.completion


async def test_killing_the_drafter_costs_guesses_and_no_token(cluster: RunningCluster) -> None:
    async with AsyncClient(cluster.router) as client:
        unbroken = await client.generate(**LONG)
        assert unbroken.speculation.num_accepted_tokens > 0
        broken = await run_and_kill(client, [child(cluster, "draft 1")])
        assert broken.token_ids == unbroken.token_ids
        assert broken.text == unbroken.text
        reasons = dict(broken.speculation.root_only_reasons)
        assert reasons.get("no_drafter", 0) > 10
        capabilities = await client.capabilities()
    assert capabilities.num_drafters == 0


async def test_killing_a_verifier_costs_time_and_no_token(cluster: RunningCluster) -> None:
    async with AsyncClient(cluster.router) as client:
        unbroken = await client.generate(**LONG)
        # One of the two holds the session; the other takes it over, or was never needed.
        first = await run_and_kill(client, [child(cluster, "verify 1")])
        assert first.token_ids == unbroken.token_ids
        assert (await client.generate(**LONG)).token_ids == unbroken.token_ids
        assert (await client.capabilities()).num_verifiers == 1


async def test_sessions_are_kept_in_redis(
    tiny_settings: ClusterSettings, redis_server: str
) -> None:
    settings = dataclasses.replace(tiny_settings, redis=redis_server)
    with running_cluster(settings) as running:
        async with AsyncClient(running.router) as client:
            done = await client.generate(**LONG)
    store = redis.asyncio.from_url(redis_server)
    try:
        keys = [key async for key in store.scan_iter(match=f"*{done.session_id}*")]
        assert keys
        for key in keys:
            assert await store.ttl(key) > 0
            # A hash tag keeps the keys of a session together in Redis Cluster.
            assert f"{{{done.session_id}}}".encode() in key
    finally:
        await store.aclose()
