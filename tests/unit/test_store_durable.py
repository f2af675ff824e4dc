"""Sessions go on while Redis is away, and are there when it is back, whatever it has lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from specinfer.errors import Cancelled, LeaseLost, NotFound, ResourceExhausted, Unavailable
from specinfer.redis_connection import RedisSettings
from specinfer_router.store import (
    ABANDONED,
    CANCELLED,
    DurableStore,
    OutageLimits,
    RedisStore,
    SessionRecord,
    StoreHooks,
)
from tests.kit.link_breaker import LinkBreaker
from tests.kit.redis_servers import RedisServer
from tests.kit.waiting import until
from tests.unit.test_store import record_of

QUICK = OutageLimits(patience_seconds=0.3, max_pause=0.05)
Make = Callable[..., Awaitable[DurableStore]]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    started = RedisServer(tmp_path / "redis")
    yield started
    started.stop()


@pytest.fixture
async def make(server: RedisServer) -> AsyncIterator[Make]:
    """Builds stores on the test's server."""
    built: list[DurableStore] = []

    async def make(limits: OutageLimits = QUICK, url: str = "", **hooks: object) -> DurableStore:
        connection = RedisSettings(url or server.url, timeout_seconds=0.3, num_retries=1)
        shared = RedisStore(connection, patience_seconds=limits.patience_seconds)
        built.append(DurableStore(shared, limits, StoreHooks(**hooks)))  # type: ignore[arg-type]
        await built[-1].check()
        return built[-1]

    yield make
    for store in built:
        await store.close()


async def back(store: DurableStore) -> None:
    await until(lambda: not store.away_seconds, "Redis is back")


async def created(store: DurableStore) -> SessionRecord:
    record = record_of()
    await store.create(record)
    return record


async def committed(store: DurableStore, record: SessionRecord, *epochs: int) -> None:
    """Commit token 100 + epoch at each epoch."""
    for epoch in epochs:
        assert await store.commit(record.session_id, epoch, [100 + epoch]) == epoch + 1


async def in_redis(server: RedisServer, session_id: str) -> SessionRecord:
    other = RedisStore(RedisSettings(server.url))
    try:
        return await other.load(session_id)
    finally:
        await other.close()


@pytest.mark.parametrize("lose_data", [False, True])
async def test_a_stream_goes_on_without_redis_and_is_there_again(
    server: RedisServer, make: Make, lose_data: bool
) -> None:
    outages: list[float] = []
    restored: list[None] = []
    store = await make(outage_ended=outages.append, restored=lambda: restored.append(None))
    running, idle = await created(store), await created(store)
    await committed(store, running, 0, 1)
    server.kill()
    await committed(store, running, 2)
    assert store.away_seconds > 0
    begun = time.monotonic()
    await committed(store, running, *range(3, 40))
    assert time.monotonic() - begun < 0.3, "only the first commit waits for Redis"
    server.restart(lose_data=lose_data)
    await back(store)
    await committed(store, running, 40)
    await committed(store, idle, 0)
    kept = await in_redis(server, running.session_id)
    assert kept.output_ids == tuple(range(100, 141))
    assert (await in_redis(server, idle.session_id)).output_ids == (100,)
    assert len(outages) == 1
    assert outages[0] > 0
    assert len(restored) >= 2


async def test_a_redis_that_hangs_costs_one_wait_for_all(server: RedisServer, make: Make) -> None:
    store = await make()
    records = [await created(store) for _ in range(20)]
    with server.paused():
        begun = time.monotonic()
        await asyncio.gather(*(committed(store, record, 0, 1, 2) for record in records))
        assert time.monotonic() - begun < 3 * QUICK.patience_seconds
    await back(store)
    await asyncio.gather(*(committed(store, record, 3) for record in records))
    for record in records:
        assert (await in_redis(server, record.session_id)).output_ids == (100, 101, 102, 103)


