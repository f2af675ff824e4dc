"""The store has lost a session: the client makes the same request again and goes on in it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest

from specinfer import AsyncClient, Completion, Mismatch, NotFound, RetryPolicy, Unavailable
from specinfer.completion import CompletionBuilder
from specinfer.errors import InternalError
from specinfer.messages import GenerateEvent, GenerateRequest, Started, TokensEvent
from specinfer.testing import FakeReply, FakeRouter, words_of

pytestmark = pytest.mark.usefixtures("both_kinds_of_call")

FAST = RetryPolicy(max_attempts=3, initial_backoff=0.001, max_backoff=0.01)
TEXT = " ".join(f"word{number}" for number in range(60))
NUM_TOKENS = len(words_of(TEXT))


class Forgetful(FakeRouter):
    """Forgets each session at the first calls to resume it."""

    num_forgotten = 1

    async def resumed_events(self, session_id: str, offset: int) -> AsyncIterator[GenerateEvent]:
        if len(self.resumed) <= self.num_forgotten:
            raise NotFound("no such session")
        async for event in super().resumed_events(session_id, offset):
            yield event


async def read(router: FakeRouter, policy: RetryPolicy = FAST) -> Completion:
    """What a reader gets of a stream; fails unless each token comes once."""
    with router:
        async with (
            AsyncClient(router.address, timeout=20, retry=policy) as client,
            client.stream("hello", logprobs=1) as stream,
        ):
            offset = 0
            async for event in stream:
                assert event.offset == offset
                assert event.token_ids
                offset += len(event.token_ids)
    token = stream.resume_token
    assert token == (stream.completion.session_id, NUM_TOKENS)
    return stream.completion


async def unbroken() -> Completion:
    with FakeRouter(TEXT) as router:
        async with AsyncClient(router.address) as client:
            return await client.generate("hello", logprobs=1)


@pytest.mark.parametrize("offset", [1, 2, 3, 7, 30, 58, NUM_TOKENS])
async def test_a_lost_session_is_made_again_without_a_seam(offset: int) -> None:
    router = Forgetful([FakeReply(TEXT, break_at=(offset,)), TEXT])
    joined = await read(router)
    whole = await unbroken()
    assert joined.text == whole.text
    assert joined.token_ids == whole.token_ids
    assert joined.logprobs == whole.logprobs
    assert joined.usage == whole.usage
    assert joined.finish_reason == whole.finish_reason
    # It was resumed, in vain, and asked for anew with the seed that had been drawn.
    assert [at for _, at in router.resumed] == [offset]
    _, again = router.requests
    assert not again.random_seed
    assert again.sampling.seed == joined.seed == whole.seed


async def test_it_may_break_while_known_tokens_are_passed_over() -> None:
    replies = [FakeReply(TEXT, break_at=(12,)), FakeReply(TEXT, break_at=(4, 20))]
    router = Forgetful(replies)
    assert (await read(router)).text == TEXT
    assert [at for _, at in router.resumed] == [12, 12, 20]
    assert len(router.requests) == 2


async def test_what_gets_lost_without_end_is_given_up() -> None:
    replies = [FakeReply(TEXT, break_at=(12,)), FakeReply(TEXT, break_at=(4,))]
    router = Forgetful(replies)
    router.num_forgotten = 99
    with pytest.raises(Unavailable):
        await read(router)
    assert len(router.requests) == 2


async def test_whoever_does_not_want_it_gets_the_error_that_broke_the_stream() -> None:
    router = Forgetful([FakeReply(TEXT, break_at=(7,)), TEXT])
    with pytest.raises(Unavailable) as broken:
        await read(router, replace(FAST, regenerate=False))
    assert isinstance(broken.value.__cause__, NotFound)
    assert len(router.requests) == 1


async def test_a_stream_of_another_process_is_not_made_again() -> None:
    with FakeRouter(TEXT) as router:
        async with AsyncClient(router.address, retry=FAST) as client:
            with pytest.raises(NotFound):
                await client.resume("nobody", 3).collect()
    assert router.requests == []


def changed(change: Callable[[GenerateEvent], GenerateEvent]) -> type[FakeRouter]:
    class Changed(Forgetful):
        async def events(self, request: GenerateRequest) -> AsyncIterator[GenerateEvent]:
            second = len(self.requests) == 2
            async for event in super().events(request):
                yield change(event) if second else event

    return Changed


def another_model(event: GenerateEvent) -> GenerateEvent:
    return replace(event, model_hash="b" * 64) if isinstance(event, Started) else event


def another_prompt(event: GenerateEvent) -> GenerateEvent:
    return replace(event, num_prompt_tokens=99) if isinstance(event, Started) else event


def other_tokens(event: GenerateEvent) -> GenerateEvent:
    if isinstance(event, TokensEvent) and event.offset == 3:
        return event._replace(token_ids=(1, *event.token_ids[1:]))
    return event


def another_text(event: GenerateEvent) -> GenerateEvent:
    if isinstance(event, TokensEvent) and event.offset == 0:
        return event._replace(text="other words ")
    return event


@pytest.mark.parametrize("change", [another_model, another_prompt, other_tokens, another_text])
async def test_another_answer_is_an_error_and_never_joined(
    change: Callable[[GenerateEvent], GenerateEvent],
) -> None:
    router = changed(change)([FakeReply(TEXT, break_at=(7,)), TEXT])
    with pytest.raises(Mismatch, match="made again"):
        await read(router)


async def test_a_shorter_answer_is_an_error() -> None:
    with pytest.raises(Mismatch, match="fewer tokens"):
        await read(Forgetful([FakeReply(TEXT, break_at=(7,)), "word0 word1"]))


async def test_a_gap_in_what_comes_again_is_found_out() -> None:
    builder = CompletionBuilder()
    with FakeRouter(TEXT) as router:
        async with AsyncClient(router.address) as client, client.stream("hello") as stream:
            events = [event async for event in stream]
            started = stream.started
    assert started is not None
    builder.add(started)
    for event in events[:4]:
        builder.add(event)
    builder.repeated()
    builder.add(started)
    assert builder.add(events[0]) is None
    with pytest.raises(InternalError, match="was due"):
        builder.add(events[2])
