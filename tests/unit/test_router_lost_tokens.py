"""A reader has more tokens than its store: they are made again, and it sees none of them twice."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from specinfer.errors import InvalidRequest
from specinfer.messages import Finished, GenerateRequest, ResumeRequest, Started, TokensEvent
from specinfer_router.session import Session
from specinfer_router.store import ABANDONED, MemoryStore
from tests.kit.fake_workers import FakeVerifier, info_of
from tests.kit.router import Bench, Generated, request_of, running_router

NUM_TOKENS = 60


async def whole_of(request: GenerateRequest) -> tuple[Generated, Bench]:
    """What an unbroken stream brings, and the bench that made it."""
    async with running_router() as bench:
        return await bench.generate(request), bench


async def forgetful_store(bench: Bench, whole: Generated, num_tokens: int) -> MemoryStore:
    """What a store holds of a stream that has lost all but the first tokens of its output."""
    record = await bench.store.load(whole.started.session_id)
    store = MemoryStore()
    prompt = record.token_ids[: record.terms.num_prompt_tokens]
    await store.create(record._replace(token_ids=prompt, epoch=0, owner=0, finish_reason=""))
    if num_tokens:
        await store.commit(record.session_id, 0, whole.token_ids[:num_tokens])
    await store.finish(record.session_id, ABANDONED)
    return store


async def resumed(
    store: MemoryStore, session_id: str, offset: int, *, whole: bool = False
) -> tuple[list[TokensEvent], Finished]:
    async with running_router(store=store) as bench:
        request = ResumeRequest(session_id, offset)
        started, *rounds, finished = [
            event async for event in bench.router.resume(request, whole=whole)
        ]
    assert isinstance(started, Started)
    assert isinstance(finished, Finished)
    return [event for event in rounds if isinstance(event, TokensEvent)], finished


def text_before(whole: Generated, offset: int) -> str:
    """Text that a reader has who stopped at an offset where one of its events ended."""
    return "".join(e.text for e in whole.rounds if e.offset + len(e.token_ids) <= offset)


def joined(whole: Generated, offset: int, rest: Sequence[TokensEvent]) -> tuple[list[int], str]:
    token_ids = [*whole.token_ids[:offset], *(t for event in rest for t in event.token_ids)]
    return token_ids, text_before(whole, offset) + "".join(event.text for event in rest)


@pytest.mark.parametrize("stops", [(), "late", "never"], ids=["none", "late", "never"])
async def test_lost_tokens_are_made_again_and_not_shown(stops: str | tuple[str, ...]) -> None:
    request = request_of(max_tokens=NUM_TOKENS)
    unbroken, _ = await whole_of(request)
    if stops:
        # Both are held back again and again: one is found in the end, one is not.
        late = unbroken.text[-12:-4]
        stop = (late,) if stops == "late" else (unbroken.text[:6] + "~", late[:5] + "~")
        request = request_of(max_tokens=NUM_TOKENS, stop=stop)
    unbroken, bench = await whole_of(request)
    chance = random.Random(7)
    ends = [event.offset + len(event.token_ids) for event in unbroken.rounds[:-1]]
    for offset in chance.sample(ends, min(8, len(ends))):
        kept = chance.randrange(offset)
        store = await forgetful_store(bench, unbroken, kept)
        rest, finished = await resumed(store, unbroken.started.session_id, offset)
        assert rest[0].offset == offset, (kept, offset)
        token_ids, text = joined(unbroken, offset, rest)
        assert tuple(token_ids) == unbroken.token_ids, (kept, offset)
        assert text == unbroken.text, (kept, offset)
        assert finished.reason == unbroken.finished.reason
        assert finished.usage.num_completion_tokens == len(unbroken.token_ids)
        record = await store.load(unbroken.started.session_id)
        assert record.output_ids == unbroken.token_ids


async def test_a_round_that_went_on_into_new_tokens_would_be_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Negative control: without the bound rounds straddle the offset, and tokens are missing."""
    unbroken, bench = await whole_of(request_of(max_tokens=NUM_TOKENS))
    monkeypatch.setattr(Session, "_max_depth", property(lambda self: self._completion.num_left - 1))
    missed = 0
    for kept in range(1, 12):
        store = await forgetful_store(bench, unbroken, kept)
        rest, _ = await resumed(store, unbroken.started.session_id, 20)
        missed += joined(unbroken, 20, rest)[0] != list(unbroken.token_ids)
    assert missed


async def test_logprobs_after_lost_tokens_are_those_of_the_unbroken_stream() -> None:
    request = replace(request_of(max_tokens=NUM_TOKENS), num_logprobs=2)
    unbroken, bench = await whole_of(request)
    all_of_them = [one for event in unbroken.rounds for one in event.logprobs]
    for kept, offset in ((0, 1), (3, 17), (12, 41), (20, 12)):
        store = await forgetful_store(bench, unbroken, kept)
        rest, _ = await resumed(store, unbroken.started.session_id, offset)
        assert [one for event in rest for one in event.logprobs] == all_of_them[offset:]


@pytest.mark.parametrize(("kept", "offset"), [(0, 9), (5, 23), (30, 23), (23, 23), (0, 0)])
async def test_what_comes_before_the_offset_can_be_told_too(kept: int, offset: int) -> None:
    unbroken, bench = await whole_of(request_of(max_tokens=NUM_TOKENS))
    store = await forgetful_store(bench, unbroken, kept)
    events, _ = await resumed(store, unbroken.started.session_id, offset, whole=True)
    assert tuple(t for event in events for t in event.token_ids) == unbroken.token_ids
    assert "".join(event.text for event in events) == unbroken.text
    ends = {event.offset + len(event.token_ids) for event in events}
    assert offset in ends | {0}


async def test_an_offset_that_cannot_be_reached_is_refused() -> None:
    unbroken, bench = await whole_of(request_of(max_tokens=NUM_TOKENS))
    session_id = unbroken.started.session_id
    store = await forgetful_store(bench, unbroken, 4)
    with pytest.raises(InvalidRequest) as refused:
        await resumed(store, session_id, NUM_TOKENS + 1)
    assert refused.value.field == "offset"
    # Nothing is lost by asking wrongly.
    assert (await resumed(store, session_id, NUM_TOKENS))[1].reason == "length"
    # One that has ended has no more tokens than it has.
    with pytest.raises(InvalidRequest):
        await resumed(bench_store(bench), session_id, NUM_TOKENS + 1)


def bench_store(bench: Bench) -> MemoryStore:
    assert isinstance(bench.store, MemoryStore)
    return bench.store


async def test_a_session_that_ends_before_the_offset_says_so() -> None:
    verifier = FakeVerifier(info_of("verify"), eos_at=12)
    async with running_router(verifiers=[verifier]) as bench:
        short = await bench.generate(request_of(max_tokens=NUM_TOKENS))
        assert short.finished.reason == "stop"
        store = await forgetful_store(bench, short, 5)
    verifier = FakeVerifier(info_of("verify"), eos_at=12)
    async with running_router(verifiers=[verifier], store=store) as bench:
        with pytest.raises(InvalidRequest, match="offset 20"):
            async for _ in bench.router.resume(ResumeRequest(short.started.session_id, 20)):
                pass
        record = await store.load(short.started.session_id)
        assert record.finish_reason == "stop"
        # The stream itself can still be read.
        again = bench.router.resume(ResumeRequest(short.started.session_id, 0))
        tokens = [t async for e in again if isinstance(e, TokensEvent) for t in e.token_ids]
        assert tuple(tokens) == short.token_ids
