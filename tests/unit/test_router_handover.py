"""A router that ends hands its sessions over: between two rounds, resumable, none of them twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from specinfer import AsyncClient, LeaseLost, RetryPolicy, RouterLeaving, Unavailable
from specinfer.messages import Finished, GenerateEvent, ResumeRequest, Started, TokensEvent
from specinfer.rpc import RESUMES, RESUMES_KEY
from specinfer.testing import FakeReply, FakeRouter, words_of
from specinfer_router.access import Caller
from specinfer_router.admission import AdmissionLimits
from specinfer_router.router import RouterLimits
from specinfer_router.store import ABANDONED, MemoryStore
from tests.kit.router import Bench, collected, request_of, running_router

RESUMING, STAYING = Caller(resumes=True), Caller()
TEXT = " ".join(f"word{number}" for number in range(30))
FAST = RetryPolicy(max_attempts=2, initial_backoff=0.001, max_backoff=0.01)


class AwayStore(MemoryStore):
    """One that cannot be reached."""

    @property
    def away_seconds(self) -> float:
        return 1.0


async def read_until_left(
    bench: Bench, caller: Caller, *, num_tokens: int = 200
) -> tuple[list[GenerateEvent], RouterLeaving | None]:
    """The events of a stream whose router begins to hand over at its third event."""
    events: list[GenerateEvent] = []
    try:
        async for event in bench.router.generate(request_of(max_tokens=num_tokens), caller):
            events.append(event)
            if len(events) == 3:
                await bench.router.drain()
                bench.router.hand_over()
    except RouterLeaving as error:
        return events, error
    return events, None


def tokens_of(events: Sequence[GenerateEvent]) -> tuple[int, ...]:
    return tuple(t for event in events if isinstance(event, TokensEvent) for t in event.token_ids)


async def test_a_stream_whose_reader_resumes_goes_on_at_another_router() -> None:
    async with running_router() as bench:
        whole = await bench.generate(request_of(max_tokens=200))
        head, left = await read_until_left(bench, RESUMING)
        assert left is not None
        assert left.retryable
        assert left.reason == "ROUTER_LEAVING"
        started = head[0]
        assert isinstance(started, Started)
        record = await bench.store.load(started.session_id)
        # Between two rounds: what was committed was told, and nothing is under way.
        assert record.output_ids == tokens_of(head)
        assert record.finish_reason == ABANDONED
        async with asyncio.timeout(5):
            await bench.router.idle()
        store = bench.store
        async with running_router(store=store) as other:
            resumed = ResumeRequest(started.session_id, len(tokens_of(head)))
            rest = [event async for event in other.router.resume(resumed)]
    assert tokens_of(head) + tokens_of(rest) == whole.token_ids


async def test_whoever_does_not_resume_is_served_to_the_end() -> None:
    async with running_router() as bench:
        whole = await bench.generate(request_of(max_tokens=200))
        events, left = await read_until_left(bench, STAYING)
        assert left is None
        assert collected(events).token_ids == whole.token_ids


async def test_nothing_is_handed_over_while_the_store_is_away() -> None:
    async with running_router(store=AwayStore()) as bench:
        events, left = await read_until_left(bench, RESUMING)
        assert left is None
        assert isinstance(events[-1], Finished)


async def test_who_waits_for_a_place_is_sent_elsewhere() -> None:
    limits = RouterLimits(admission=AdmissionLimits(max_streams=1))
    async with running_router(limits=limits) as bench:
        bench.verifiers[0].gate.clear()
        first = bench.router.generate(request_of())
        await anext(first)
        second = asyncio.ensure_future(anext(bench.router.generate(request_of())))
        await asyncio.sleep(0)
        await bench.router.drain()
        with pytest.raises(RouterLeaving):
            await second
        with pytest.raises(RouterLeaving):
            await anext(bench.router.generate(request_of()))
        await first.aclose()


async def test_what_is_left_in_the_end_is_told_and_can_be_resumed() -> None:
    async with running_router() as bench:
        bench.verifiers[0].gate.clear()
        stuck = bench.router.generate(request_of(), STAYING)
        started = await anext(stuck)
        assert isinstance(started, Started)
        along = bench.router.follow(started.session_id)
        await anext(along)
        not_begun = asyncio.ensure_future(anext(bench.router.generate(request_of())))
        await asyncio.sleep(0)
        bench.router.cut()
        for stream in (stuck, along):
            with pytest.raises(RouterLeaving):
                async with asyncio.timeout(5):
                    await anext(stream)
        with pytest.raises(RouterLeaving):
            async with asyncio.timeout(5):
                await not_begun
        assert (await bench.store.load(started.session_id)).finish_reason == ABANDONED
        async with asyncio.timeout(5):
            await bench.router.idle()


async def test_a_client_looks_for_another_router_for_longer_than_it_retries() -> None:
    failures = [FakeReply(error=RouterLeaving("shutting down"))]
    failures += [FakeReply(error=Unavailable("not there yet"))] * 5
    with FakeRouter([*failures, TEXT]) as router:
        async with AsyncClient(router.address, timeout=20, retry=FAST) as client:
            assert (await client.generate("hello")).text == TEXT
    assert len(router.requests) == 7
    assert all(one[RESUMES_KEY] == RESUMES for one in router.metadata)


async def test_a_stream_that_is_handed_over_goes_on_at_its_offset() -> None:
    reply = FakeReply(TEXT, error=RouterLeaving("shutting down"), error_at=7)

    class Leaving(FakeRouter):
        async def resumed_events(
            self, session_id: str, offset: int
        ) -> AsyncIterator[GenerateEvent]:
            self._store.find(session_id).reply = FakeReply(TEXT)
            async for event in super().resumed_events(session_id, offset):
                yield event

    with Leaving(reply) as router:
        async with AsyncClient(router.address, timeout=20, retry=FAST) as client:
            completion = await client.generate("hello")
    assert (completion.text, len(completion.token_ids)) == (TEXT, len(words_of(TEXT)))
    assert [offset for _, offset in router.resumed] == [7]


@pytest.mark.parametrize(
    "policy", [RetryPolicy(max_attempts=1), RetryPolicy(max_attempts=2, handover=0)], ids=str
)
async def test_who_does_not_want_to_be_moved_says_nothing_and_does_not_wait(
    policy: RetryPolicy,
) -> None:
    with FakeRouter([FakeReply(error=RouterLeaving("shutting down"))]) as router:
        async with AsyncClient(router.address, timeout=20, retry=policy) as client:
            with pytest.raises(RouterLeaving):
                await client.generate("hello")
    assert len(router.requests) == policy.max_attempts
    assert not any(RESUMES_KEY in one for one in router.metadata)


async def test_a_reader_that_lost_its_session_does_not_fight_for_it() -> None:
    with FakeRouter(FakeReply(TEXT, error=LeaseLost("taken over"), error_at=7)) as router:
        async with AsyncClient(router.address, timeout=20, retry=FAST) as client:
            with pytest.raises(LeaseLost):
                await client.generate("hello")
    assert (len(router.requests), router.resumed) == (1, [])
