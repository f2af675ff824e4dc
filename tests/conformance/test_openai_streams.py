"""Streams with the real `openai` client: chunks, usage, early ends, failures and resumption."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai._streaming import SSEDecoder
from pydantic import BaseModel

from specinfer_router.gateway.sse import StreamSettings
from specinfer_router.opening import SeatLimits
from specinfer_router.router import RouterLimits
from tests.kit.fake_workers import FakeVerifier, info_of
from tests.kit.gateway import (
    TOOLS_TEMPLATE,
    GatewayBench,
    chat_body,
    completion_body,
    running_gateway,
    saying,
)

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object"}},
}
CALLS = (
    'It is so: <tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Bergen", "days": [1]}}\n</tool_call>'
)


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


def events_of(content: str) -> list[tuple[str, dict[str, Any]]]:
    """(id, data) of each event but the end marker."""
    events = []
    for block in content.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if line[:1] != ":")
        if "data" in lines and lines["data"] != "[DONE]":
            events.append((lines.get("id", ""), json.loads(lines["data"])))
    return events


def text_of(events: list[tuple[str, dict[str, Any]]], index: int = 0) -> str:
    """The text of one choice, of chat or of a completion."""
    choices = [choice for _, chunk in events for choice in chunk["choices"]]
    return "".join(
        choice["text"] if "text" in choice else choice["delta"].get("content") or ""
        for choice in choices
        if choice["index"] == index
    )


async def test_chunks_add_up_to_the_answer(client: AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(**chat_body())
    stream = await client.chat.completions.create(**chat_body(), stream=True)
    chunks = [chunk async for chunk in stream]
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["length"]
    assert all(chunk.usage is None for chunk in chunks)


async def test_the_sync_client_streams_too(gateway: GatewayBench) -> None:
    def read() -> str:
        with OpenAI(base_url=gateway.url + "/v1", api_key="none", max_retries=0) as client:
            stream = client.chat.completions.create(**chat_body(), stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    whole = (await gateway.chat()).json()["choices"][0]["message"]["content"]
    assert await asyncio.to_thread(read) == whole


async def test_usage_comes_last_and_alone(client: AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(**chat_body())
    stream = await client.chat.completions.create(
        **chat_body(), stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = [chunk async for chunk in stream]
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage is not None
    assert whole.usage is not None
    assert last.usage.total_tokens == whole.usage.total_tokens
    metrics: Any = last.to_dict()["metrics"]
    assert metrics["speculative_decoding"]["num_spec_steps"] > 0


async def test_usage_goes_along_when_asked_for(client: AsyncOpenAI) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    stream = await client.chat.completions.create(
        **chat_body(), stream=True, stream_options=options
    )
    counts = [chunk.usage.completion_tokens async for chunk in stream if chunk.usage]
    assert counts[0] == 0
    assert counts == sorted(counts)
    assert counts[-1] == 24


async def test_choices_are_told_apart_by_index(client: AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(**chat_body(n=3))
    stream = await client.chat.completions.create(**chat_body(n=3), stream=True)
    texts = {0: "", 1: "", 2: ""}
    ended = []
    async for chunk in stream:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        ended += [choice.index] if choice.finish_reason else []
    assert sorted(ended) == [0, 1, 2]
    assert list(texts.values()) == [choice.message.content for choice in whole.choices]


async def test_logprobs_come_with_their_chunks(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        **chat_body(logprobs=True, top_logprobs=1), stream=True
    )
    found = b""
    text = ""
    async for chunk in stream:
        choice = chunk.choices[0]
        text += choice.delta.content or ""
        content = choice.logprobs.content if choice.logprobs else None
        found += b"".join(bytes(item.bytes or ()) for item in content or ())
    assert found.decode(errors="replace") == text


async def test_detail_sends_the_tree_of_each_round(gateway: GatewayBench) -> None:
    body = {"stream": True, "speculation": {"detail": True}}
    events = events_of((await gateway.chat(**body)).text)
    details = [chunk["speculation"] for _, chunk in events if "speculation" in chunk]
    assert sum(len(detail["tokens"]) for detail in details) == 24
    for detail in details:
        tree, tokens = detail["tree"], detail["tokens"]
        assert len(tree["texts"]) == len(tree["parents"])
        assert tree["parents"][0] == -1
        assert [token["accepted"] for token in tokens[:-1]] == [True] * (len(tokens) - 1)
        named = [tree["texts"][node] for node in tree["accepted"]][: len(tokens)]
        assert [token["text"] for token in tokens][: len(named)] == named
        assert detail["round"]["num_accepted_tokens"] == sum(t["accepted"] for t in tokens)


class Point(BaseModel):
    """What the stream helper makes of an answer."""

    x: int
    label: str


async def test_the_stream_helper_parses_what_it_collected() -> None:
    async with (
        running_gateway(verifiers=[saying('{"x": 4, "label": "words"}')]) as gateway,
        client_of(gateway) as client,
        client.chat.completions.stream(**chat_body(max_tokens=60), response_format=Point) as stream,
    ):
        kinds = [event.type async for event in stream]
        answer = await stream.get_final_completion()
        assert answer.choices[0].message.parsed == Point(x=4, label="words")
        assert kinds.count("content.done") == 1
        assert "content.delta" in kinds


async def test_the_stream_helper_collects_calls_of_tools() -> None:
    verifier = saying(CALLS, chat_template=TOOLS_TEMPLATE)
    async with (
        running_gateway(verifiers=[verifier]) as gateway,
        client_of(gateway) as client,
        client.chat.completions.stream(**chat_body(max_tokens=200, tools=[TOOL])) as stream,
    ):
        kinds = [event.type async for event in stream]
        choice = (await stream.get_final_completion()).choices[0]
        assert kinds.count("tool_calls.function.arguments.done") == 2
        assert choice.finish_reason == "tool_calls"
        assert (choice.message.content or "").strip() == "It is so:"
        calls = choice.message.tool_calls or []
        cities = [json.loads(call.function.arguments)["city"] for call in calls]
        assert cities == ["Oslo", "Bergen"]


async def test_closing_a_stream_ends_its_session(
    gateway: GatewayBench, client: AsyncOpenAI
) -> None:
    (verifier,) = gateway.bench.verifiers
    verifier.gate.clear()
    stream = await client.chat.completions.create(**chat_body(max_tokens=400), stream=True)
    assert (await anext(stream)).choices[0].delta.role == "assistant"
    await verifier.wait_for("open", 1)
    await stream.close()
    verifier.gate.set()
    await verifier.wait_for("close", 1)
    assert verifier.num_steps <= 2


async def test_leaving_before_the_answer_ends_its_session(gateway: GatewayBench) -> None:
    (verifier,) = gateway.bench.verifiers
    verifier.gate.clear()
    asking = asyncio.create_task(gateway.chat(max_tokens=400, n=2))
    await verifier.wait_for("open", 1)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    verifier.gate.set()
    await verifier.wait_for("close", 2)
    assert verifier.num_steps <= 4


async def test_a_long_silence_is_filled_with_comments_that_clients_skip() -> None:
    settings = StreamSettings(keep_alive_seconds=0.02)
    async with running_gateway(streams=settings) as gateway:
        (verifier,) = gateway.bench.verifiers
        verifier.gate.clear()
        body = chat_body(stream=True)
        content = b""
        async with gateway.http.stream("POST", "/v1/chat/completions", json=body) as response:
            async for piece in response.aiter_bytes():
                content += piece
                if content.count(b": keep-alive\n") >= 3:
                    verifier.gate.set()
    # The first event has an id, which this client remembers over the comments.
    assert b"id: " in content[: content.index(b"data: ")]
    events = list(SSEDecoder().iter_bytes(iter([content])))
    assert events[-1].data == "[DONE]"
    chunks = [event.json() for event in events[:-1]]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


async def test_a_failure_in_mid_stream_is_told_and_the_stream_ends() -> None:
    verifier = FakeVerifier(info_of("verify"), break_steps=frozenset({2}))
    limits = RouterLimits(max_tree_nodes=32, seats=SeatLimits(failover_seconds=0.05))
    async with running_gateway(verifiers=[verifier], limits=limits) as gateway:
        async with client_of(gateway) as client:
            stream = await client.chat.completions.create(**chat_body(max_tokens=200), stream=True)
            with pytest.raises(openai.APIError) as caught:
                _ = [chunk async for chunk in stream]
        assert caught.value.type == "server_error"
        assert caught.value.code == "unavailable"


async def test_a_failure_in_mid_stream_is_an_event_and_then_the_end_marker() -> None:
    verifier = FakeVerifier(info_of("verify"), break_steps=frozenset({2}))
    limits = RouterLimits(max_tree_nodes=32, seats=SeatLimits(failover_seconds=0.05))
    async with running_gateway(verifiers=[verifier], limits=limits) as gateway:
        response = await gateway.complete(max_tokens=200, stream=True)
        assert response.status_code == 200
        events = events_of(response.text)
        assert events[-1][1]["error"]["code"] == "unavailable"
        assert response.text.endswith("data: [DONE]\n\n")


async def test_a_session_that_is_cancelled_elsewhere_ends_with_an_error(
    gateway: GatewayBench, client: AsyncOpenAI
) -> None:
    (verifier,) = gateway.bench.verifiers
    verifier.gate.clear()
    stream = await client.chat.completions.create(**chat_body(max_tokens=400), stream=True)
    session_id = (await anext(stream)).id.removeprefix("chatcmpl-")
    await gateway.bench.router.cancel(session_id)
    verifier.gate.set()
    with pytest.raises(openai.APIError) as caught:
        _ = [chunk async for chunk in stream]
    assert caught.value.code == "cancelled"


async def broken_at(
    gateway: GatewayBench, path: str, body: dict[str, Any], number: int
) -> list[tuple[str, dict[str, Any]]]:
    """The first events of a stream that is then cut."""
    content = ""
    async with gateway.http.stream("POST", path, json=body) as response:
        async for piece in response.aiter_text():
            content += piece
            if len(events_of(content[: content.rfind("\n\n") + 2])) >= number:
                break
    return events_of(content[: content.rfind("\n\n") + 2])[:number]


async def resumed(
    gateway: GatewayBench, path: str, body: dict[str, Any], event_id: str
) -> httpx.Response:
    return await gateway.http.post(path, json=body, headers={"last-event-id": event_id})


@pytest.mark.parametrize(
    ("path", "body", "choices"),
    [
        ("/v1/chat/completions", chat_body(stream=True, max_tokens=60), 1),
        ("/v1/chat/completions", chat_body(stream=True, stop=["eve"], max_tokens=100), 1),
        ("/v1/completions", completion_body(stream=True, n=2, max_tokens=60), 2),
    ],
)
async def test_a_broken_stream_goes_on_where_it_broke(
    gateway: GatewayBench, path: str, body: dict[str, Any], choices: int
) -> None:
    whole = events_of((await gateway.http.post(path, json=body)).text)
    for number in range(1, len(whole) + 1, 2):
        first = await broken_at(gateway, path, body, number)
        response = await resumed(gateway, path, body, first[-1][0])
        assert response.status_code == 200, response.text
        rest = events_of(response.text)
        deltas = [choice.get("delta", {}) for _, chunk in rest for choice in chunk["choices"]]
        assert not any("role" in delta for delta in deltas)
        assert first[0][1]["id"].split("-")[1] == first[0][0].split(":")[0]
        for index in range(choices):
            assert text_of(first + rest, index) == text_of(whole, index)


async def test_calls_of_tools_go_on_where_they_broke() -> None:
    verifier = saying(CALLS, chat_template=TOOLS_TEMPLATE)
    body = chat_body(stream=True, max_tokens=200, tools=[TOOL])
    path = "/v1/chat/completions"
    async with running_gateway(verifiers=[verifier]) as gateway:
        whole = events_of((await gateway.http.post(path, json=body)).text)
        assert len(whole) > 20
        for number in range(1, len(whole), 4):
            first = await broken_at(gateway, path, body, number)
            rest = events_of((await resumed(gateway, path, body, first[-1][0])).text)
            assert calls_of(first + rest) == calls_of(whole)
            assert text_of(first + rest) == text_of(whole)


def calls_of(events: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, str]]:
    """(name, arguments) of each call in a stream."""
    calls: dict[int, tuple[str, str]] = {}
    for _, chunk in events:
        for choice in chunk["choices"]:
            for call in choice["delta"].get("tool_calls", []):
                name, arguments = calls.get(call["index"], ("", ""))
                function = call["function"]
                calls[call["index"]] = (
                    name + function.get("name", ""),
                    arguments + function["arguments"],
                )
    return list(calls.values())


@pytest.mark.parametrize("event_id", ["nonsense", "a:b", "a:1,b:2", "a:-1", ":1", "a:1,"])
async def test_an_id_that_is_none_is_refused(gateway: GatewayBench, event_id: str) -> None:
    response = await resumed(gateway, "/v1/chat/completions", chat_body(stream=True), event_id)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "last-event-id"


async def test_an_unknown_session_is_not_found(gateway: GatewayBench) -> None:
    body = chat_body(stream=True)
    response = await resumed(gateway, "/v1/chat/completions", body, f"{'0' * 32}:3")
    assert response.status_code == 404
    assert response.json()["error"]["param"] == "last-event-id"


async def test_an_offset_past_the_end_is_refused(gateway: GatewayBench) -> None:
    body = chat_body(stream=True)
    session_id = events_of((await gateway.chat(stream=True)).text)[-1][0].split(":")[0]
    response = await resumed(gateway, "/v1/chat/completions", body, f"{session_id}:25")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "last-event-id"
