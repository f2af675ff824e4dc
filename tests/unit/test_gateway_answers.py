"""The shapes of answers: usage, metrics, logprobs, and one chunk for each round."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specinfer.errors import Cancelled, InternalError
from specinfer.messages import (
    Capabilities,
    Finished,
    GenerateEvent,
    RoundFacts,
    SpeculationSummary,
    Started,
    Timings,
    TokenLogprob,
    TokensEvent,
    Usage,
)
from specinfer_router.gateway.answers import Answer, AnswerOptions
from specinfer_router.gateway.body import validate
from specinfer_router.gateway.chat_request import ChatBody, chat_requests, tool_plan_of
from specinfer_router.gateway.fields import choice_id, priority_of, sampling_of
from specinfer_router.gateway.logprobs import chat_logprobs, legacy_logprobs
from specinfer_router.gateway.usage import RoundCounts, metrics_of, speculation_of_rounds, usage_of
from specinfer_router.text import Vocabulary
from tests.kit.gateway import chat_body
from tests.kit.tokenizers import byte_level_tokenizer

SERVED = Capabilities(
    "table", "h" * 64, "t", 356, "float32", 512, 32, True, ("match",), True, 1, 1, True, "1.0"
)
OPTIONS = AnswerOptions("chatcmpl-", "chat.completion", "chat.completion.chunk")


def finished(prompt: int, completion: int, drafted: int, accepted: int, seconds: float) -> Finished:
    return Finished(
        "stop",
        "",
        Usage(prompt, completion, 1),
        SpeculationSummary(num_draft_tokens=drafted, num_accepted_tokens=accepted),
        Timings(total_seconds=seconds),
    )


def test_a_prompt_counts_once_however_many_choices_it_has() -> None:
    ends = [finished(10, 3, 8, 2, 0.1), finished(10, 4, 8, 3, 0.2), finished(7, 5, 0, 0, 0.1)]
    usage = usage_of([*ends, ends[2]], choices_per_prompt=2)
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (17, 17)
    assert usage["total_tokens"] == 34
    assert usage["prompt_tokens_details"]["cached_tokens"] == 2
    details = usage["completion_tokens_details"]
    assert (details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]) == (5, 11)


def test_timings_are_those_of_the_slowest_choice() -> None:
    ends = [finished(10, 3, 8, 2, 0.1), finished(10, 4, 8, 3, 0.2)]
    assert metrics_of(ends, [RoundCounts()], detail=False)["total_seconds"] == 0.2


@given(
    st.lists(
        st.integers(0, 6).flatmap(
            lambda depth: st.tuples(
                st.just(depth),
                st.integers(depth, 20) if depth else st.just(0),
                st.integers(0, depth),
            )
        )
    )
)
def test_histogram_and_sums_agree_for_any_rounds(rounds: list[tuple[int, int, int]]) -> None:
    counts = RoundCounts()
    for depth, drafted, accepted in rounds:
        counts.add(RoundFacts(1, drafted, accepted, draft_depth=depth))
    stats = speculation_of_rounds([counts], detail=True)
    histogram = stats["acceptance_histogram"]
    assert len(histogram) == stats["num_spec_tokens"] + 1
    assert sum(histogram) == stats["num_spec_steps"] == sum(1 for each in rounds if each[1])
    assert sum(k * count for k, count in enumerate(histogram)) == sum(each[2] for each in rounds)
    assert sum(stats["per_step_drafted"]) == stats["num_draft_tokens"]
    assert 0.0 <= stats["draft_acceptance_rate"] <= 1.0
    assert stats["mean_acceptance_length"] >= 1.0


VOCABULARY = Vocabulary.of(byte_level_tokenizer())


def test_logprobs_are_json_and_leave_tokens_without_text_out() -> None:
    numbers = VOCABULARY.tokenizer.get_vocab()
    word, end, part = numbers["w"], numbers["<|end|>"], numbers["ð"]
    top = ((word, -0.1), (part, -math.inf))
    items = [TokenLogprob(part, -math.inf, top), TokenLogprob(word, -0.1), TokenLogprob(end, -1.0)]
    first, second = chat_logprobs(items, VOCABULARY)
    assert first["bytes"] == [0xF0]
    assert first["token"] == "\ufffd"
    assert first["logprob"] == first["top_logprobs"][1]["logprob"] == -9999.0
    assert second["token"] == "w"
    legacy = legacy_logprobs(items, VOCABULARY, offset=4)
    assert legacy["tokens"] == ["\ufffd", "w"]
    assert legacy["text_offset"] == [4, 5]
    json.dumps([first, legacy], allow_nan=False)


class PlainWriter:
    """A choice that is its text."""

    def begin(self, started: Started) -> None:
        pass

    def opening(self) -> dict[str, Any] | None:
        return None

    def delta(self, event: TokensEvent) -> dict[str, Any] | None:
        return {"text": event.text} if event.text else None

    def ending(self, finished: Finished) -> dict[str, Any]:
        return {"text": "", "finish_reason": finished.reason}

    def whole(self, events: Sequence[TokensEvent], finished: Finished) -> dict[str, Any]:
        return {"text": "".join(event.text for event in events)}


async def stream_of(*texts: str, reason: str = "stop") -> AsyncGenerator[GenerateEvent, None]:
    yield Started("r", "abc", "table", 7, 5)
    for offset, text in enumerate(texts):
        yield TokensEvent(2 * offset, text, (1, 2), 1, (), RoundFacts(offset, 3, 1))
    if reason:
        yield Finished(reason, "", Usage(5, 2 * len(texts)), SpeculationSummary())


async def test_each_round_is_one_chunk_with_the_tokens_sent_so_far() -> None:
    answer = Answer([PlainWriter()], OPTIONS, SERVED)
    events = [event async for event in answer.stream([stream_of("a", "", "b")])]
    assert [event.id for event in events] == ["", "abc:2", "abc:6", "abc:6"]
    # What is held back comes with a later round, and its id says so.
    texts = [event.data["choices"][0]["text"] for event in events if event.data]
    assert texts == ["a", "b", ""]


async def test_a_stream_without_its_last_event_is_no_answer() -> None:
    with pytest.raises(InternalError):
        await Answer([PlainWriter()], OPTIONS, SERVED).body([stream_of("a", reason="")])


async def test_a_cancelled_generation_is_no_answer() -> None:
    with pytest.raises(Cancelled):
        await Answer([PlainWriter()], OPTIONS, SERVED).body([stream_of("a", reason="cancelled")])


async def test_fingerprints_follow_model_and_version() -> None:
    answer = Answer([PlainWriter()], OPTIONS, SERVED)
    body = json.loads(await answer.body([stream_of("a", "b")]))
    assert body["system_fingerprint"] == "fp_" + "h" * 12 + "_1.0"
    assert body["choices"] == [{"index": 0, "text": "ab"}]
    assert body["seeds"] == [7]


def body_of(**changes: Any) -> ChatBody:
    return validate(json.dumps(chat_body(**changes)).encode(), ChatBody)


def test_ids_of_choices_keep_within_what_an_id_may_be() -> None:
    assert choice_id("mine", 0, 1) == "mine"
    assert choice_id("mine", 2, 3) == "mine-2"
    longest = {choice_id("a" * 128, choice, 8) for choice in range(8)}
    assert len(longest) == 8
    assert max(len(identity) for identity in longest) == 128


@pytest.mark.parametrize(
    ("changes", "priority"),
    [
        ({}, 0),
        ({"priority": -3}, 3),
        ({"priority": 2, "service_tier": "default"}, -2),
        ({"service_tier": "flex"}, -1),
        ({"service_tier": "priority"}, 1),
    ],
)
def test_priorities_count_up_for_the_router(changes: dict[str, Any], priority: int) -> None:
    body = body_of(**changes)
    assert priority_of(body, body.service_tier) == priority


@pytest.mark.parametrize("seed", [0, 3, 2**63 - 1, -1, -(2**63)])
def test_seeds_of_choices_differ_and_are_valid(seed: int) -> None:
    seeds = [sampling_of(body_of(seed=seed), choice).seed for choice in range(8)]
    assert len(set(seeds)) == 8
    assert all(0 <= each < 2**63 for each in seeds)


def test_a_conversation_with_calls_reaches_the_template_whole() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    body = body_of(
        messages=[
            {
                "role": "developer",
                "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}],
            },
            {"role": "user", "content": "words", "name": "ann"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "4", "tool_call_id": "c1"},
        ],
        prompt_cache_key="k",
        prediction={"type": "content", "content": [{"type": "text", "text": "words"}]},
    )
    (request,) = chat_requests(body, tool_plan_of(body, ""), "mine")
    assert request.messages is not None
    system, user, assistant, tool = request.messages
    assert (system.role, system.content) == ("system", "be brief")
    assert (user.content, user.name) == ("words", "ann")
    assert assistant.tool_calls[0].name == "f"
    assert (tool.role, tool.tool_call_id) == ("tool", "c1")
    assert (request.affinity_key, request.prediction, request.request_id) == ("k", "words", "mine")
