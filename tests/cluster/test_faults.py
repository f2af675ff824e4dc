"""Processes that die in the middle of a stream: the same tokens, later at most."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager

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


# Many streams at once, each with a seed of its own.
NUM_STREAMS = 16
SHORTER: GenerateOptions = {**LONG, "max_tokens": 200}


def two_verifiers(settings: ClusterSettings) -> ClusterSettings:
    """Two, and a second for plain tokens to come together: however slow the machine, some do."""
    flags = ("--plain-seconds", "1")
    return dataclasses.replace(settings, num_verifiers=2, router_flags=flags)


@pytest.fixture
def cluster(tiny_settings: ClusterSettings) -> Iterator[RunningCluster]:
    with running_cluster(two_verifiers(tiny_settings)) as running:
        yield running


def plainly(options: GenerateOptions) -> GenerateOptions:
    """The same without guesses: a round brings several tokens, each from a pass of its own."""
    return {**options, "speculation": SpeculationOptions(enabled=False)}


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


async def with_a_verifier_killed(
    cluster: RunningCluster, client: AsyncClient, pair: tuple[GenerateOptions, GenerateOptions]
) -> list[Completion]:
    """Two streams with guesses, then the same two without; one verifier of two dies under them."""
    together = [*pair, *(plainly(options) for options in pair)]
    streams: list[AsyncCompletionStream] = []
    async with AsyncExitStack() as ends:
        # Each goes to the worker with fewer sessions: of each pair each of the two has one.
        for options in reversed(together):
            streams.insert(0, await ends.enter_async_context(client.stream(**options)))
            await first_tokens(streams[0])
        with suspended([child(cluster, "verify 2")]):
            child(cluster, "verify 1").process.kill()
            await wait_for(client, lambda told: told.num_verifiers == 1)
        completions = await asyncio.gather(*map(rest_of, streams))
    for plain in completions[2:]:
        # With so many passes a round, the worker nearly always died among those of one.
        assert plain.speculation.num_rounds < len(plain.token_ids) / 2
    return completions


async def test_killing_a_verifier_costs_time_and_no_token(cluster: RunningCluster) -> None:
    async with AsyncClient(cluster.router) as client:
        unbroken = [await client.generate(**options) for options in (LONG, OTHER)]
        broken = await with_a_verifier_killed(cluster, client, (LONG, OTHER))
        assert [run.token_ids for run in broken] == [run.token_ids for run in unbroken * 2]
        assert [run.text for run in broken] == [run.text for run in unbroken * 2]
        assert (await client.generate(**LONG)).token_ids == unbroken[0].token_ids


def seeded(seed: int) -> GenerateOptions:
    """The options of one of many streams."""
    return {**SHORTER, "seed": seed}


async def unbroken_runs(client: AsyncClient) -> list[tuple[int, ...]]:
    """What each of the streams says when nothing happens."""
    runs = await asyncio.gather(*(client.generate(**seeded(seed)) for seed in range(NUM_STREAMS)))
    return [run.token_ids for run in runs]


class Streams:
    """Many streams at once, read to their ends in the background.

    Attributes:
        begun: set once every stream has had tokens.
    """

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._num_begun = 0
        self.begun = asyncio.Event()
        self._reading = asyncio.gather(*(self._read(seed) for seed in range(NUM_STREAMS)))

    async def token_ids(self) -> list[tuple[int, ...]]:
        """What each of them said."""
        return [run.token_ids for run in await self._reading]

    async def _read(self, seed: int) -> Completion:
        async with self._client.stream(**seeded(seed)) as stream:
            await first_tokens(stream)
            self._num_begun += 1
            if self._num_begun == NUM_STREAMS:
                self.begun.set()
            return await rest_of(stream)


@pytest.mark.chaos
async def test_a_hung_drafter_costs_guesses_and_no_token(cluster: RunningCluster) -> None:
    async with AsyncClient(cluster.router) as client:
        unbroken = await unbroken_runs(client)
        streams = Streams(client)
        await streams.begun.wait()
        with suspended([child(cluster, "draft 1")]):
            assert await streams.token_ids() == unbroken
        # It comes back into use by itself.
        async with asyncio.timeout(60):
            while not (await client.generate(**SHORTER)).speculation.num_accepted_tokens:
                pass


@pytest.mark.chaos
async def test_streams_of_a_hung_verifier_go_on_elsewhere(cluster: RunningCluster) -> None:
    async with AsyncClient(cluster.router) as client:
        unbroken = await unbroken_runs(client)
        streams = Streams(client)
        await streams.begun.wait()
        with suspended([child(cluster, "verify 1")]):
            # Within the block: nobody waits for the one that hangs.
            assert await streams.token_ids() == unbroken
            await wait_for(client, lambda told: told.num_verifiers == 1)
        await wait_for(client, lambda told: told.num_verifiers == 2)
        # The other one hangs now, so what is said next is said by the one that came back.
        with suspended([child(cluster, "verify 2")]):
            assert (await client.generate(**seeded(0))).token_ids == unbroken[0]


async def test_streams_leave_a_draining_verifier(cluster: RunningCluster) -> None:
    leaving = child(cluster, "verify 1")
    async with AsyncClient(cluster.router) as client:
        unbroken = await unbroken_runs(client)
        streams = Streams(client)
        await streams.begun.wait()
        leaving.process.terminate()
        assert await streams.token_ids() == unbroken
        assert await asyncio.to_thread(leaving.process.wait, 60) == 0
        assert (await client.generate(**seeded(3))).token_ids == unbroken[3]


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
