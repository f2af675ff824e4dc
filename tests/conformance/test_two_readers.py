"""Two readers of one stream: the later one takes it over, the earlier one is told so."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from tests.kit.gateway import GatewayBench, chat_body, running_gateway
from tests.kit.pausing import PausingVerifier, pausing

TEXT = "All is well, so far as anybody knows, and it will be so for a while."
PLAIN: dict[str, Any] = {"speculation": {"enabled": False}}


@pytest.fixture
def worker() -> PausingVerifier:
    return pausing(TEXT, pause_at=6)


@pytest.fixture
async def gateway(worker: PausingVerifier) -> AsyncIterator[GatewayBench]:
    async with running_gateway(verifiers=[worker]) as built:
        yield built


async def rest_of(events: Any) -> list[Any]:
    """What is left of a stream, as plain data."""
    return [event.to_dict() async for event in events]


def text_of(events: list[Any]) -> str:
    return "".join(event["delta"] for event in events if "delta" in event)


async def test_a_response_that_is_taken_over_goes_on_with_its_new_reader(
    gateway: GatewayBench, worker: PausingVerifier
) -> None:
    async with AsyncOpenAI(base_url=gateway.url + "/v1", api_key="none", max_retries=0) as client:
        first = await client.responses.create(
            model="table", input="words", stream=True, extra_body=PLAIN
        )
        created: Any = await anext(first)
        response_id = created.response.id
        second = await client.responses.retrieve(response_id, stream=True, starting_after=0)
        assert (await anext(second)).type == "response.in_progress"
        worker.go_on(pause_at=12)
        with pytest.raises(openai.APIError, match="taken over") as caught:
            await rest_of(first)
        assert caught.value.code == "lease_lost"
        # The one that lost it has nothing to say of how it ends.
        assert (await client.responses.retrieve(response_id)).status == "in_progress"
        await second.close()
        worker.go_on()
        third = await client.responses.retrieve(response_id, stream=True)
        events = await rest_of(third)
        assert (events[-1]["type"], text_of(events)) == ("response.completed", TEXT)
        stored = await client.responses.retrieve(response_id)
        assert (stored.status, stored.output_text) == ("completed", TEXT)


@asynccontextmanager
async def reading(
    gateway: GatewayBench, last_id: str = ""
) -> AsyncIterator[AsyncIterator[tuple[str, dict[str, Any]]]]:
    """One connection's events of a chat: (id, data), without the end marker."""
    headers = {"last-event-id": last_id} if last_id else {}
    body = chat_body(stream=True, max_tokens=200, **PLAIN)
    async with gateway.http.stream(
        "POST", "/v1/chat/completions", json=body, headers=headers
    ) as response:
        assert response.status_code == 200
        yield events_of(response)


async def events_of(response: httpx.Response) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    event_id = ""
    async for line in response.aiter_lines():
        name, _, value = line.partition(": ")
        if name == "id":
            event_id = value
        elif name == "data" and value != "[DONE]":
            yield event_id, json.loads(value)
            event_id = ""


async def test_a_chat_that_is_taken_over_goes_on_with_its_new_reader(
    gateway: GatewayBench, worker: PausingVerifier
) -> None:
    async with reading(gateway) as first:
        event_id, opening = await anext(first)
        assert opening["choices"][0]["delta"]["role"] == "assistant"
        async with reading(gateway, event_id) as second:
            chunks = [(await anext(second))[1]]
            worker.go_on()
            error = [data async for _, data in first][-1]["error"]
            assert (error["code"], error["type"]) == ("lease_lost", "invalid_request_error")
            assert "taken over" in error["message"]
            chunks += [data async for _, data in second]
    contents = [choice["delta"].get("content") for data in chunks for choice in data["choices"]]
    assert "".join(content or "" for content in contents) == TEXT
