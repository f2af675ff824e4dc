"""Processes that die in the middle of a stream: the same tokens, later at most."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import redis.asyncio

from specinfer import (
    AsyncClient,
    AsyncCompletionStream,
    Capabilities,
    Completion,
    SpeculationOptions,
)
from specinfer.options import GenerateOptions
from specinfer_cli.cluster import ClusterSettings, RunningCluster, running_cluster
from specinfer_cli.processes import Child

# Every test starts a cluster of its own, which takes a while on a busy machine.
pytestmark = pytest.mark.timeout(300)

# Long enough that a stream is still under way when its first tokens have been read.
LONG: GenerateOptions = {
    "token_ids": [5, 9, 12],
    "max_tokens": 400,
    "temperature": 0.8,
    "seed": 11,
    "ignore_eos": True,
    # A shape of its own: the cluster's policy would find this pair, of equal cost, not worth it.
    "speculation": SpeculationOptions(widths=(2, 1, 1)),
}
OTHER: GenerateOptions = {**LONG, "token_ids": [7, 80, 33], "seed": 12}


@pytest.fixture
def cluster(tiny_settings: ClusterSettings) -> Iterator[RunningCluster]:
    settings = dataclasses.replace(tiny_settings, num_verifiers=2)
    with running_cluster(settings) as running:
        yield running


def child(cluster: RunningCluster, name: str) -> Child:
    return next(child for child in cluster.children if child.name == name)


async def first_tokens(stream: AsyncCompletionStream) -> None:
    """Read a stream until its first tokens have come: it has its workers then."""
    event = await anext(stream)
    while not event.token_ids:
        event = await anext(stream)


async def rest_of(stream: AsyncCompletionStream) -> Completion:
    async for _ in stream:
        pass
    return stream.completion


async def wait_for(client: AsyncClient, condition: Callable[[Capabilities], bool]) -> None:
    """Ask the router until what it says of itself meets the condition; the test's limit ends it."""
    while not condition(await client.capabilities()):
        pass


@contextmanager
def suspended(children: Sequence[Child]) -> Iterator[None]:
    """Children that do nothing while the block runs, so that no stream can reach its end."""
    for each in children:
        each.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for each in children:
            each.process.send_signal(signal.SIGCONT)


async def test_killing_the_drafter_costs_guesses_and_no_token(cluster: RunningCluster) -> None:
    async with AsyncClient(cluster.router) as client:
        unbroken = await client.generate(**LONG)
        assert unbroken.speculation.num_accepted_tokens > 0
        async with client.stream(**LONG) as stream:
            await first_tokens(stream)
            # The verifiers wait until the router knows, so the stream is still under way then.
            with suspended([child(cluster, "verify 1"), child(cluster, "verify 2")]):
                child(cluster, "draft 1").process.kill()
                await wait_for(client, lambda told: told.num_drafters == 0)
            broken = await rest_of(stream)
        assert broken.token_ids == unbroken.token_ids
        assert broken.text == unbroken.text
        reasons = dict(broken.speculation.root_only_reasons)
        assert reasons.get("no_drafter", 0) > 10


async def test_killing_a_verifier_costs_time_and_no_token(cluster: RunningCluster) -> None:
    async with AsyncClient(cluster.router) as client:
        unbroken = [await client.generate(**options) for options in (LONG, OTHER)]
        # The second goes to the worker with fewer sessions: each of the two has one.
        async with client.stream(**LONG) as one, client.stream(**OTHER) as other:
            await first_tokens(one)
            await first_tokens(other)
            with suspended([child(cluster, "verify 2")]):
                child(cluster, "verify 1").process.kill()
                await wait_for(client, lambda told: told.num_verifiers == 1)
            broken = await asyncio.gather(rest_of(one), rest_of(other))
        assert [run.token_ids for run in broken] == [run.token_ids for run in unbroken]
        assert [run.text for run in broken] == [run.text for run in unbroken]
        assert (await client.generate(**LONG)).token_ids == unbroken[0].token_ids


async def test_sessions_are_kept_in_redis(
    tiny_settings: ClusterSettings, redis_server: str
) -> None:
    settings = dataclasses.replace(tiny_settings, redis=redis_server, group="faults")
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