async def test_data_lost_behind_our_back_is_noticed_by_a_commit(
    server: RedisServer, make: Make
) -> None:
    """The connection never broke for us: a flush, or a failover that we did not see."""
    restored: list[None] = []
    store = await make(restored=lambda: restored.append(None))
    whole, part = await created(store), await created(store)
    await committed(store, whole, 0)
    await committed(store, part, 0)
    raw = RedisStore(RedisSettings(server.url), holder="raw")
    old = await raw.load(part.session_id)
    await committed(store, part, 1, 2)
    await raw._redis.flushall()
    other = RedisStore(RedisSettings(server.url), holder=store._shared.holder)
    await other.restore(old)
    await committed(store, whole, 1)
    await committed(store, part, 3)
    assert (await raw.load(whole.session_id)).output_ids == (100, 101)
    assert (await raw.load(part.session_id)).output_ids == (100, 101, 102, 103)
    assert len(restored) == 2
    await raw.close()
    await other.close()


async def test_a_failover_to_a_replica_that_is_behind(tmp_path: Path, make: Make) -> None:
    primary = RedisServer(tmp_path / "primary")
    replica = RedisServer(tmp_path / "replica", "--replicaof", "127.0.0.1", str(primary.port))
    door = LinkBreaker(f"127.0.0.1:{primary.port}")
    await door.start()
    try:
        store = await make(url=f"redis://{door.address}/0")
        record = await created(store)
        await committed(store, record, 0, 1)
        watcher = RedisStore(RedisSettings(replica.url))

        async def replicated() -> bool:
            try:
                return (await watcher.load(record.session_id)).epoch == 2
            except NotFound:
                return False

        await until(replicated, "the replica has it")
        # What follows never reaches the replica.
        await watcher._redis.execute_command("REPLICAOF", "NO", "ONE")
        await committed(store, record, 2, 3)
        primary.kill()
        await door.lead_to(f"127.0.0.1:{replica.port}")
        await committed(store, record, 4, 5)
        await back(store)
        await committed(store, record, 6)
        assert (await watcher.load(record.session_id)).output_ids == tuple(range(100, 107))
        await watcher.close()
        await store.close()
    finally:
        await door.stop()
        primary.stop()
        replica.stop()


async def test_after_the_stated_time_sessions_end_and_can_be_resumed(
    server: RedisServer, make: Make
) -> None:
    store = await make(replace(QUICK, outage_seconds=0.0))
    record = await created(store)
    await committed(store, record, 0)
    server.kill()
    with pytest.raises(Unavailable, match="resume"):
        await committed(store, record, 1)
    await store.finish(record.session_id, ABANDONED, owner=0)
    server.restart()
    await back(store)
    kept = await in_redis(server, record.session_id)
    assert (kept.output_ids, kept.finish_reason) == ((100,), ABANDONED)
    assert store.num_held == 0
    assert (await store.claim(record.session_id)).owner == 1


async def test_new_sessions_are_refused_or_served_by_setting(
    server: RedisServer, make: Make
) -> None:
    refusing = await make()
    serving = await make(replace(QUICK, serve_new=True, outage_seconds=0.0, max_sessions=2))
    await created(serving)
    server.kill()
    with pytest.raises(Unavailable) as refused:
        await created(refusing)
    assert refused.value.retryable
    begun = time.monotonic()
    with pytest.raises(Unavailable):
        await created(refusing)
    assert time.monotonic() - begun < 0.2
    record = await created(serving)
    await committed(serving, record, 0, 1)
    with pytest.raises(ResourceExhausted):
        await created(serving)
    server.restart(lose_data=True)
    await back(serving)
    await committed(serving, record, 2)
    assert (await in_redis(server, record.session_id)).output_ids == (100, 101, 102)


async def test_what_runs_here_can_be_resumed_followed_and_cancelled_without_redis(
    server: RedisServer, make: Make
) -> None:
    store = await make()
    record, other = await created(store), await created(store)
    await committed(store, record, 0)
    server.kill()
    await committed(store, record, 1)
    assert (await store.load(record.session_id)).output_ids == (100, 101)
    assert await store.tail(record.session_id, 4) == ((101,), 2, "")
    claimed = await store.claim(record.session_id)
    assert (claimed.owner, claimed.epoch) == (1, 2)
    with pytest.raises(LeaseLost):
        await store.commit(record.session_id, 2, [9], owner=0)
    await store.finish(other.session_id, CANCELLED)
    with pytest.raises(Cancelled):
        await store.commit(other.session_id, 0, [9])
    with pytest.raises(Unavailable):
        await store.load("elsewhere")
    assert {each.session_id for each in await store.sessions(9)} == {
        record.session_id,
        other.session_id,
    }
    server.restart()
    await back(store)
    assert await store.commit(record.session_id, 2, [102], "stop", owner=1) == 3
    kept = await in_redis(server, record.session_id)
    assert (kept.output_ids, kept.owner) == ((100, 101, 102), 1)
    assert (await in_redis(server, other.session_id)).finish_reason == CANCELLED
    assert store.num_held == 0


