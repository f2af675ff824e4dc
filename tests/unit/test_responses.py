"""Responses: numbers that follow from the tokens alone, failures, and runs in the background."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specinfer.errors import InternalError, NotFound, ResourceExhausted, SpecinferError, Unavailable
from specinfer.messages import (
    ChatMessage,
    Finished,
    GenerateEvent,
    RoundFacts,
    SpeculationSummary,
    TokensEvent,
    ToolCall,
    Usage,
)
from specinfer_router.access import ANYBODY
from specinfer_router.gateway.responses_items import conversation, read_items, stored_items
from specinfer_router.gateway.responses_request import ResponseBody, new_response
from specinfer_router.gateway.responses_run import BackgroundRuns, written
from specinfer_router.gateway.responses_store import ResponseStore, StoredResponse
from specinfer_router.gateway.responses_writer import STRIDE, ResponseWriter
from specinfer_router.gateway.tools import FunctionTool, ToolChoice, plan_tools
from specinfer_router.text import Vocabulary
from tests.kit.router import Bench, request_of, running_router
from tests.kit.tokenizers import byte_level_tokenizer

TOKENIZER = byte_level_tokenizer()
VOCABULARY = Vocabulary.of(TOKENIZER)
PLAN = plan_tools([FunctionTool("clock")], ToolChoice(), True, "tools <tool_call>")
RESPONSE_ID = "resp_" + "0" * 32
TEXT = (
    "It is 日本 time.\n"
    '<tool_call>\n{"name": "clock", "arguments": {"zone": "é"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call> so'
)


def stored_response() -> StoredResponse:
    body = ResponseBody(input="words")
    response = new_response(body, RESPONSE_ID, 7, "table")
    return StoredResponse("", "", body.model_dump(exclude_none=True), [], [], response)


def events_of(rounds: Sequence[Sequence[int]], after: int = -1) -> list[dict[str, Any]]:
    """The events of a completion that came in these rounds."""
    writer = ResponseWriter(
        stored_response().response,
        PLAN,
        vocabulary=VOCABULARY,
        detokenizer=VOCABULARY.detokenizer(()),
        eos_token_ids=frozenset({0}),
        after=after,
    )
    events = writer.begin()
    offset = 0
    for token_ids in rounds:
        facts = RoundFacts(epoch=1)
        events += writer.take(TokensEvent(offset, "", tuple(token_ids), 0, (), facts))
        offset += len(token_ids)
    return events + writer.finish(Finished("stop", "", Usage(1, offset), SpeculationSummary()))


def pieces(events: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Events as (type, delta), with deltas that follow each other joined."""
    joined: list[tuple[str, str]] = []
    for event in events:
        delta = event.get("delta", "")
        if delta and joined and joined[-1][0] == event["type"]:
            delta = joined.pop()[1] + delta
        joined.append((event["type"], delta))
    return joined


@given(st.data())
def test_numbers_follow_from_the_tokens_alone(data: st.DataObject) -> None:
    token_ids = [*TOKENIZER.encode(TEXT).ids, 0]
    one_by_one = events_of([[token_id] for token_id in token_ids])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(token_ids)), max_size=8)))
    edges = zip([0, *cuts], [*cuts, len(token_ids)], strict=True)
    rounds = [token_ids[start:end] for start, end in edges]
    events = events_of(rounds)
    numbers = [event["sequence_number"] for event in events]
    assert numbers == sorted(set(numbers))
    by_number = {event["sequence_number"]: event["type"] for event in one_by_one}
    assert all(by_number[event["sequence_number"]] == event["type"] for event in events)
    assert pieces(events) == pieces(one_by_one)
    # Whoever read up to any of these events reads the rest in any other rounds.
    after = data.draw(st.sampled_from(numbers))
    read = [event for event in events if event["sequence_number"] <= after]
    rest = events_of([[token_id] for token_id in token_ids], after)
    assert "".join(delta for _, delta in pieces(read + rest)) == "".join(
        delta for _, delta in pieces(events)
    )
    kinds = [event["type"] for event in read + rest if "delta" not in event]
    assert kinds == [event["type"] for event in events if "delta" not in event]


def test_the_first_token_has_the_first_stride() -> None:
    events = events_of([TOKENIZER.encode("so").ids])
    assert [event["sequence_number"] for event in events[:3]] == [0, 1, STRIDE]


