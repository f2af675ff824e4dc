"""The Responses API with the real `openai` client: create, stream, retrieve, resume, cancel."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from pydantic import BaseModel

from specinfer_router.access import Caller
from specinfer_router.gateway.responses_store import ResponseStore
from specinfer_router.gateway.responses_writer import STRIDE
from tests.kit.fake_workers import FakeVerifier, info_of
from tests.kit.gateway import TOOLS_TEMPLATE, GatewayBench, running_gateway, saying

SEEDED: dict[str, Any] = {"extra_body": {"seed": 3}}
TOOL: Any = {
    "type": "function",
    "name": "weather",
    "description": "Tells it.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call>'


def ask(**changes: Any) -> dict[str, Any]:
    """A request of few tokens."""
    return {"model": "table", "input": "words", "max_output_tokens": 24} | changes


@pytest.fixture
async def gateway() -> AsyncIterator[GatewayBench]:
    async with running_gateway() as built:
        yield built


@pytest.fixture
async def client(gateway: GatewayBench) -> AsyncIterator[AsyncOpenAI]:
    async with client_of(gateway) as built:
        yield built


def client_of(gateway: GatewayBench) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=gateway.url + "/v1", api_key="none", max_retries=0)


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[tuple[GatewayBench, AsyncOpenAI]]:
    """A gateway and a client."""
    async with running_gateway(**options) as gateway, client_of(gateway) as client:
        yield gateway, client


async def data_of(stream: Any) -> list[dict[str, Any]]:
    """A stream's events as plain data."""
    return [event.to_dict() async for event in stream]


