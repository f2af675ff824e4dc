"""Whatever Redis does, the tasks that keep sessions and workers there go on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from specinfer.announcing import Announcer
from specinfer.messages import WorkerLoad
from specinfer.redis_connection import RedisSettings
from specinfer.redis_registry import RedisRegistry
from specinfer.registry import RegisteredWorker
from specinfer_router.store import DurableStore, OutageLimits, RedisStore
from specinfer_router.store.encoding import session_keys
from tests.kit.redis_servers import RedisServer, redis_cli, start_cluster
from tests.kit.waiting import until
from tests.unit.test_store import record_of
from tests.unit.test_store_lease import unattended_record

QUICK = OutageLimits(patience_seconds=1.0, max_pause=0.2)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[RedisServer]]:
    started = start_cluster(tmp_path / "cluster")
    yield started
    for node in started:
        node.stop()


async def test_a_cluster_that_is_wholly_away_is_an_outage(nodes: list[RedisServer]) -> None:
    settings = RedisSettings(nodes[0].url, cluster=True, timeout_seconds=0.5, num_retries=1)
    store = DurableStore(RedisStore(settings, lease_seconds=2.0), QUICK)
    record = unattended_record()
    await store.create(record)
    assert await store.commit(record.session_id, 0, [100]) == 1
    registry = RedisRegistry(settings)
    worker = RegisteredWorker("draft", "w1", "127.0.0.1:5")
    announcer = Announcer(registry, worker, WorkerLoad)
    announcer.start()

    async def listed() -> bool:
        return bool(await registry.workers())

    await until(listed, "the worker is on the list")
    for node in nodes:
        node.kill()
    for epoch in range(1, 5):
        assert await store.commit(record.session_id, epoch, [100 + epoch]) == epoch + 1
    assert store.away_seconds > 0
    await until(lambda: announcer._num_failures > 0, "a beat has failed")
    for node in nodes:
        node.restart()
    await until(lambda: not store.away_seconds, "the cluster is back", seconds=30)
    await until(lambda: announcer._num_failures == 0, "the worker beats again", seconds=30)
    assert await store.commit(record.session_id, 5, [105]) == 6
    assert (await store._shared.load(record.session_id)).output_ids == tuple(range(100, 106))
    await announcer.close()
    await registry.close()
    await store.close()


async def test_one_session_that_redis_refuses_is_not_the_others_end(tmp_path: Path) -> None:
    server = RedisServer(tmp_path / "redis")
    settings = RedisSettings(server.url, timeout_seconds=0.5, num_retries=1)
    store = DurableStore(RedisStore(settings, lease_seconds=0.9), QUICK)
    try:
        records = [unattended_record() for _ in range(3)]
        for record in records:
            await store.create(record)
        broken, *others = records

        def spoil() -> None:
            redis_cli(server.port, "set", session_keys(broken.session_id)[0], "no hash")

        spoil()

        async def renewed() -> bool:
            left = [(await store._shared.summary(each.session_id)).lease_seconds for each in others]
            return min(left) > 0.7

        # Three times, so that the lease of each creation alone does not count.
        for _ in range(3):
            await until(lambda: _is_old(server, others[0].session_id), "a lease grows old")
            await until(renewed, "leases are renewed")
        server.kill()
        assert await store.commit(others[0].session_id, 0, [5]) == 1
        server.restart()
        spoil()
        await until(lambda: not store.away_seconds, "sessions come back without the broken one")
        await store.create(record_of())
        assert (await store._shared.load(others[0].session_id)).output_ids == (5,)
    finally:
        await store.close()
        server.stop()


def _is_old(server: RedisServer, session_id: str) -> bool:
    seconds, micros = map(int, redis_cli(server.port, "time").split())
    lease = int(redis_cli(server.port, "hget", session_keys(session_id)[0], "lease"))
    return lease - (1000 * seconds + micros // 1000) < 800
