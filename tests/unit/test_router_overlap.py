"""The next propose leaves beside the commit, and what was not committed is never shown."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest

from specinfer.errors import Cancelled, Unavailable
from specinfer.messages import Finished, GenerateEvent, TokensEvent
from specinfer_router.store import MemoryStore
from tests.kit.fake_drafter import FakeDrafter
from tests.kit.fake_workers import continuation, info_of
from tests.kit.router import PROMPT, Bench, request_of, running_router
from tests.kit.waiting import until


class HeldStore(MemoryStore):
    """A store whose commits wait for `gate`, and fail with `error` from the second on."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.error = error
        self.num_commits = 0
        self.begun: Callable[[], None] = lambda: None

    async def commit(
        self,
        session_id: str,
        epoch: int,
        token_ids: Sequence[int],
        finish_reason: str = "",
        *,
        owner: int = 0,
    ) -> int:
        self.num_commits += 1
        self.begun()
        await self.gate.wait()
        if self.error is not None and self.num_commits > 1:
            raise self.error
        return await super().commit(session_id, epoch, token_ids, finish_reason, owner=owner)


async def read(bench: Bench, events: list[GenerateEvent]) -> None:
    async for event in bench.router.generate(request_of()):
        events.append(event)


def shown(events: list[GenerateEvent]) -> list[int]:
    return [token for e in events if isinstance(e, TokensEvent) for token in e.token_ids]


async def drafter_is_left(bench: Bench, num_closes: int = 1) -> None:
    """Nobody sits at the drafter any more, and it was told so."""
    await bench.drafters[0].wait_for("close", num_closes)
    links = bench.cluster.drafters.links
    await until(lambda: not any(link.num_seats for link in links), "nobody sits at the drafter")


async def test_the_next_propose_leaves_before_the_commit_is_done() -> None:
    store, events = HeldStore(), list[GenerateEvent]()
    async with running_router(store=store) as bench:
        reading = asyncio.create_task(read(bench, events))
        await bench.drafters[0].wait_for("propose", 2)
        assert store.num_commits == 1
        assert shown(events) == [], "nothing is shown before it is committed"
        store.gate.set()
        await reading
        assert tuple(shown(events)) == continuation(PROMPT, 40, seed=3)


async def test_the_next_propose_is_on_the_wire_when_the_commit_begins() -> None:
    store, waiting = HeldStore(), list[int]()
    store.gate.set()
    async with running_router(store=store) as bench:
        (link,) = bench.cluster.drafters.links
        store.begun = lambda: waiting.append(len(link._outbox))
        await bench.generate(request_of())
        assert len(waiting) > 3
        assert set(waiting) == {0}


async def test_nothing_is_asked_for_after_the_end() -> None:
    store = HeldStore()
    store.gate.set()
    async with running_router(store=store) as bench:
        result = await bench.generate(request_of(max_tokens=40))
        asked = [reason for reason in result.reasons if reason != "budget"]
        await drafter_is_left(bench)
        assert bench.drafters[0].num_proposes == len(asked)


@pytest.mark.parametrize("error", [Unavailable("the store is away"), Cancelled("by its user")])
async def test_a_commit_that_fails_drops_the_propose_and_its_tokens(error: Exception) -> None:
    store, events = HeldStore(error), list[GenerateEvent]()
    store.gate.set()
    async with running_router(store=store) as bench:
        if isinstance(error, Cancelled):
            await read(bench, events)
            finished = events[-1]
            assert isinstance(finished, Finished)
            assert finished.reason == "cancelled"
            assert finished.usage.num_completion_tokens == len(shown(events))
        else:
            with pytest.raises(Unavailable):
                await read(bench, events)
        # One round was committed and shown; the second round's tokens and third's tree are gone.
        assert len([e for e in events if isinstance(e, TokensEvent)]) == 1
        await drafter_is_left(bench)
        assert bench.drafters[0].num_proposes == 3


async def test_a_reader_who_leaves_during_a_commit_leaves_nothing_behind() -> None:
    store, events = HeldStore(), list[GenerateEvent]()
    async with running_router(store=store) as bench:
        reading = asyncio.create_task(read(bench, events))
        await bench.drafters[0].wait_for("propose", 2)
        reading.cancel()
        store.gate.set()
        await asyncio.wait([reading])
        await drafter_is_left(bench)
        assert tuple(shown(events)) == ()


async def test_what_passed_beside_the_commit_is_not_counted_as_waiting() -> None:
    store = HeldStore()
    drafter = FakeDrafter(info_of("draft"), slow_actions=frozenset({"propose"}), slow_seconds=0.03)
    async with running_router(store=store, drafters=[drafter]) as bench:
        events: list[GenerateEvent] = []
        reading = asyncio.create_task(read(bench, events))
        await drafter.wait_for("propose", 2)
        await until(lambda: drafter.num_proposes == 2, "the second tree is grown")
        await asyncio.sleep(0.05)  # what the commit takes longer than the tree
        store.gate.set()
        await reading
    first, second, *rest = [e.round for e in events if isinstance(e, TokensEvent)]
    assert first.commit_seconds > 0.05
    assert first.network_seconds > 0.025, "the first tree was waited for"
    assert second.network_seconds < 0.02, "the second was there already"
    assert any(facts.network_seconds > 0.025 for facts in rest)
