"""Streams that break go on where they broke: each token once, through any router."""

from __future__ import annotations

import random
import socket
from collections.abc import AsyncIterator, Iterator

import grpc.aio
import pytest

from specinfer import (
    AsyncClient,
    Cancelled,
    Client,
    Completion,
    InternalError,
    InvalidRequest,
    NotFound,
    ReaderStalled,
    ResumeToken,
    RetryPolicy,
    RoundFacts,
    Unavailable,
)
from specinfer.completion import CompletionBuilder, summary_of
from specinfer.messages import GenerateEvent
from specinfer.rpc import call_error, error_metadata
from specinfer.testing import FakeReply, FakeRouter, FakeStore, words_of
from tests.kit.link_breaker import broken_link

pytestmark = pytest.mark.usefixtures("both_kinds_of_call")

FAST = RetryPolicy(max_attempts=3, initial_backoff=0.001, max_backoff=0.01)
TEXT = " ".join(f"word{number}" for number in range(60))
NUM_TOKENS = len(words_of(TEXT))


@pytest.fixture
def unused() -> Iterator[str]:
    """An address at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{probe.getsockname()[1]}"


def same(joined: Completion, whole: Completion) -> None:
    assert joined.text == whole.text
    assert joined.token_ids == whole.token_ids
    assert joined.logprobs == whole.logprobs
    assert joined.usage == whole.usage
    assert joined.finish_reason == whole.finish_reason


async def test_a_broken_stream_goes_on_at_its_offset() -> None:
    reply = FakeReply(TEXT, break_at=(1, 7, 30, NUM_TOKENS))
    with FakeRouter([TEXT, reply]) as router:
        async with AsyncClient(router.address, timeout=20, retry=FAST) as client:
            whole = await client.generate("hello", seed=1, logprobs=2)
            async with client.stream("hello", seed=1, logprobs=2) as stream:
                events = [event async for event in stream]
    same(stream.completion, whole)
    assert [offset for _, offset in router.resumed] == [1, 7, 30, NUM_TOKENS]
    assert [event.offset for event in events] == [
        sum(len(earlier.token_ids) for earlier in events[:number]) for number in range(len(events))
    ]
    assert len(router.requests) == 2
    assert stream.resume_token == (stream.completion.session_id, NUM_TOKENS)


@pytest.mark.parametrize("said", [True, False])
def test_a_cancellation_is_a_cut_stream_unless_the_router_says_so(said: bool) -> None:
    """A server that goes away under a call cancels it, and gives no reason."""
    detail = error_metadata(Cancelled("cancelled by an operator")) if said else ()
    error = grpc.aio.AioRpcError(
        grpc.StatusCode.CANCELLED, grpc.aio.Metadata(), grpc.aio.Metadata(*detail), "CANCELLED"
    )
    found = call_error(error)
    assert isinstance(found, Cancelled if said else Unavailable)
    assert found.retryable is not said


async def test_the_summary_of_a_resumed_stream_counts_all_parts() -> None:
    with FakeRouter([FakeReply(TEXT, break_at=(6, 12))]) as router:
        async with AsyncClient(router.address, retry=FAST) as client:
            completion = await client.generate("hello")
    summary = completion.speculation
    assert summary.num_rounds == len(completion.rounds) == NUM_TOKENS // 3
    assert summary.num_accepted_tokens == NUM_TOKENS - summary.num_rounds
    assert summary.num_accepted_tokens_per_pos == (20, 20)


def test_a_summary_is_that_of_its_rounds() -> None:
    summary = summary_of([RoundFacts(1, 4, 3), RoundFacts(2, 4, 1), RoundFacts(3, 0, 0, "late")])
    assert (summary.num_rounds, summary.num_drafts, summary.num_draft_tokens) == (3, 2, 8)
    assert summary.num_accepted_tokens_per_pos == (2, 1, 1)
    assert summary.root_only_reasons == (("late", 1),)
    assert summary_of([]).num_accepted_tokens_per_pos == ()


@pytest.mark.parametrize("seed", range(20))
async def test_a_torn_connection_loses_and_repeats_nothing(seed: int) -> None:
    offset = random.Random(seed).randrange(1, NUM_TOKENS)
    # The fake waits at the offset, so that the rest is not already on its way to the client.
    reply = FakeReply(TEXT, stall_at=offset)
    with FakeRouter([TEXT, reply]) as router:
        async with (
            broken_link(router.address) as link,
            AsyncClient(link.address, timeout=20, retry=FAST) as client,
        ):
            whole = await client.generate("hello", seed=1, logprobs=1)
            stream = client.stream("hello", seed=1, logprobs=1)
            async for event in stream:
                if event.offset + len(event.token_ids) == offset:
                    await link.cut()
    same(stream.completion, whole)
    assert link.num_connections == 2
    assert router.resumed == [(stream.completion.session_id, offset)]


async def test_another_router_takes_over_a_stream() -> None:
    store = FakeStore()
    with FakeRouter(FakeReply(TEXT, stall_at=9), store=store) as first:
        with FakeRouter(store=store) as second:
            addresses = [first.address, second.address]
            async with AsyncClient(addresses, timeout=20, retry=FAST) as client:
                stream = client.stream("hello")
                async for event in stream:
                    if event.offset + len(event.token_ids) == 9:
                        first.close()
        assert stream.completion.text == TEXT
        assert (len(first.requests), len(first.resumed)) == (1, 0)
        assert (len(second.requests), len(second.resumed)) == (0, 1)


async def test_a_router_that_is_gone_is_passed_over(unused: str) -> None:
    once = RetryPolicy(max_attempts=1)
    with FakeRouter("hello") as router:
        async with AsyncClient([unused, router.address], timeout=20, retry=once) as client:
            assert (await client.generate("hi")).text == "hello"
            assert (await client.capabilities()).model == "fake"
        async with AsyncClient([unused, unused], timeout=20, retry=once) as client:
            with pytest.raises(Unavailable):
                await client.generate("hi")


async def test_a_router_that_refuses_is_passed_over_too() -> None:
    once = RetryPolicy(max_attempts=1)
    with FakeRouter(FakeReply(error=Unavailable("draining"))) as full, FakeRouter("hello") as free:
        async with AsyncClient([full.address, free.address], timeout=20, retry=once) as client:
            for _ in range(3):
                assert (await client.generate("hi")).text == "hello"
    assert (len(full.requests), len(free.requests)) == (1, 3)


async def test_silence_is_a_break() -> None:
    reply = FakeReply(TEXT, stall_at=5)
    with FakeRouter(reply) as router:
        async with AsyncClient(
            router.address, timeout=20, attempt_timeout=0.1, retry=FAST
        ) as client:
            assert (await client.generate("hello")).text == TEXT
    assert [offset for _, offset in router.resumed] == [5]
    assert router.cancelled.wait(10)


async def test_silence_before_the_first_event_begins_again() -> None:
    with FakeRouter([FakeReply(TEXT, stall_at=0), TEXT]) as router:
        async with AsyncClient(router.address, timeout=20, retry=FAST) as client:
            completion = await client.generate("hello", attempt_timeout=0.5)
            assert completion.text == TEXT
    assert (len(router.requests), len(router.resumed)) == (2, 0)


async def test_a_reader_that_was_cut_off_resumes() -> None:
    class Stalling(FakeRouter):
        async def events(self, request: object) -> AsyncIterator[GenerateEvent]:
            async for event in super().events(self.requests[-1]):
                yield event
                if getattr(event, "offset", 0) >= 6:
                    raise ReaderStalled("nobody read this")

    with Stalling(TEXT) as router:
        async with AsyncClient(router.address, timeout=20, retry=FAST) as client:
            assert (await client.generate("hello")).text == TEXT
    assert [offset for _, offset in router.resumed] == [9]


async def test_progress_renews_the_attempts_and_nothing_else_does() -> None:
    with FakeRouter(FakeReply(TEXT, break_at=tuple(range(1, NUM_TOKENS)))) as router:
        async with AsyncClient(router.address, timeout=20, retry=FAST) as client:
            assert (await client.generate("hello")).text == TEXT
    assert len(router.resumed) == NUM_TOKENS - 1
    # Breaks at one offset only: no resume brings a token.
    with FakeRouter(FakeReply(TEXT, break_at=(5,) * 50)) as router:
        async with AsyncClient(router.address, timeout=20, retry=FAST) as client:
            with pytest.raises(Unavailable):
                await client.generate("hello")
    assert len(router.resumed) == FAST.max_attempts - 1


async def test_another_process_goes_on_with_a_stream() -> None:
    with FakeRouter(TEXT) as router:
        async with AsyncClient(router.address) as client, client.stream("hello") as stream:
            assert stream.resume_token is None
            head = (await anext(stream)).text
        token = stream.resume_token or ResumeToken("none", 0)
        with Client(router.address) as other, other.resume(*token, request_id="again") as rest:
            assert rest.resume_token == token
            tail = "".join(event.text for event in rest)
    assert head + tail == TEXT
    assert rest.completion.text == tail
    assert rest.completion.offset == token.offset == 3
    assert rest.completion.usage.num_completion_tokens == NUM_TOKENS
    assert len(rest.completion.token_ids) == NUM_TOKENS - 3
    assert rest.completion.speculation.num_rounds == len(rest.completion.rounds)


async def test_a_resumed_stream_that_breaks_resumes() -> None:
    with FakeRouter(FakeReply(TEXT, break_at=(9, 21))) as router:
        async with AsyncClient(router.address, retry=RetryPolicy(max_attempts=1)) as client:
            stream = client.stream("hello")
            with pytest.raises(Unavailable):
                await stream.collect()
            token = stream.resume_token
        async with AsyncClient(router.address, retry=FAST) as client:
            completion = await client.resume(*(token or ("none", 0))).collect()
    assert completion.text == "".join(words_of(TEXT)[9:])
    assert [offset for _, offset in router.resumed] == [9, 21]


async def test_a_forgotten_session_and_bad_offsets() -> None:
    with FakeRouter(TEXT) as router:
        async with AsyncClient(router.address, retry=FAST) as client:
            with pytest.raises(NotFound):
                await client.resume("nobody", 0).collect()
            session_id = (await client.generate("hello")).session_id
            with pytest.raises(InvalidRequest, match="offset"):
                await client.resume(session_id, NUM_TOKENS + 1).collect()
            for bad in (("", 0), ("a\nb", 0), (session_id, -1), (session_id, True)):
                with pytest.raises(InvalidRequest):
                    client.resume(*bad)


async def test_a_router_that_repeats_or_skips_tokens_is_found_out() -> None:
    class Wrong(FakeRouter):
        async def resumed_events(
            self, session_id: str, offset: int
        ) -> AsyncIterator[GenerateEvent]:
            async for event in super().resumed_events(session_id, offset - 1):
                yield event

    with Wrong(FakeReply(TEXT, break_at=(6,))) as router:
        async with AsyncClient(router.address, retry=FAST) as client:
            with pytest.raises(InternalError, match="from 5 on where 6 was due"):
                await client.generate("hello")


def test_the_first_event_announces_each_part() -> None:
    builder = CompletionBuilder()
    builder.resumed()
    with pytest.raises(InternalError, match="ended without"):
        builder.build()
