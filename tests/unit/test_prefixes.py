"""Which worker holds which prefix: names of blocks, what a pool tells, and the directory."""

from __future__ import annotations

import random
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
import redis.asyncio

from specinfer import prefixes, redis_registry
from specinfer.errors import Unavailable
from specinfer.prefixes import (
    MAX_CHAIN_BLOCKS,
    HeldPrefix,
    PrefixChanges,
    PrefixPublisher,
    hash_chain,
    hash_key,
)
from specinfer.redis_connection import RedisSettings
from specinfer.redis_registry import RedisPrefixes
from specinfer_engine.blocks import BlockManager
from specinfer_engine.sequence import SequenceState

KEY = hash_key("model")


class MemoryDirectory:
    """A directory that can lose what it knows and be away."""

    def __init__(self) -> None:
        self.blocks: set[bytes] = set()
        self.version = -1
        self.away = False
        self.sizes: list[int] = []

    async def publish(
        self, worker_id: str, version: int, added: Sequence[bytes], removed: Sequence[bytes]
    ) -> bool:
        if self.away:
            raise Unavailable("away")
        self.sizes.append(len(added) + len(removed))
        if version == 0:
            self.blocks = set()
        elif version != self.version:
            return False
        self.blocks = (self.blocks | set(added)) - set(removed)
        self.version = version + 1
        return True

    async def forget(self, worker_id: str) -> None:
        self.blocks, self.version = set(), -1

    async def find(self, worker_ids: Sequence[str], chain: Sequence[bytes]) -> Sequence[HeldPrefix]:
        raise NotImplementedError


@asynccontextmanager
async def directory_at(url: str, group: str = "") -> AsyncIterator[RedisPrefixes]:
    directory = RedisPrefixes(RedisSettings(url), group or uuid.uuid4().hex)
    try:
        yield directory
    finally:
        await directory.close()


def blocks_of(num_blocks: int, seed: int = 0) -> list[bytes]:
    """Names of a chain of blocks."""
    return hash_chain([seed, *range(16 * num_blocks - 1)], 16, KEY)


async def drain(publisher: PrefixPublisher, num_calls: int = 40) -> None:
    for _ in range(num_calls):
        await publisher.publish()


def test_router_and_pool_give_a_block_the_same_name() -> None:
    changes = PrefixChanges()
    pool = BlockManager(8, 4, model_hash="model", changes=changes)
    sequence = SequenceState(pool, range(11))
    sequence.reserve(11)
    sequence.commit(range(11))
    added, removed = changes.take()
    assert (added, removed) == (hash_chain(list(range(11)), 4, KEY), [])
    assert len(added) == 2, "the third block is not full"
    assert changes.take() == ([], [])
    sequence.free()
    pool.drop_cache()
    assert changes.take()[1] == list(reversed(added)), "the end of a chain goes first"


def test_a_chain_is_bounded_and_depends_on_all_that_is_before() -> None:
    assert hash_chain(range(15), 16, KEY) == []
    assert len(hash_chain(range(16 * MAX_CHAIN_BLOCKS + 32), 16, KEY)) == MAX_CHAIN_BLOCKS
    one, other = hash_chain([1, *range(31)], 16, KEY), hash_chain([2, *range(31)], 16, KEY)
    assert not set(one) & set(other)
    assert not set(one) & set(hash_chain([1, *range(31)], 16, hash_key("another model")))


def test_what_comes_and_goes_in_between_is_no_change() -> None:
    changes = PrefixChanges()
    changes.add(b"a")
    changes.remove(b"a")
    assert changes.take() == ([], [])
    changes.add(b"a")
    changes.take()
    changes.remove(b"a")
    changes.add(b"a")
    assert changes.take() == ([], [])


