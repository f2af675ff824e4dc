"""Workers that find their routers, and routers their workers, through a real Redis."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import signal
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from specinfer import AsyncClient, SpeculationOptions
from specinfer.errors import SpecinferError
from specinfer.options import GenerateOptions
from specinfer.prefixes import hash_chain, hash_key
from specinfer.redis_connection import RedisSettings
from specinfer.redis_registry import RedisPrefixes, RedisRegistry
from specinfer_cli.cluster import ClusterSettings, running_cluster
from specinfer_cli.processes import Child, free_port, start_child, stop_children, wait_healthy
from tests.kit.redis_servers import RedisServer
from tests.kit.waiting import until

pytestmark = pytest.mark.timeout(300)

# What the registry promises: a worker is in use, or out of it, so soon.
PROMISED_SECONDS = 2.0
LONG: GenerateOptions = {
    "token_ids": [5, 9, 12],
    "max_tokens": 300,
    "temperature": 0.8,
    "seed": 11,
    "ignore_eos": True,
    # A shape of its own: the cluster's policy would find this pair, of equal cost, not worth it.
    "speculation": SpeculationOptions(widths=(2, 1, 1)),
}


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path / "redis", "--maxmemory-policy", "noeviction")
    yield server
    server.stop()


def settings_of(tiny_settings: ClusterSettings, url: str, **changes: object) -> ClusterSettings:
    """A cluster in a group of its own."""
    group = uuid.uuid4().hex
    return dataclasses.replace(tiny_settings, redis=url, group=group, **changes)  # type: ignore[arg-type]


@contextmanager
def another(settings: ClusterSettings, kind: str, model: Path, folder: Path) -> Iterator[Child]:
    """One more worker that is told of Redis alone, once it is healthy."""
    address = f"127.0.0.1:{free_port()}"
    flags = ["--address", address, "--model", str(model), "--dtype", "float32", "--threads", "1"]
    child = start_child(
        f"another {kind}",
        f"specinfer_{kind}",
        [*flags, "--group", settings.group, "--drain-seconds", "1"],
        address=address,
        folder=folder,
        environment={f"SPECINFER_{kind.upper()}_REDIS": settings.redis or ""},
    )
    try:
        wait_healthy([child], time.monotonic() + 120, lambda: False)
        yield child
    finally:
        stop_children([child], grace_seconds=5.0)


@asynccontextmanager
async def registry_of(settings: ClusterSettings) -> AsyncIterator[RedisRegistry]:
    registry = RedisRegistry(RedisSettings(settings.redis or ""), settings.group)
    try:
        yield registry
    finally:
        await registry.close()


async def addresses(registry: RedisRegistry) -> set[str]:
    return {worker.address for worker in await registry.workers()}


async def num_workers(client: AsyncClient) -> tuple[int, int]:
    """Verify and draft workers that the router uses."""
    told = await client.capabilities()
    return told.num_verifiers, told.num_drafters


async def until_workers(client: AsyncClient, wanted: tuple[int, int]) -> float:
    async def reached() -> bool:
        return await num_workers(client) == wanted

    return await until(reached, f"{wanted} verify and draft workers", 30)


async def test_a_drafter_joins_is_used_and_is_gone_when_it_is_killed(
    tiny_settings: ClusterSettings, redis_server: str, tmp_path: Path
) -> None:
    settings = settings_of(tiny_settings, redis_server, draft=None)
    assert tiny_settings.draft is not None
    with running_cluster(settings) as cluster:
        async with AsyncClient(cluster.router) as client, registry_of(settings) as registry:
            assert await num_workers(client) == (1, 0)
            alone = await client.generate(**LONG)
            with another(settings, "draft", tiny_settings.draft, tmp_path) as drafter:
                assert await until_workers(client, (1, 1)) < PROMISED_SECONDS
                helped = await client.generate(**LONG)
                assert helped.speculation.num_accepted_tokens > 0
                assert helped.token_ids == alone.token_ids
                assert drafter.address in await addresses(registry)
                drafter.process.kill()
                assert await until_workers(client, (1, 0)) < PROMISED_SECONDS

                async def unlisted() -> bool:
                    return drafter.address not in await addresses(registry)

                assert await until(unlisted, "the entry expires") < PROMISED_SECONDS
            assert (await client.generate(**LONG)).token_ids == alone.token_ids


async def test_a_verify_worker_that_drains_leaves_at_once(
    tiny_settings: ClusterSettings, redis_server: str, tmp_path: Path
) -> None:
    settings = settings_of(tiny_settings, redis_server)
    with running_cluster(settings) as cluster:
        async with AsyncClient(cluster.router) as client, registry_of(settings) as registry:
            with another(settings, "verify", settings.model, tmp_path) as worker:
                assert await until_workers(client, (2, 1)) < PROMISED_SECONDS
                worker.process.send_signal(signal.SIGTERM)
                assert await until_workers(client, (1, 1)) < PROMISED_SECONDS
                assert worker.process.wait(30) == 0
                # Withdrawn and not expired: the process is gone and its entry with it.
                assert worker.address not in await addresses(registry)
            assert len((await client.generate(**LONG)).token_ids) == 300


async def test_a_worker_of_another_model_harms_nobody(
    tiny_settings: ClusterSettings, redis_server: str, tmp_path: Path
) -> None:
    settings = settings_of(tiny_settings, redis_server)
    assert settings.draft is not None
    with running_cluster(settings) as cluster:
        async with AsyncClient(cluster.router) as client, registry_of(settings) as registry:
            unbroken = await client.generate(**LONG)
            # The drafter's weights are not the target's.
            with another(settings, "verify", settings.draft, tmp_path) as strange:

                async def listed() -> bool:
                    return strange.address in await addresses(registry)

                await until(listed, "it is listed")
                log = cluster.children[-1].log
                await until(lambda: strange.address in log.read_text(), "the router says so")
                assert await num_workers(client) == (1, 1)
                assert (await client.generate(**LONG)).token_ids == unbroken.token_ids


async def test_a_redis_that_restarts_empty_breaks_nothing(
    tiny_settings: ClusterSettings, own_redis: RedisServer
) -> None:
    settings = settings_of(tiny_settings, own_redis.url)
    with running_cluster(settings) as cluster:
        workers = {*cluster.verifiers, *cluster.drafters}
        async with AsyncClient(cluster.router) as client, registry_of(settings) as registry:
            unbroken = await client.generate(**LONG)
            assert await addresses(registry) == workers
            own_redis.kill()
            # Longer than an entry lives.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2.0):
                    while True:
                        assert await num_workers(client) == (1, 1)
            own_redis.restart(lose_data=True)

            async def all_listed() -> bool:
                try:
                    return await addresses(registry) == workers
                except SpecinferError:
                    return False

            assert await until(all_listed, "the entries come back") < PROMISED_SECONDS
            assert await num_workers(client) == (1, 1)
            assert (await client.generate(**LONG)).token_ids == unbroken.token_ids


async def test_a_session_goes_where_its_beginning_is(
    tiny_settings: ClusterSettings, redis_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a busy machine an answer may take longer than a router should wait for it.
    monkeypatch.setenv("SPECINFER_ROUTER_PREFIX_SECONDS", "5")
    settings = settings_of(tiny_settings, redis_server, num_verifiers=2, draft=None)
    with running_cluster(settings) as cluster:
        async with AsyncClient(cluster.router) as client:
            await until_workers(client, (2, 0))
            # The key alone says which worker computes a beginning; the two get some of each.
            beginnings: list[list[int]] = []
            while len(await holders(settings, beginnings)) < 2:
                assert len(beginnings) < 20, "every key led to the same worker"
                key = str(len(beginnings))
                beginnings.append([40 + len(beginnings), *range(3, 322)])
                assert await generate(client, beginnings[-1], 1, affinity_key=key) == 0
            # Without a key all would go to one and the same of two idle workers.
            for last_token in (2, 3):
                for beginning in beginnings:
                    assert await generate(client, beginning, last_token) == 320


async def generate(
    client: AsyncClient, beginning: list[int], last_token: int, affinity_key: str = ""
) -> int:
    """Tokens of the prompt that the worker had already."""
    done = await client.generate(
        token_ids=[*beginning, last_token],
        max_tokens=2,
        ignore_eos=True,
        seed=1,
        affinity_key=affinity_key,
    )
    return done.usage.num_cached_tokens


async def holders(settings: ClusterSettings, beginnings: list[list[int]]) -> set[str]:
    """The verify workers that hold one of the beginnings, once each is published by one."""
    directory = RedisPrefixes(RedisSettings(settings.redis or ""), settings.group)
    async with registry_of(settings) as registry:
        workers = await registry.workers()
    names = [worker.worker_id for worker in workers]
    key = hash_key(workers[0].model_hash)
    found: list[str] = []

    async def published() -> bool:
        found.clear()
        for beginning in beginnings:
            held = await directory.find(names, hash_chain(beginning, 16, key))
            found.extend(n for n, one in zip(names, held, strict=True) if one.num_blocks == 20)
        return len(found) == len(beginnings)

    try:
        await until(published, "every beginning is published")
    finally:
        await directory.close()
    return set(found)
