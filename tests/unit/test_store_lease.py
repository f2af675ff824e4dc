"""Who holds a session, by Redis's clock: leases, orphans, restoring, and what operators see."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from redis.asyncio import Redis

from specinfer.errors import Cancelled, LeaseLost, NotFound, StaleEpoch
from specinfer.redis_connection import RedisSettings
from specinfer_router.store import (
    ABANDONED,
    CANCELLED,
    ERROR,
    MemoryStore,
    RedisStore,
    SessionFilter,
    SessionRecord,
    SessionStore,
    redis_store,
)
from specinfer_router.store.encoding import UNATTENDED, session_keys
from specinfer_router.store.interface import Behind
from tests.unit.test_store import record_of

LEASE_SECONDS = 30.0


def unattended_record() -> SessionRecord:
    record = record_of()
    return record._replace(terms=replace(record.terms, unattended=True))


@pytest.fixture
async def redis(redis_server: str) -> AsyncIterator[Redis]:
    client = Redis.from_url(redis_server)
    await client.delete(UNATTENDED)
    yield client
    await client.aclose()


@pytest.fixture
async def stores(redis_server: str) -> AsyncIterator[list[RedisStore]]:
    """Two routers' stores on one Redis."""
    built = [
        RedisStore(RedisSettings(redis_server), holder=holder, lease_seconds=LEASE_SECONDS)
        for holder in ("router-a", "router-b")
    ]
    yield built
    for store in built:
        await store.close()


async def end_lease(redis: Redis, session_id: str) -> None:
    """What the passing of time does, at once."""
    await redis.hset(session_keys(session_id)[0], "lease", "1")
    await redis.zadd(UNATTENDED, {session_id: 1}, xx=True)


async def test_a_session_is_an_orphan_once_its_lease_has_run_out(
    stores: list[RedisStore], redis: Redis
) -> None:
    first, second = stores
    record = unattended_record()
    await first.create(record)
    assert await second.orphans(10) == []
    with pytest.raises(LeaseLost, match="held for"):
        await second.claim(record.session_id, orphaned_only=True)
    await end_lease(redis, record.session_id)
    assert await second.orphans(10) == [record.session_id]
    claimed = await second.claim(record.session_id, orphaned_only=True)
    assert claimed.owner == 1
    # The new holder's lease runs from now on, and the old one may write no more.
    assert await first.orphans(10) == []
    with pytest.raises(LeaseLost):
        await first.claim(record.session_id, orphaned_only=True)
    with pytest.raises(LeaseLost):
        await first.commit(record.session_id, 0, [1])
    assert await second.commit(record.session_id, 0, [1], owner=1) == 1


@pytest.mark.parametrize("step", ["create", "commit", "claim", "renew", "restore"])
async def test_a_holder_s_every_sign_renews_its_lease(
    stores: list[RedisStore], redis: Redis, step: str
) -> None:
    store, record = stores[0], unattended_record()
    await store.create(record)
    if step != "create":
        await end_lease(redis, record.session_id)
    if step == "commit":
        await store.commit(record.session_id, 0, [1])
    elif step == "claim":
        await store.claim(record.session_id)
    elif step == "renew":
        await store.renew([(record.session_id, 0), (uuid.uuid4().hex, 0)])
    elif step == "restore":
        await store.restore(record._replace(epoch=1, token_ids=(*record.token_ids, 7)))
    summary = await store.summary(record.session_id)
    assert LEASE_SECONDS - 5 < summary.lease_seconds <= LEASE_SECONDS
    with pytest.raises(LeaseLost):
        await stores[1].claim(record.session_id, orphaned_only=True)


async def test_nobody_renews_what_is_not_theirs(stores: list[RedisStore], redis: Redis) -> None:
    first, second = stores
    record = unattended_record()
    await first.create(record)
    await end_lease(redis, record.session_id)
    await second.renew([(record.session_id, 0)])
    await first.renew([(record.session_id, 1)])
    assert await second.orphans(10) == [record.session_id]