def without_times(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Events less the clock's part of the last one, and rounds, which a replay has not."""
    for event in events:
        if "response" in event:
            event["response"].pop("metrics", None)
            event["response"].pop("completed_at", None)
            (event["response"].get("usage") or {}).pop("input_tokens_details", None)
    return events


async def test_a_response_is_created_and_retrieved(client: AsyncOpenAI) -> None:
    made = await client.responses.create(**ask(), **SEEDED, metadata={"a": "b"}, user="me")
    assert (made.status, made.object, made.model) == ("incomplete", "response", "table")
    assert made.incomplete_details is not None
    assert made.incomplete_details.reason == "max_output_tokens"
    assert made.output_text
    assert made.usage is not None
    assert made.usage.output_tokens == 24
    assert made.usage.total_tokens == made.usage.input_tokens + 24
    assert made.metadata == {"a": "b"}
    assert await client.responses.retrieve(made.id) == made


async def test_the_text_is_that_of_chat(client: AsyncOpenAI) -> None:
    made = await client.responses.create(**ask(), **SEEDED, instructions="be short")
    chat = await client.chat.completions.create(
        model="table",
        messages=[{"role": "system", "content": "be short"}, {"role": "user", "content": "words"}],
        max_tokens=24,
        seed=3,
    )
    assert made.output_text == chat.choices[0].message.content


async def test_a_response_ends_at_the_end_token() -> None:
    async with serving(verifiers=[saying("All is well.")]) as (_, client):
        made = await client.responses.create(**ask())
        assert (made.status, made.output_text) == ("completed", "All is well.")
        assert made.completed_at is not None


async def test_a_stream_has_every_event_in_order() -> None:
    async with serving(verifiers=[saying("All is well, so far.")]) as (_, client):
        events = await data_of(await client.responses.create(**ask(), stream=True))
        kinds = [event["type"].removeprefix("response.") for event in events]
        assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
        assert set(kinds[4:-4]) == {"output_text.delta"}
        assert kinds[-4:] == [
            "output_text.done",
            "content_part.done",
            "output_item.done",
            "completed",
        ]
        numbers = [event["sequence_number"] for event in events]
        assert numbers == sorted(set(numbers))
        text = "".join(event["delta"] for event in events if "delta" in event)
        assert text == "All is well, so far."
        assert events[-1]["response"]["output"][0]["content"][0]["text"] == text
        stored = await client.responses.retrieve(events[0]["response"]["id"])
        assert stored.to_dict() == events[-1]["response"]


async def test_the_stream_helper_puts_the_response_together() -> None:
    async with serving(verifiers=[saying("All is well.")]) as (_, client):
        async with client.responses.stream(**ask()) as stream:
            async for _ in stream:
                pass
            final = await stream.get_final_response()
        assert final.output_text == "All is well."


class Answer(BaseModel):
    """What is parsed."""

    city: str


async def test_parse_gives_a_model() -> None:
    async with serving(verifiers=[saying('{"city": "Bonn"}')]) as (_, client):
        parsed = await client.responses.parse(**ask(), text_format=Answer)
        assert parsed.output_parsed == Answer(city="Bonn")


async def test_tools_are_called_and_their_answers_go_back() -> None:
    worker = saying(CALL, chat_template=TOOLS_TEMPLATE)
    async with serving(verifiers=[worker]) as (_, client):
        asked = ask(max_output_tokens=200)
        events = await data_of(await client.responses.create(**asked, tools=[TOOL], stream=True))
        kinds = [event["type"].removeprefix("response.") for event in events]
        assert kinds[2] == "output_item.added"
        assert kinds[-3:] == [
            "function_call_arguments.done",
            "output_item.done",
            "completed",
        ]
        (call,) = events[-1]["response"]["output"]
        assert (call["type"], call["name"]) == ("function_call", "weather")
        assert call["arguments"] == '{"city": "Bonn"}'
        answered = await client.responses.create(
            **asked,
            tools=[TOOL],
            previous_response_id=events[-1]["response"]["id"],
        )
        assert answered.status == "completed"
        answer: Any = [
            {"role": "user", "content": "words"},
            call,
            {"type": "function_call_output", "call_id": call["call_id"], "output": "rain"},
        ]
        by_hand = await client.responses.create(**(asked | {"input": answer}), tools=[TOOL])
        assert by_hand.status == "completed"


async def test_a_conversation_goes_on_from_the_response_before(client: AsyncOpenAI) -> None:
    first = await client.responses.create(**ask(), **SEEDED)
    second = await client.responses.create(
        **ask(input="more"), **SEEDED, previous_response_id=first.id
    )
    whole: Any = [
        {"role": "user", "content": "words"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "more"},
    ]
    by_hand = await client.responses.create(**ask(input=whole), **SEEDED)
    assert second.output_text == by_hand.output_text
    third = await client.responses.create(
        **ask(input="and"), **SEEDED, previous_response_id=second.id
    )
    assert second.usage is not None
    assert third.usage is not None
    assert third.usage.input_tokens > second.usage.input_tokens


async def test_a_stream_resumes_after_any_event(client: AsyncOpenAI) -> None:
    whole = without_times(await data_of(await client.responses.create(**ask(), stream=True)))
    response_id = whole[0]["response"]["id"]
    for index, event in enumerate(whole[:-1]):
        number = event["sequence_number"]
        stream = await client.responses.retrieve(response_id, stream=True, starting_after=number)
        rest = without_times(await data_of(stream))
        assert joined(rest) == joined(whole[index + 1 :])
        assert all(event["sequence_number"] > number for event in rest)
        assert rest[-1] == whole[-1]


def joined(events: list[dict[str, Any]]) -> tuple[str, list[str]]:
    """The text of a stream's deltas, and what other events it has."""
    text = "".join(event["delta"] for event in events if "delta" in event)
    return text, [event["type"] for event in events if "delta" not in event]


async def test_a_broken_stream_resumes_where_it_broke() -> None:
    """The session stops with its reader and goes on with the next one."""
    async with serving() as (_, client):
        whole = await client.responses.create(**ask(), **SEEDED)
    async with serving() as (_, client):
        stream = await client.responses.create(**ask(), **SEEDED, stream=True)
        seen: list[dict[str, Any]] = []
        async for event in stream:
            seen.append(event.to_dict())
            if "delta" in seen[-1]:
                break
        await stream.close()
        response_id = seen[0]["response"]["id"]
        rest = await data_of(
            await client.responses.retrieve(
                response_id, stream=True, starting_after=seen[-1]["sequence_number"]
            )
        )
        assert joined(seen)[0] + joined(rest)[0] == whole.output_text
        stored = await client.responses.retrieve(response_id)
        assert (stored.status, stored.output_text) == ("incomplete", whole.output_text)


async def test_calls_of_tools_resume_within_their_arguments() -> None:
    worker = saying(CALL, chat_template=TOOLS_TEMPLATE)
    async with serving(verifiers=[worker]) as (_, client):
        asked = ask(max_output_tokens=200)
        whole = await data_of(await client.responses.create(**asked, tools=[TOOL], stream=True))
        response_id, last = whole[0]["response"]["id"], whole[-1]["sequence_number"]
        for number in range(0, last, STRIDE // 2):
            stream = await client.responses.retrieve(
                response_id, stream=True, starting_after=number
            )
            rest = await data_of(stream)
            before = [event for event in whole if event["sequence_number"] <= number]
            assert '{"city": "Bonn"}'.endswith(joined(rest)[0])
            assert joined(rest)[1] == joined(whole)[1][len(joined(before)[1]) :]


async def test_last_event_id_resumes_as_well(gateway: GatewayBench) -> None:
    body = ask(stream=True)
    text = (await gateway.http.post("/v1/responses", json=body)).text
    blocks = [dict(line.split(": ", 1) for line in b.splitlines()) for b in text.split("\n\n")[:-1]]
    assert "[DONE]" not in text
    assert blocks[0]["event"] == "response.created"
    response_id = json.loads(blocks[0]["data"])["response"]["id"]
    rest = await gateway.http.get(
        f"/v1/responses/{response_id}",
        params={"stream": "true"},
        headers={"last-event-id": blocks[-2]["id"]},
    )
    assert rest.text.count("data: ") == 1
    assert "response.incomplete" in rest.text


async def test_a_response_in_the_background_runs_on_alone(client: AsyncOpenAI) -> None:
    made = await client.responses.create(**ask(), **SEEDED, background=True)
    assert (made.status, made.background) == ("in_progress", True)
    events = await data_of(await client.responses.retrieve(made.id, stream=True))
    assert events[-1]["type"] == "response.incomplete"
    done = await ended(client, made.id)
    assert done.status == "incomplete"
    assert done.output_text == joined(events)[0]


async def ended(client: AsyncOpenAI, response_id: str) -> Any:
    """A response once it has ended; each look waits for the server."""
    async with asyncio.timeout(10):
        while (found := await client.responses.retrieve(response_id)).status == "in_progress":
            pass
    return found


async def test_a_response_in_the_background_can_be_streamed_at_once(client: AsyncOpenAI) -> None:
    stream = await client.responses.create(**ask(), background=True, stream=True)
    events = await data_of(stream)
    assert events[0]["type"] == "response.created"
    assert events[-1]["response"]["usage"]["output_tokens"] == 24


async def test_a_response_in_the_background_is_cancelled() -> None:
    worker = FakeVerifier(info_of("verify"))
    async with serving(verifiers=[worker]) as (_, client):
        worker.gate.clear()
        made = await client.responses.create(**ask(), background=True)
        assert (await client.responses.cancel(made.id)).status == "cancelled"
        worker.gate.set()
        assert (await client.responses.cancel(made.id)).status == "cancelled"
        events = await data_of(await client.responses.retrieve(made.id, stream=True))
        assert events[-1]["response"]["status"] == "cancelled"


async def test_one_whose_router_gave_it_up_runs_on_with_its_next_reader() -> None:
    worker = FakeVerifier(info_of("verify"))
    async with serving(verifiers=[worker]) as (gateway, client):
        worker.gate.clear()
        made = await client.responses.create(**ask(), background=True)
        stored = await ResponseStore(gateway.bench.store).get(made.id, Caller())
        await gateway.bench.store.finish(stored.session_id, "abandoned")
        worker.gate.set()
        events = await data_of(await client.responses.retrieve(made.id, stream=True))
        assert events[-1]["response"]["usage"]["output_tokens"] == 24
        assert (await ended(client, made.id)).status == "incomplete"


async def test_a_deleted_response_is_gone(client: AsyncOpenAI) -> None:
    made = await client.responses.create(**ask())
    await client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(made.id)


async def test_what_is_not_to_be_stored_is_not(client: AsyncOpenAI) -> None:
    made = await client.responses.create(**ask(), store=False)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(made.id)


async def test_input_items_are_listed_by_pages(client: AsyncOpenAI) -> None:
    asked: Any = [{"role": "user", "content": str(number)} for number in range(5)]
    made = await client.responses.create(**ask(input=asked))
    items = [item async for item in client.responses.input_items.list(made.id, limit=2)]
    contents: list[Any] = [item.to_dict()["content"] for item in items]
    texts = [content[0]["text"] for content in contents]
    assert texts == ["4", "3", "2", "1", "0"]


async def test_logprobs_come_with_the_text(client: AsyncOpenAI) -> None:
    made = await client.responses.create(
        **ask(), include=["message.output_text.logprobs"], top_logprobs=2
    )
    output: Any = made.to_dict()["output"]
    logprobs = output[0]["content"][0]["logprobs"]
    assert "".join(item["token"] for item in logprobs)
    assert all(len(item["top_logprobs"]) == 2 for item in logprobs)


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"conversation": "c"}, "conversation", "unsupported_parameter"),
        ({"reasoning": {"effort": "high"}}, "reasoning", "unsupported_parameter"),
        ({"nonsense": 1}, "nonsense", "unknown_parameter"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "invalid_request"),
        ({"truncation": "auto"}, "truncation", "invalid_request"),
        ({"max_output_tokens": 0}, "max_output_tokens", "invalid_request"),
        ({"max_output_tokens": 10**6}, "max_output_tokens", "invalid_request"),
        ({"background": True, "store": False}, "store", "invalid_request"),
        ({"previous_response_id": "resp_x"}, "previous_response_id", "not_found"),
        ({"input": []}, "input", "invalid_request"),
        ({"tools": [TOOL]}, "tools", "invalid_request"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", "invalid_request"),
    ],
)
async def test_what_is_not_served_is_refused(
    gateway: GatewayBench, changes: dict[str, Any], param: str, code: str
) -> None:
    answer = await gateway.http.post("/v1/responses", json=ask(**changes))
    error = answer.json()["error"]
    assert (error["param"] or "").startswith(param), error
    assert (answer.status_code, error["code"]) == (404 if code == "not_found" else 400, code)


@pytest.mark.parametrize(
    "query", ["stream=yes", "starting_after=-1", "foo=1", "stream=true&stream=true"]
)
async def test_queries_are_checked(gateway: GatewayBench, query: str) -> None:
    assert (await gateway.http.get(f"/v1/responses/resp_x?{query}")).status_code == 400


async def test_a_response_is_seen_by_its_own_key_alone(gateway: GatewayBench) -> None:
    made = (await gateway.http.post("/v1/responses", json=ask())).json()
    keep = ResponseStore(gateway.bench.store)
    await keep.get(made["id"], Caller())
    with pytest.raises(Exception, match="no response"):
        await keep.get(made["id"], Caller(key_id="other"))
