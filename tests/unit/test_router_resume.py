"""A stream that broke goes on where it stopped, each token exactly once."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest

from specinfer.errors import (
    InvalidRequest,
    NotFound,
    ReaderStalled,
    ResourceExhausted,
    StaleEpoch,
    Unavailable,
)
from specinfer.messages import (
    Finished,
    GenerateEvent,
    GenerateRequest,
    Grammar,
    ResumeRequest,
    SpeculationOptions,
    Started,
    TokenLogprob,
    TokensEvent,
)
from specinfer_router.access import Caller, KeyLimits
from specinfer_router.admission import AdmissionLimits
from specinfer_router.replay import PIECE_TOKENS
from specinfer_router.router import RouterLimits
from specinfer_router.store import ABANDONED
from tests.kit.router import PROMPT, Bench, collected, request_of, running_router


async def broken(bench: Bench, request: GenerateRequest, num_tokens: int) -> tuple[str, str, int]:
    """Read at least `num_tokens` tokens, then leave: session, text and tokens so far."""
    session_id, text, offset = "", "", 0
    async with aclosing(bench.router.generate(request)) as events:
        async for event in events:
            if isinstance(event, Started):
                session_id = event.session_id
            elif isinstance(event, TokensEvent):
                text += event.text
                offset += len(event.token_ids)
            if offset >= num_tokens:
                break
    return session_id, text, offset


async def rest(bench: Bench, session_id: str, offset: int) -> tuple[Started, str, list[int]]:
    """What a resumed stream brings: its first event, text and tokens."""
    events = [event async for event in bench.router.resume(ResumeRequest(session_id, offset))]
    started, *rounds, finished = events
    assert isinstance(started, Started)
    assert isinstance(finished, Finished)
    token_ids: list[int] = []
    for event in rounds:
        assert isinstance(event, TokensEvent)
        assert event.offset == offset + len(token_ids)
        token_ids.extend(event.token_ids)
    assert finished.usage.num_completion_tokens == offset + len(token_ids)
    return started, "".join(e.text for e in rounds if isinstance(e, TokensEvent)), token_ids


def logprobs_of(events: list[GenerateEvent]) -> list[TokenLogprob]:
    return [one for event in events if isinstance(event, TokensEvent) for one in event.logprobs]


async def test_a_resumed_stream_that_is_left_before_its_rounds_begin_is_given_up() -> None:
    async with running_router() as bench:
        session_id, _, _ = await broken(bench, replace(request_of(), num_logprobs=2), 12)
        bench.verifiers[0].gate.clear()  # what was told already is computed again, for its logprobs
        async with aclosing(bench.router.resume(ResumeRequest(session_id, 3))) as events:
            assert isinstance(await anext(events), Started)
            assert (await bench.router.store.load(session_id)).finish_reason == ""
        bench.verifiers[0].gate.set()
        assert (await bench.router.store.load(session_id)).finish_reason == ABANDONED
        assert bench.cluster.verifiers.links[0].num_seats == 0


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 20, 39])
async def test_a_resumed_stream_joins_the_broken_one(num_tokens: int) -> None:
    async with running_router() as bench:
        whole = await bench.generate(request_of())
        session_id, text, offset = await broken(bench, request_of(), num_tokens)
        started, more, token_ids = await rest(bench, session_id, offset)
        assert (started.session_id, started.seed) == (session_id, whole.started.seed)
        assert text + more == whole.text
        assert tuple(token_ids) == whole.token_ids[offset:]


@pytest.mark.parametrize("missing", [1, 2, 5, 11])
async def test_tokens_that_were_committed_but_never_arrived_come_again(missing: int) -> None:
    async with running_router() as bench:
        whole = await bench.generate(request_of())
        session_id, _, offset = await broken(bench, request_of(), 12)
        _, more, token_ids = await rest(bench, session_id, offset - missing)
        assert tuple(token_ids) == whole.token_ids[offset - missing :]
        # Negative control: one token off does not join.
        assert tuple(token_ids) != whole.token_ids[offset - missing + 1 :]
        assert whole.text.endswith(more)


async def test_a_stream_that_had_ended_can_be_read_again_from_anywhere() -> None:
    stop = "".join((await unbroken_text())[5:8])
    async with running_router() as bench:
        whole = await bench.generate(request_of(stop=(stop,)))
        assert whole.finished.reason == "stop"
        for offset in (0, 3, len(whole.token_ids)):
            session_id = whole.started.session_id
            resumed = ResumeRequest(session_id, offset)
            *_, finished = [event async for event in bench.router.resume(resumed)]
            assert isinstance(finished, Finished)
            assert (finished.reason, finished.stop_match) == ("stop", stop)
            _, text, token_ids = await rest(bench, session_id, offset)
            assert tuple(token_ids) == whole.token_ids[offset:]
            assert whole.text.endswith(text)


async def unbroken_text() -> str:
    async with running_router() as bench:
        return (await bench.generate(request_of())).text


async def test_logprobs_of_missed_tokens_are_those_of_the_unbroken_stream() -> None:
    async with running_router() as bench:
        request = replace(request_of(), num_logprobs=2)
        whole = [event async for event in bench.router.generate(request)]
        session_id, _, offset = await broken(bench, request, 12)
        again = ResumeRequest(session_id, offset - 9)
        events = [event async for event in bench.router.resume(again)]
        assert logprobs_of(whole)
        assert logprobs_of(events) == logprobs_of(whole)[offset - 9 :]


async def test_whoever_resumes_takes_the_session_from_its_reader() -> None:
    async with running_router() as bench:
        whole = await bench.generate(request_of(max_tokens=200))
        first = bench.router.generate(request_of(max_tokens=200))
        async with aclosing(first) as events:
            started = await anext(events)
            assert isinstance(started, Started)
            second = aiter(bench.router.resume(ResumeRequest(started.session_id)))
            taken = [await anext(second), await anext(second)]
            with pytest.raises(StaleEpoch, match="taken over"):
                async for _ in events:
                    pass
            taken += [event async for event in second]
        assert collected(taken).token_ids == whole.token_ids


async def test_only_its_own_key_may_touch_a_session() -> None:
    async with running_router() as bench:
        session_id, _, offset = await broken(bench, request_of(), 3)
        other = Caller(key_id="other")
        resumed = bench.router.resume(ResumeRequest(session_id, offset), other)
        with pytest.raises(NotFound):
            await anext(resumed)
        with pytest.raises(NotFound):
            await anext(bench.router.follow(session_id, 0, other))
        with pytest.raises(NotFound):
            await bench.router.cancel(session_id, other)
        with pytest.raises(NotFound):
            await bench.router.explain(session_id, other)


async def test_a_refused_resume_leaves_the_reader_alone() -> None:
    async with running_router() as bench:
        source = bench.router.generate(request_of(max_tokens=60))
        started = await anext(source)
        assert isinstance(started, Started)
        with pytest.raises(InvalidRequest):
            await anext(bench.router.resume(ResumeRequest(started.session_id, 10**6)))
        events = [started, *[event async for event in source]]
        assert len(collected(events).token_ids) == 60


@pytest.mark.parametrize("resumed", [False, True])
async def test_a_reader_that_leaves_at_once_leaves_nothing_running(resumed: bool) -> None:
    async with running_router() as bench:
        bench.verifiers[0].gate.clear()
        async with aclosing(bench.router.generate(request_of(max_tokens=300))) as source:
            started = await anext(source)
            assert isinstance(started, Started)
        if resumed:
            again = ResumeRequest(started.session_id)
            async with aclosing(bench.router.resume(again)) as source:
                await anext(source)
        async with asyncio.timeout(5):
            await bench.router.idle()
        assert (await bench.store.load(started.session_id)).finish_reason == ABANDONED


async def test_a_long_replay_comes_in_pieces_and_is_counted() -> None:
    async with running_router() as bench:
        request = replace(request_of(max_tokens=PIECE_TOKENS + 40), num_logprobs=1)
        whole = [event async for event in bench.router.generate(request)]
        started = whole[0]
        assert isinstance(started, Started)
        again = [e async for e in bench.router.resume(ResumeRequest(started.session_id, 10))]
        pieces = [len(event.token_ids) for event in again if isinstance(event, TokensEvent)]
        assert pieces == [PIECE_TOKENS, 30]
        assert logprobs_of(again) == logprobs_of(whole)[10:]
        caller = Caller("k", KeyLimits(tokens_per_minute=500))
        events = [event async for event in bench.router.generate(request, caller)]
        first = events[0]
        assert isinstance(first, Started)
        resumes = [
            [e async for e in bench.router.resume(ResumeRequest(first.session_id), caller)]
            for _ in range(1)
        ]
        assert resumes
        with pytest.raises(ResourceExhausted, match="tokens_per_minute"):
            async for _ in bench.router.resume(ResumeRequest(first.session_id), caller):
                pass


async def test_one_key_cannot_read_along_without_end() -> None:
    async with running_router() as bench:
        bench.verifiers[0].gate.clear()
        caller = Caller("k", KeyLimits(max_streams=2))
        source = bench.router.generate(request_of(), caller)
        started = await anext(source)
        assert isinstance(started, Started)
        along = [bench.router.follow(started.session_id, 0, caller) for _ in range(3)]
        waiting = []
        for stream in along[:2]:
            await anext(stream)
            waiting.append(asyncio.ensure_future(anext(stream)))
        await asyncio.sleep(0)
        with pytest.raises(ResourceExhausted, match="read along"):
            async for _ in along[2]:
                pass
        bench.verifiers[0].gate.set()
        for first in await asyncio.gather(*waiting):
            assert isinstance(first, TokensEvent)
        await asyncio.gather(*(stream.aclose() for stream in along))
        await source.aclose()


async def test_a_limited_key_does_not_use_up_everybodys_grammars() -> None:
    async with running_router() as bench:
        caller = Caller("k", KeyLimits(requests_per_minute=1))
        grammar = replace(request_of(), grammar=Grammar("regex", "a"))
        assert [event async for event in bench.router.generate(grammar, caller)]
        # Refused for the key's own limit, before a broken grammar is even looked at.
        broken_grammar = replace(request_of(), grammar=Grammar("regex", "("))
        with pytest.raises(ResourceExhausted, match="requests_per_minute"):
            await anext(bench.router.generate(broken_grammar, caller))


@pytest.mark.parametrize(("max_nodes", "max_depth"), [(2, 2), (0, None), (5, 1)])
async def test_a_prediction_keeps_to_the_callers_bounds(
    max_nodes: int, max_depth: int | None
) -> None:
    async with running_router(drafters=[]) as bench:
        options = SpeculationOptions(max_nodes=max_nodes, max_depth=max_depth)
        request = replace(request_of(), prediction="words " * 50, speculation=options)
        for event in (await bench.generate(request)).rounds:
            assert event.round.num_draft_tokens <= max_nodes
            assert event.round.draft_depth <= (max_depth or 99)


@pytest.mark.parametrize("offset", [1_000, 2**31])
async def test_an_offset_that_was_never_reached_is_refused(offset: int) -> None:
    async with running_router() as bench:
        session_id, _, _ = await broken(bench, request_of(), 3)
        with pytest.raises(InvalidRequest) as refused:
            await anext(bench.router.resume(ResumeRequest(session_id, offset)))
        assert refused.value.field == "offset"
        # Nothing is lost by asking wrongly.
        assert (await rest(bench, session_id, 0))[2]


async def test_a_cancelled_session_stays_cancelled() -> None:
    async with running_router() as bench:
        session_id, _, offset = await broken(bench, request_of(), 3)
        await bench.router.cancel(session_id)
        *_, finished = [e async for e in bench.router.resume(ResumeRequest(session_id, offset))]
        assert isinstance(finished, Finished)
        assert finished.reason == "cancelled"


async def test_reading_along_brings_the_same_tokens_and_leaves_the_session_alone() -> None:
    async with running_router() as bench:
        source = bench.router.generate(request_of(max_tokens=60))
        started = await anext(source)
        assert isinstance(started, Started)
        along = bench.router.follow(started.session_id, 0)
        read = [await anext(along)]
        events = [started, *[event async for event in source]]
        read += [event async for event in along]
        assert collected(read).token_ids == collected(events).token_ids
        assert collected(read).text == collected(events).text


async def test_reading_along_ends_when_the_session_has_no_reader_any_more() -> None:
    async with running_router() as bench:
        session_id, _, _ = await broken(bench, request_of(), 3)
        with pytest.raises(Unavailable, match="resume"):
            async for _ in bench.router.follow(session_id):
                pass


async def test_a_reader_that_stalls_gives_its_place_to_others_and_can_resume() -> None:
    limits = RouterLimits(admission=AdmissionLimits(max_streams=1), max_events=4, stall_seconds=0.2)
    async with running_router(limits=limits) as bench:
        slow = bench.router.generate(request_of(max_tokens=200))
        events = [await anext(slow)]
        # The only place is free again although the stalled reader is still there.
        whole = await bench.generate(request_of(max_tokens=200))
        with pytest.raises(ReaderStalled) as stalled:
            events.extend([event async for event in slow])
        assert stalled.value.retryable
        started = events[0]
        assert isinstance(started, Started)
        token_ids = [t for e in events if isinstance(e, TokensEvent) for t in e.token_ids]
        _, _, more = await rest(bench, started.session_id, len(token_ids))
        assert tuple(token_ids + more) == whole.token_ids


async def test_a_prediction_changes_no_token_and_saves_rounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running_router(drafters=[]) as bench:
        plain = await bench.generate(request_of(max_tokens=60))

        # The fake target's tokens are not those that its text would be cut into.
        async def encode(text: str, **options: object) -> list[int]:
            return list(plain.token_ids)

        monkeypatch.setattr(bench.router.tokenizer, "encode", encode)
        predicted = replace(request_of(max_tokens=60), prediction=plain.text)
        guessed = await bench.generate(predicted)
        assert guessed.token_ids == plain.token_ids
        assert guessed.finished.speculation.num_accepted_tokens > 30
        assert len(guessed.rounds) < len(plain.rounds) // 2
        off = replace(predicted, speculation=SpeculationOptions(enabled=False))
        assert (await bench.generate(off)).finished.speculation.num_draft_tokens == 0


async def test_a_wrong_prediction_costs_guesses_and_no_token() -> None:
    async with running_router() as bench:
        plain = await bench.generate(request_of(max_tokens=60))
        wrong = replace(request_of(max_tokens=60), prediction=plain.text[::-1])
        assert (await bench.generate(wrong)).token_ids == plain.token_ids


async def test_detail_brings_each_rounds_tree_with_its_texts() -> None:
    async with running_router() as bench:
        result = await bench.generate(replace(request_of(), detail=True))
        for event in result.rounds:
            detail = event.detail
            assert detail is not None
            assert len(detail.node_texts) == len(detail.tree)
            assert len(detail.token_texts) == len(event.token_ids)
            path = [detail.tree.token_ids[node] for node in detail.accepted]
            assert tuple(path[: len(event.token_ids)]) == event.token_ids[: len(path)]
        assert all(event.detail is None for event in (await bench.generate(request_of())).rounds)


async def test_explain_says_what_each_round_did_and_took() -> None:
    async with running_router() as bench:
        result = await bench.generate(replace(request_of(), request_id="mine"))
        for name in ("mine", result.started.session_id):
            report = await bench.router.explain(name)
            assert report.outcome == "length"
            assert report.num_prompt_tokens == len(PROMPT)
            assert [one.facts for one in report.rounds] == [e.round for e in result.rounds]
            assert sum(one.num_tokens for one in report.rounds) == len(result.token_ids)
            starts = [one.start_seconds for one in report.rounds]
            assert starts == sorted(starts)
        timings = result.finished.timings
        assert 0 < timings.prepare_seconds < timings.first_token_seconds < timings.total_seconds
        with pytest.raises(NotFound):
            await bench.router.explain("never")