async def test_a_session_that_ends_while_redis_is_away_is_kept(
    server: RedisServer, make: Make
) -> None:
    store = await make()
    record = await created(store)
    server.kill()
    assert await store.commit(record.session_id, 0, [5], "stop") == 1
    await store.put_document("response:1", "text")
    assert await store.get_document("response:1") == "text"
    server.restart(lose_data=True)
    await back(store)
    assert (await in_redis(server, record.session_id)).finish_reason == "stop"
    assert await store.get_document("response:1") == "text"
    assert store.num_held == 0


async def test_whoever_claims_meanwhile_wins(server: RedisServer, make: Make) -> None:
    """Cut off from Redis alone, a router goes on; another one that is not takes over."""
    door = LinkBreaker(f"127.0.0.1:{server.port}")
    await door.start()
    lost: list[None] = []
    cut_off = await make(url=f"redis://{door.address}/0", lease_lost=lambda: lost.append(None))
    other = await make()
    record = await created(cut_off)
    await committed(cut_off, record, 0)
    await door.lead_to("127.0.0.1:1")
    await committed(cut_off, record, 1, 2)
    assert (await cut_off.claim(record.session_id)).owner == 1
    claimed = await other.claim(record.session_id)
    assert (claimed.owner, claimed.output_ids) == (1, (100,))
    assert await other.commit(record.session_id, 1, [101], owner=1) == 2
    await door.lead_to(f"127.0.0.1:{server.port}")
    await back(cut_off)
    with pytest.raises(LeaseLost):
        await cut_off.commit(record.session_id, 3, [103], owner=1)
    assert await other.commit(record.session_id, 2, [102], "stop", owner=1) == 3
    assert (await cut_off.load(record.session_id)).output_ids == (100, 101, 102)
    assert len(lost) == 1
    assert cut_off.num_held == 0
    await cut_off.close()
    await door.stop()


async def test_a_cancellation_elsewhere_outlives_the_outage(
    server: RedisServer, make: Make
) -> None:
    door = LinkBreaker(f"127.0.0.1:{server.port}")
    await door.start()
    cut_off, other = await make(url=f"redis://{door.address}/0"), await make()
    record = await created(cut_off)
    await door.lead_to("127.0.0.1:1")
    await committed(cut_off, record, 0)
    await other.finish(record.session_id, CANCELLED)
    await door.lead_to(f"127.0.0.1:{server.port}")
    await back(cut_off)
    with pytest.raises(Cancelled):
        await committed(cut_off, record, 1)
    await cut_off.close()
    await door.stop()


async def test_a_long_round_of_an_unattended_session_keeps_its_lease(server: RedisServer) -> None:
    shared = RedisStore(RedisSettings(server.url), lease_seconds=0.3)
    store, other = DurableStore(shared), RedisStore(RedisSettings(server.url))
    record = record_of()
    record = record._replace(terms=replace(record.terms, unattended=True))
    await store.create(record)
    begun = time.monotonic()
    while time.monotonic() - begun < 0.8:
        assert await other.orphans(10) == []
        with pytest.raises(LeaseLost):
            await other.claim(record.session_id, orphaned_only=True)
        await asyncio.sleep(0.02)
    await store.close()

    async def orphaned() -> bool:
        return await other.orphans(10) == [record.session_id]

    await until(orphaned, "its router is dead")
    await other.close()


async def test_writes_that_redis_refuses_are_an_outage(server: RedisServer, make: Make) -> None:
    """Memory is full: it answers, and takes nothing."""
    store = await make()
    record = await created(store)
    raw = RedisStore(RedisSettings(server.url))
    await raw._redis.config_set("maxmemory", "1")
    await committed(store, record, 0, 1)
    assert store.away_seconds > 0
    await raw._redis.config_set("maxmemory", "0")
    await back(store)
    await committed(store, record, 2)
    assert (await raw.load(record.session_id)).output_ids == (100, 101, 102)
    await raw.close()
