"""Responses: numbers that follow from the tokens alone, failures, and runs in the background."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specinfer.errors import (
    InternalError,
    InvalidRequest,
    NotFound,
    ResourceExhausted,
    SpecinferError,
    Unavailable,
)
from specinfer.messages import (
    ChatMessage,
    Finished,
    GenerateEvent,
    ResumeRequest,
    RoundFacts,
    SpeculationSummary,
    TokensEvent,
    ToolCall,
    Usage,
)
from specinfer_router.access import ANYBODY
from specinfer_router.gateway.body import validate
from specinfer_router.gateway.responses_items import conversation, read_items, stored_items
from specinfer_router.gateway.responses_request import ResponseBody, check_encodable, new_response
from specinfer_router.gateway.responses_run import BackgroundRuns, Events, cancel_run, written
from specinfer_router.gateway.responses_store import ResponseStore, StoredResponse
from specinfer_router.gateway.responses_writer import STRIDE, ResponseWriter
from specinfer_router.gateway.tools import FunctionTool, ToolChoice, plan_tools
from specinfer_router.text import Vocabulary
from tests.kit.pausing import pausing
from tests.kit.router import Bench, request_of, running_router
from tests.kit.tokenizers import byte_level_tokenizer

TOKENIZER = byte_level_tokenizer()
VOCABULARY = Vocabulary.of(TOKENIZER)
PLAN = plan_tools([FunctionTool("clock")], ToolChoice(), True, "tools <tool_call>")
TEXT = (
    "It is 日本 time.\n"
    '<tool_call>\n{"name": "clock", "arguments": {"zone": "é"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call> so'
)


def stored_response() -> StoredResponse:
    body = ResponseBody(input="words")
    response = new_response(body, 7, "table")
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
    kept = read_items(stored_items(body.input, "a"))
    assert conversation("short", kept) == expected


DEEP: list[Any] = []
for _ in range(500):
    DEEP = [DEEP]


def item_of(**item: Any) -> dict[str, Any]:
    """An item of the input as it is kept."""
    (kept,) = stored_items(read_items([item]), "a")
    return kept


def test_what_clients_send_back_beside_the_conversation_is_dropped() -> None:
    call = {"type": "function_call", "call_id": "a", "name": "clock", "arguments": "{}"}
    beside = {"async_": None, "caller": None, "parsed_arguments": {"a": DEEP}}
    assert item_of(**call, **beside) == {"id": "in_a_0", "status": "completed", **call}
    text = {"type": "output_text", "text": "so"}
    part = {**text, "logprobs": [DEEP], "parsed": DEEP, "annotations": None}
    kept = item_of(role="assistant", phase=None, created_by=None, content=[part])
    assert kept["content"] == [text]


@pytest.mark.parametrize(
    ("item", "param"),
    [
        ({"type": "function_call", "call_id": "a", "arguments": "{}"}, "input[1].name"),
        ({"role": "user", "content": "so", "async": True}, "input[1].async"),
        ({"type": "function_call_output", "call_id": "a"}, "input[1].output"),
        ({"type": "item_reference", "id": "a"}, "input[1]"),
        ({"role": "user", "content": [{"type": "input_text"}]}, "input[1].content[0].text"),
    ],
)
def test_errors_name_the_field_of_an_item(item: dict[str, Any], param: str) -> None:
    content = json.dumps({"input": [{"role": "user", "content": "so"}, item]}).encode()
    with pytest.raises(InvalidRequest) as caught:
        validate(content, ResponseBody)
    assert caught.value.field == param


def test_what_no_answer_can_repeat_is_refused() -> None:
    tools = [{"type": "function", "name": "clock", "parameters": {"a": float("inf")}}]
    body = ResponseBody.model_validate({"input": "so", "tools": tools})
    with pytest.raises(InvalidRequest, match="no answer can repeat"):
        check_encodable(new_response(body, 7, "table"))


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
    stored = await keep.get(events[0]["response"]["id"], ANYBODY)
    assert stored.response["status"] == "failed"


async def test_what_a_retry_mends_is_raised_and_stays_open(bench: Bench) -> None:
    keep = ResponseStore(bench.store)
    events = written(
        bench.router, breaking(bench, Unavailable("gone")), stored_response(), keep=keep
    )
    response_id = (await anext(events))["response"]["id"]
    with pytest.raises(Unavailable):
        [event async for event in events]
    assert (await keep.get(response_id, ANYBODY)).running


async def test_without_a_stream_every_error_is_raised(bench: Bench) -> None:
    stream = breaking(bench, InternalError("broken"))
    with pytest.raises(InternalError, match="broken"):
        async for _ in written(bench.router, stream, stored_response(), raising=True):
            pass


async def test_what_was_deleted_meanwhile_stays_deleted(bench: Bench) -> None:
    keep = ResponseStore(bench.store)
    stream = bench.router.generate(request_of())
    response_id = ""
    async for event in written(bench.router, stream, stored_response(), keep=keep):
        response_id = response_id or event["response"]["id"]
        await keep.delete(response_id)
    with pytest.raises(NotFound):
        await keep.get(response_id, ANYBODY)


async def begun(bench: Bench, keep: ResponseStore) -> tuple[Events, StoredResponse]:
    """A response whose first events were read, and what is kept of it now."""
    stream = bench.router.generate(request_of())
    events = written(bench.router, stream, stored_response(), keep=keep)
    created = await anext(events)
    return events, await keep.get(created["response"]["id"], ANYBODY)


async def test_cancelling_what_has_just_ended_keeps_its_end(bench: Bench) -> None:
    keep = ResponseStore(bench.store)
    events, before = await begun(bench, keep)
    last = [event async for event in events][-1]["response"]
    cancelled = await cancel_run(bench.router, before, ANYBODY, keep)
    assert cancelled.response == last
    assert await keep.get(last["id"], ANYBODY) == cancelled
    assert last["status"] == "incomplete"


async def test_cancelling_before_an_end_is_kept_tells_the_same_end(bench: Bench) -> None:
    """The session has ended, and whoever ran it has not yet said so."""
    keep = ResponseStore(bench.store)
    events, before = await begun(bench, keep)
    async with asyncio.timeout(10):
        while not (await bench.store.load(before.session_id)).finish_reason:
            await anext(events)
    early = await cancel_run(bench.router, before, ANYBODY, keep)
    assert await keep.get(early.response["id"], ANYBODY) == early
    last = [event async for event in events][-1]["response"]
    assert early.response["output"] == last["output"]
    assert (early.response["status"], last["status"]) == ("incomplete", "incomplete")


async def test_cancelling_keeps_the_text_so_far() -> None:
    worker = pausing(TEXT, pause_at=6)
    async with running_router(verifiers=[worker]) as bench:
        keep = ResponseStore(bench.store)
        events, before = await begun(bench, keep)
        async for event in events:
            if "delta" in event:
                break
        cancelled = await cancel_run(bench.router, before, ANYBODY, keep)
        worker.go_on()
        last = [event async for event in events][-1]["response"]
        assert cancelled.response["status"] == last["status"] == "cancelled"
        assert cancelled.response["output"] == last["output"]
        assert last["output"][0]["content"][0]["text"]


async def test_what_is_read_again_from_its_start_stays_deleted(bench: Bench) -> None:
    keep = ResponseStore(bench.store)
    events, before = await begun(bench, keep)
    await events.aclose()
    await keep.delete(before.response["id"])
    stream = bench.router.resume(ResumeRequest(before.session_id, 0))
    async for _ in written(bench.router, stream, before, keep=keep):
        pass
    with pytest.raises(NotFound):
        await keep.get(before.response["id"], ANYBODY)


async def test_the_id_of_a_response_ends_with_its_session(bench: Bench) -> None:
    _, stored = await begun(bench, ResponseStore(bench.store))
    assert stored.response["id"] == f"resp_{stored.session_id}"
    report = await bench.router.explain(stored.response["id"].removeprefix("resp_"))
    assert report.session_id == stored.session_id


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