def test_the_output_is_text_and_calls_in_order() -> None:
    output = events_of([TOKENIZER.encode(TEXT).ids])[-1]["response"]["output"]
    assert [item["type"] for item in output] == [
        "message",
        "function_call",
        "function_call",
        "message",
    ]
    assert output[0]["content"][0]["text"] == "It is 日本 time.\n"
    assert output[1]["arguments"] == '{"zone": "é"}'
    assert len({item["id"] for item in output}) == 4
    assert output[1]["call_id"] != output[2]["call_id"]


def test_items_make_a_conversation() -> None:
    body = ResponseBody.model_validate(
        {
            "input": [
                {"role": "developer", "content": "be kind"},
                {"role": "user", "content": [{"type": "input_text", "text": "time?"}]},
                {"type": "function_call", "call_id": "a", "name": "clock", "arguments": "{}"},
                {"type": "function_call", "call_id": "b", "name": "clock", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "a", "output": "noon"},
            ]
        }
    )
    assert not isinstance(body.input, str)
    expected = (
        ChatMessage("system", "short"),
        ChatMessage("system", "be kind"),
        ChatMessage("user", "time?"),
        ChatMessage(
            "assistant",
            "",
            tool_calls=(ToolCall("a", "clock", "{}"), ToolCall("b", "clock", "{}")),
        ),
        ChatMessage("tool", "noon", tool_call_id="a"),
    )
    assert conversation("short", body.input) == expected
    kept = read_items(stored_items(body.input, RESPONSE_ID))
    assert conversation("short", kept) == expected


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with running_router() as built:
        yield built


async def breaking(bench: Bench, error: SpecinferError) -> AsyncGenerator[GenerateEvent, None]:
    """A stream that breaks behind its first tokens."""
    async with aclosing(bench.router.generate(request_of())) as events:
        async for event in events:
            yield event
            if isinstance(event, TokensEvent):
                raise error


async def test_what_no_retry_mends_fails_the_response(bench: Bench) -> None:
    keep = ResponseStore(bench.store)
    stream = breaking(bench, InternalError("broken"))
    events = [event async for event in written(bench.router, stream, stored_response(), keep=keep)]
    assert events[-1]["type"] == "response.failed"
    assert events[-1]["response"]["error"] == {"code": "server_error", "message": "broken"}
    stored = await keep.get(RESPONSE_ID, ANYBODY)
    assert stored.response["status"] == "failed"


async def test_what_a_retry_mends_is_raised_and_stays_open(bench: Bench) -> None:
    keep = ResponseStore(bench.store)
    stream = breaking(bench, Unavailable("gone"))
    with pytest.raises(Unavailable):
        async for _ in written(bench.router, stream, stored_response(), keep=keep):
            pass
    assert (await keep.get(RESPONSE_ID, ANYBODY)).running


async def test_without_a_stream_every_error_is_raised(bench: Bench) -> None:
    stream = breaking(bench, InternalError("broken"))
    with pytest.raises(InternalError, match="broken"):
        async for _ in written(bench.router, stream, stored_response(), raising=True):
            pass


async def test_what_was_deleted_meanwhile_stays_deleted(bench: Bench) -> None:
    keep = ResponseStore(bench.store)
    stream = bench.router.generate(request_of())
    async for _ in written(bench.router, stream, stored_response(), keep=keep):
        await keep.delete(RESPONSE_ID)
    with pytest.raises(NotFound):
        await keep.get(RESPONSE_ID, ANYBODY)


async def test_runs_in_the_background_are_bounded_and_end_with_their_owner(bench: Bench) -> None:
    runs = BackgroundRuns(max_runs=1)
    bench.verifiers[0].gate.clear()

    def begin() -> AsyncGenerator[dict[str, Any], None]:
        return written(bench.router, bench.router.generate(request_of()), stored_response())

    first = await runs.start(begin())
    assert first["type"] == "response.created"
    with pytest.raises(ResourceExhausted):
        await runs.start(begin())
    await runs.close()
    assert len(runs) == 0
    bench.verifiers[0].gate.set()
    await runs.start(begin())
    async with asyncio.timeout(10):
        await runs.close()