@pytest.mark.parametrize(
    ("reason", "orphaned"), [(ABANDONED, True), (ERROR, False), (CANCELLED, False), ("stop", False)]
)
async def test_what_was_given_up_is_an_orphan_at_once_and_what_ended_never(
    stores: list[RedisStore], redis: Redis, reason: str, orphaned: bool
) -> None:
    first, second = stores
    record = unattended_record()
    await first.create(record)
    await first.finish(record.session_id, reason, owner=0)
    assert await second.orphans(10) == ([record.session_id] if orphaned else [])
    await redis.zadd(UNATTENDED, {record.session_id: 1})  # as after a crash in between
    if orphaned:
        assert (await second.claim(record.session_id, orphaned_only=True)).finish_reason == ""
        return
    with pytest.raises(LeaseLost, match="ended"):
        await second.claim(record.session_id, orphaned_only=True)
    assert await redis.zscore(UNATTENDED, record.session_id) is None


async def test_the_index_holds_no_attended_session_and_forgets(
    stores: list[RedisStore], redis: Redis
) -> None:
    attended, gone = record_of(), uuid.uuid4().hex
    await stores[0].create(attended)
    await redis.zadd(UNATTENDED, {gone: 1})
    with pytest.raises(NotFound):
        await stores[0].claim(gone, orphaned_only=True)
    assert await redis.zcard(UNATTENDED) == 0
    ended = unattended_record()
    await stores[0].create(ended)
    assert 0 < await redis.pttl(UNATTENDED) <= (3600 + LEASE_SECONDS) * 1000
    await stores[0].commit(ended.session_id, 0, [1], "stop")
    assert await redis.zcard(UNATTENDED) == 0


async def test_a_repeated_commit_after_a_takeover_is_refused(stores: list[RedisStore]) -> None:
    first, second = stores
    record = record_of()
    await first.create(record)
    await first.commit(record.session_id, 0, [11])
    await second.claim(record.session_id)
    with pytest.raises(LeaseLost):
        await first.commit(record.session_id, 0, [11])
    await first.finish(record.session_id, ABANDONED, owner=0)
    assert (await second.load(record.session_id)).finish_reason == ""


async def test_the_same_number_from_another_holder_is_no_ownership(
    stores: list[RedisStore], redis: Redis
) -> None:
    """After Redis lost a claim it gives the same number out again."""
    first, second = stores
    record = record_of()
    await first.create(record)
    await first.claim(record.session_id)
    await redis.hset(session_keys(record.session_id)[0], "owner", "0")
    await second.claim(record.session_id)
    with pytest.raises(LeaseLost):
        await first.commit(record.session_id, 0, [1], owner=1)
    with pytest.raises(LeaseLost):
        await first.restore(record._replace(owner=1))
    await first.finish(record.session_id, ABANDONED, owner=1)
    assert await second.commit(record.session_id, 0, [2], owner=1) == 1


@pytest.fixture(params=["memory", "redis"])
def restoring(request: pytest.FixtureRequest) -> SessionStore:
    if request.param == "memory":
        return MemoryStore()
    store: RedisStore = request.getfixturevalue("stores")[0]
    return store


def ahead(record: SessionRecord, **changes: object) -> SessionRecord:
    longer = record._replace(epoch=2, token_ids=(*record.token_ids, 11, 12))
    return longer._replace(**changes)  # type: ignore[arg-type]


async def test_a_lost_session_is_put_back(restoring: SessionStore) -> None:
    record = record_of()
    await restoring.restore(ahead(record))
    assert await restoring.load(record.session_id) == ahead(record)
    assert await restoring.commit(record.session_id, 2, [13]) == 3


async def test_an_older_state_gives_way_and_a_newer_one_does_not(restoring: SessionStore) -> None:
    record = record_of()
    await restoring.create(record)
    with pytest.raises(Behind):
        await restoring.commit(record.session_id, 2, [13])
    await restoring.restore(ahead(record))
    await restoring.restore(record)
    assert await restoring.load(record.session_id) == ahead(record)


async def test_what_another_claimed_is_not_put_back(restoring: SessionStore) -> None:
    record = record_of()
    await restoring.create(record)
    await restoring.claim(record.session_id)
    with pytest.raises(LeaseLost):
        await restoring.restore(ahead(record))
    # A number counted without the store does not outdo one that it gave.
    with pytest.raises(LeaseLost):
        await restoring.restore(ahead(record, owner=2), known_owner=0)
    assert (await restoring.load(record.session_id)).epoch == 0


