"""Which worker a session goes to: load, trust, a prompt's beginning, and an affinity key."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, cast

import pytest

from specinfer.errors import Unavailable
from specinfer.prefixes import HeldPrefix, hash_chain, hash_key
from specinfer_router.prefix_lookup import REST_SECONDS, PrefixLookup
from tests.kit.fake_link import FakeLink, pool_of
from tests.kit.fake_workers import info_of

TOKENS = tuple(range(50))


class FakeDirectory:
    """Answers what it was told, or does not."""

    def __init__(self, held: Mapping[str, int] | None = None) -> None:
        self.held = dict(held or {})
        self.asked: list[tuple[list[str], list[bytes]]] = []
        self.away = False
        self.hangs = False

    async def publish(
        self, worker_id: str, version: int, added: Sequence[bytes], removed: Sequence[bytes]
    ) -> bool:
        raise NotImplementedError

    async def forget(self, worker_id: str) -> None:
        raise NotImplementedError

    async def find(self, worker_ids: Sequence[str], chain: Sequence[bytes]) -> Sequence[HeldPrefix]:
        self.asked.append((list(worker_ids), list(chain)))
        if self.hangs:
            await asyncio.Event().wait()
        if self.away:
            raise Unavailable("away")
        return [HeldPrefix(self.held.get(name, 0)) for name in worker_ids]


def test_the_longest_prefix_is_followed_within_the_load_bound() -> None:
    short, long, none = FakeLink("short"), FakeLink("long"), FakeLink("none")
    pool = pool_of(short, long, none)
    held = {"short": 2, "long": 9}
    assert pool.choose(held=held) is long
    long.num_seats = 1
    assert pool.choose(held=held) is long, "one session more than the others is no reason"
    long.num_seats = 4
    assert pool.choose(held=held) is short, "the next longest"
    long.num_seats = short.num_seats = 9
    assert pool.choose(held=held) is none, "load wins over any prefix"


def test_the_prefix_is_looked_at_before_the_affinity_key() -> None:
    links = [FakeLink(name) for name in "abcdef"]
    pool = pool_of(*links)
    by_key = pool.choose(affinity_key="somebody")
    assert by_key is not None
    for link in links:
        assert pool.choose(affinity_key="somebody", held={link.address: 1}) is link
    assert pool.choose(affinity_key="somebody", held={"elsewhere": 5}) is by_key
    assert pool.choose(affinity_key="somebody", held={}) is by_key


def test_of_equal_holders_the_least_loaded_is_taken() -> None:
    busy, idle, other = FakeLink("busy", 1), FakeLink("idle"), FakeLink("other")
    assert pool_of(busy, idle, other).choose(held={"busy": 3, "idle": 3}) is idle


@pytest.mark.parametrize("flaw", ["trusted", "ready"])
def test_a_prefix_does_not_lead_to_a_worker_in_doubt(flaw: str) -> None:
    holder, other = FakeLink("holder"), FakeLink("other")
    setattr(holder, flaw, False)
    assert pool_of(holder, other).choose(held={"holder": 5}) is other


def test_a_worker_that_seems_to_have_left_comes_last() -> None:
    holder, other = FakeLink("holder"), FakeLink("other", 40)
    pool = pool_of(holder, other)
    pool.doubt(cast(Any, holder), doubted=True)
    assert pool.choose(held={"holder": 5}) is other
    other.ready = False
    assert pool.choose() is holder, "better than none"
    pool.doubt(cast(Any, holder), doubted=False)
    other.ready = True
    assert pool.choose() is holder


async def test_waiting_asks_who_holds_the_prompt() -> None:
    directory = FakeDirectory({"b": 2})
    a, b = FakeLink("a"), FakeLink("b")
    pool = pool_of(a, b, prefixes=PrefixLookup(directory, budget_seconds=5.0))
    assert await pool.wait(seconds=1, token_ids=TOKENS) is b
    ((names, chain),) = directory.asked
    assert names == ["a", "b"]
    assert chain == hash_chain(TOKENS, 16, hash_key("model"))


async def test_nobody_is_asked_without_a_block_or_a_choice() -> None:
    directory = FakeDirectory({"b": 2})
    a, b = FakeLink("a"), FakeLink("b")
    pool = pool_of(a, b, prefixes=PrefixLookup(directory, budget_seconds=5.0))
    await pool.wait(seconds=1, token_ids=TOKENS[:15])
    b.ready = False
    assert await pool.wait(seconds=1, token_ids=TOKENS) is a
    assert directory.asked == []


async def test_only_workers_with_blocks_of_one_size_are_asked_about() -> None:
    directory = FakeDirectory()
    links = [FakeLink("a"), FakeLink("b", block_size=32), FakeLink("c")]
    await pool_of(*links, prefixes=PrefixLookup(directory)).wait(seconds=1, token_ids=TOKENS)
    assert directory.asked[0][0] == ["a", "c"]


@pytest.mark.parametrize("failure", ["away", "hangs"])
async def test_a_directory_that_does_not_answer_costs_little_and_is_left_alone(
    failure: str,
) -> None:
    now = [100.0]
    directory = FakeDirectory({"b": 2})
    setattr(directory, failure, True)
    lookup = PrefixLookup(directory, budget_seconds=0.01, clock=lambda: now[0])
    infos = [info_of("a"), info_of("b")]
    assert await lookup.held(infos, TOKENS) == {}
    setattr(directory, failure, False)
    assert await lookup.held(infos, TOKENS) == {}
    assert len(directory.asked) == 1, "not asked again so soon"
    now[0] += REST_SECONDS
    assert await lookup.held(infos, TOKENS) == {"b": 2}