async def test_a_directory_follows_a_pool_through_losses_and_absences() -> None:
    """Whatever happens in between, in the end the directory knows what the pool holds."""
    rng = random.Random(5)
    changes, directory = PrefixChanges(), MemoryDirectory()
    publisher = PrefixPublisher(directory, "w", changes)
    held: set[bytes] = set()
    names = blocks_of(300)
    for _ in range(600):
        block = rng.choice(names)
        if block in held:
            held.remove(block)
            changes.remove(block)
        else:
            held.add(block)
            changes.add(block)
        what = rng.random()
        if what < 0.1:
            directory.away = not directory.away
        elif what < 0.13:
            await directory.forget("w")
        elif what < 0.6:
            try:
                await publisher.publish()
            except Unavailable:
                continue
    directory.away = False
    await drain(publisher)
    assert directory.blocks == held
    assert held


async def test_an_answer_that_was_lost_costs_a_new_beginning_and_nothing_else() -> None:
    changes, directory = PrefixChanges(), MemoryDirectory()
    publisher = PrefixPublisher(directory, "w", changes)
    first, second = blocks_of(2)
    changes.add(first)
    await publisher.publish()
    # It was written, and the worker does not know.
    await directory.publish("w", 1, [second], [])
    changes.add(second)
    await drain(publisher, 3)
    assert directory.blocks == {first, second}


async def test_what_is_told_at_once_and_in_all_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefixes, "MAX_CHANGES", 7)
    monkeypatch.setattr(prefixes, "MAX_PUBLISHED_BLOCKS", 20)
    changes, directory = PrefixChanges(), MemoryDirectory()
    publisher = PrefixPublisher(directory, "w", changes)
    names = blocks_of(30)
    for name in names:
        changes.add(name)
    await drain(publisher)
    assert directory.blocks == set(names[:20])
    assert max(directory.sizes) == 7
    for name in names:
        changes.remove(name)
    await drain(publisher)
    assert directory.blocks == set()


async def test_the_longest_beginning_is_found(redis_server: str) -> None:
    async with directory_at(redis_server) as directory:
        chain, other = blocks_of(40), blocks_of(40, seed=1)
        assert await directory.publish("long", 0, chain[:33], [])
        assert await directory.publish("short", 0, [*chain[:2], *other], [])
        assert await directory.publish("none", 0, other, [])
        found = await directory.find(["long", "short", "none", "unknown"], chain)
        assert [held.num_blocks for held in found] == [33, 2, 0, 0]
        assert found[0].since > 1_600_000_000
        assert found[2:] == [HeldPrefix(), HeldPrefix()]
        assert [h.num_blocks for h in await directory.find(["long"], chain[:1])] == [1]


async def test_changes_apply_to_the_version_they_were_made_for(redis_server: str) -> None:
    async with directory_at(redis_server) as directory:
        chain = blocks_of(3)
        assert not await directory.publish("w", 1, chain, [])
        assert await directory.publish("w", 0, chain, [])
        assert await directory.publish("w", 1, [], chain[2:])
        assert not await directory.publish("w", 1, [], chain)
        assert (await directory.find(["w"], chain))[0].num_blocks == 2
        await directory.forget("w")
        assert (await directory.find(["w"], chain))[0].num_blocks == 0
        assert not await directory.publish("w", 2, [], [])


async def test_a_worker_s_part_expires(redis_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_registry, "PREFIX_SECONDS", 5.0)
    group = uuid.uuid4().hex
    client = redis.asyncio.from_url(redis_server)
    async with directory_at(redis_server, group) as directory:
        await directory.publish("w", 0, blocks_of(3), [])
        (key,) = await client.keys(f"specinfer:{{workers:{group}}}:prefixes:*")
        assert 0 < await client.pttl(key) <= 5000
        assert await client.hlen(key) == 4
    await client.aclose()


async def test_a_large_pool_is_told_in_pieces(redis_server: str) -> None:
    async with directory_at(redis_server) as directory:
        changes = PrefixChanges()
        publisher = PrefixPublisher(directory, "w", changes)
        chain = hash_chain(range(2000), 2, KEY)
        others = [number.to_bytes(16, "big") for number in range(5000)]
        for name in (*chain, *others):
            changes.add(name)
        await drain(publisher, 4)
        assert (await directory.find(["w"], chain))[0].num_blocks == len(chain)