async def test_a_lost_claim_is_put_back(restoring: SessionStore) -> None:
    record = record_of()
    await restoring.create(record)
    await restoring.restore(ahead(record, owner=3))
    assert (await restoring.load(record.session_id)).owner == 3
    with pytest.raises(StaleEpoch):
        await restoring.commit(record.session_id, 2, [13], owner=0)


async def test_what_its_user_ended_is_not_put_back(restoring: SessionStore) -> None:
    record = record_of()
    await restoring.create(record)
    await restoring.finish(record.session_id, CANCELLED)
    with pytest.raises(Cancelled):
        await restoring.restore(ahead(record))
    assert (await restoring.load(record.session_id)).finish_reason == CANCELLED


async def test_the_end_of_the_same_state_is_put_back(restoring: SessionStore) -> None:
    record = record_of()
    await restoring.create(record)
    await restoring.restore(record._replace(finish_reason=ABANDONED))
    assert (await restoring.load(record.session_id)).finish_reason == ABANDONED


async def test_half_a_session_is_none_and_is_put_back_whole(
    stores: list[RedisStore], redis: Redis
) -> None:
    record = record_of()
    await stores[0].create(record)
    await redis.delete(session_keys(record.session_id)[1])
    with pytest.raises(NotFound):
        await stores[0].commit(record.session_id, 0, [1])
    assert not await redis.exists(session_keys(record.session_id)[1])
    await stores[0].restore(ahead(record))
    assert await stores[0].load(record.session_id) == ahead(record)


async def test_operators_see_every_session_once(stores: list[RedisStore], redis: Redis) -> None:
    await redis.flushdb()
    records = [record_of() for _ in range(205)]
    for record in records:
        await stores[0].create(record)
    await stores[0].put_document("response:1", "no session")
    await stores[1].claim(records[0].session_id)
    await stores[1].commit(records[0].session_id, 0, [5], "stop", owner=1)
    found = {each.session_id: each for each in await stores[0].sessions(1000)}
    assert found.keys() == {record.session_id for record in records}
    first, other = found[records[0].session_id], found[records[1].session_id]
    assert (first.owner, first.holder, first.epoch, first.num_tokens) == (1, "router-b", 1, 4)
    assert (first.finish_reason, first.num_prompt_tokens, first.key_id) == ("stop", 3, "k1")
    assert other.holder == "router-a"
    assert 0 < other.lease_seconds <= LEASE_SECONDS < other.ttl_seconds <= 3600
    assert len(await stores[0].sessions(7)) == 7
    ended = await stores[0].sessions(300, SessionFilter(resumable_only=True))
    assert {each.session_id for each in ended} == found.keys() - {records[0].session_id}
    assert not len(await stores[0].sessions(300, SessionFilter(key_id="nobody")))
    # One among many is found with the smallest limit: it filters while it looks.
    await stores[0].finish(records[7].session_id, "length")
    one = SessionFilter(resumable_only=False)
    assert len(await stores[0].sessions(1, one)) == 1


async def test_a_look_through_redis_ends_in_time_and_says_so(
    stores: list[RedisStore], redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    await redis.flushdb()
    for _ in range(205):
        await stores[0].create(record_of())
    monkeypatch.setattr(redis_store, "SCAN_SESSIONS", 100)
    page = await stores[0].sessions(300)
    assert len(page) == 100
    assert "only the first 100" in page.partial_reason


async def test_entries_that_lead_nowhere_do_not_keep_others_from_their_turn(
    stores: list[RedisStore], redis: Redis
) -> None:
    gone = [uuid.uuid4().hex for _ in range(3)]
    record = unattended_record()
    await stores[0].create(record)
    await redis.zadd(UNATTENDED, dict.fromkeys(gone, 1))
    await redis.zadd(UNATTENDED, {record.session_id: 2})
    assert set(await stores[1].orphans(3)) == set(gone)
    assert await stores[1].orphans(3) == [record.session_id]
    # Whoever looks closer finds nothing, and nobody is told of it again.
    for session_id in gone:
        await stores[1].finish(session_id, CANCELLED)
    assert await redis.zrange(UNATTENDED, 0, -1) == [record.session_id.encode()]
