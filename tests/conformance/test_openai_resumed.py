"""Streams that broke and went on: what is counted over the whole text goes on as well."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from itertools import accumulate
from typing import Any

import pytest

from specinfer_router.store import ABANDONED, MemoryStore
from tests.kit.gateway import GatewayBench, completion_body, running_gateway

PATH = "/v1/completions"


@pytest.fixture
async def gateway() -> AsyncIterator[GatewayBench]:
    async with running_gateway() as built:
        yield built


async def chunks_of(
    gateway: GatewayBench, body: dict[str, Any], last_id: str = ""
) -> AsyncGenerator[tuple[str, dict[str, Any]], None]:
    """(id, chunk) of each event of a stream; closing the iterator breaks the connection."""
    headers = {"last-event-id": last_id} if last_id else {}
    async with gateway.http.stream("POST", PATH, json=body, headers=headers) as response:
        assert response.status_code == 200
        event_id = ""
        async for line in response.aiter_lines():
            name, _, value = line.partition(": ")
            if name == "id":
                event_id = value
            elif name == "data" and value != "[DONE]":
                yield event_id, json.loads(value)
                event_id = ""


async def broken_after(
    gateway: GatewayBench, body: dict[str, Any], number: int
) -> tuple[str, list[dict[str, Any]]]:
    """The last id and the chunks of a stream that breaks after so many."""
    last_id, chunks = "", []
    async with aclosing(chunks_of(gateway, body)) as events:
        async for event_id, chunk in events:
            last_id = event_id or last_id
            chunks.append(chunk)
            if len(chunks) == number:
                break
    return last_id, chunks


def text_of(chunks: list[dict[str, Any]], index: int) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return "".join(choice["text"] for choice in choices if choice["index"] == index)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
async def test_no_choice_loses_its_echo(gateway: GatewayBench, number: int) -> None:
    body = completion_body(stream=True, n=3, echo=True, prompt="words and ", max_tokens=60)
    whole = [chunk async for _, chunk in chunks_of(gateway, body)]
    assert all(text_of(whole, index).startswith("words and ") for index in range(3))
    last_id, chunks = await broken_after(gateway, body, number)
    # Until every choice has begun there is no id to go on from: the call begins again.
    assert bool(last_id) == (number >= 3)
    kept = chunks if last_id else []
    rest = [chunk async for _, chunk in chunks_of(gateway, body, last_id)]
    for index in range(3):
        assert text_of(kept + rest, index) == text_of(whole, index)


async def test_offsets_of_logprobs_go_on(gateway: GatewayBench) -> None:
    body = completion_body(stream=True, logprobs=1, max_tokens=60)
    whole = [chunk async for _, chunk in chunks_of(gateway, body)]
    resumed_at = set()
    for number in range(1, len(whole), 3):
        last_id, _ = await broken_after(gateway, body, number)
        resumed_at.add(last_id.rpartition(":")[2])
        rest = [chunk async for _, chunk in chunks_of(gateway, body, last_id)]
        for chunk in rest:
            assert_consecutive(chunk["choices"][0]["logprobs"])
        told = offsets_of(rest)
        assert told
        # Tokens that are sent again have no logprobs; those that have them stand where they stood.
        assert told == {at: token for at, token in offsets_of(whole).items() if at >= min(told)}
    assert len(resumed_at) > 3


def assert_consecutive(logprobs: dict[str, Any] | None) -> None:
    if logprobs and logprobs["tokens"]:
        ends = accumulate(map(len, logprobs["tokens"]), initial=logprobs["text_offset"][0])
        assert logprobs["text_offset"] == list(ends)[:-1]


def offsets_of(chunks: list[dict[str, Any]]) -> dict[int, str]:
    """Tokens by their place in the text."""
    found: dict[int, str] = {}
    for chunk in chunks:
        logprobs = chunk["choices"][0]["logprobs"] or {"tokens": [], "text_offset": []}
        found |= dict(zip(logprobs["text_offset"], logprobs["tokens"], strict=True))
    return found


async def lost(gateway: GatewayBench, last_id: str, kept: int) -> None:
    """Let the store forget all but the first tokens of a choice's session."""
    session_id = last_id.rpartition(":")[0]
    store = gateway.bench.store
    assert isinstance(store, MemoryStore)
    async with asyncio.timeout(10):
        await gateway.bench.router.idle()
    record = await store.load(session_id)
    prompt = record.token_ids[: record.terms.num_prompt_tokens]
    store.forget(session_id)
    await store.create(record._replace(token_ids=prompt, epoch=0, finish_reason=""))
    await store.commit(session_id, 0, record.output_ids[:kept], owner=record.owner)
    await store.finish(session_id, ABANDONED)


@pytest.mark.parametrize("logprobs", [None, 1])
async def test_an_event_stream_goes_on_after_the_store_lost_tokens(
    gateway: GatewayBench, logprobs: int | None
) -> None:
    body = completion_body(stream=True, max_tokens=60, logprobs=logprobs)
    whole = [chunk async for _, chunk in chunks_of(gateway, body)]
    for number, kept in ((6, 1), (6, 5), (9, 2)):
        last_id, chunks = await broken_after(gateway, body, number)
        offset = int(last_id.rpartition(":")[2])
        assert offset > kept
        await lost(gateway, last_id, kept)
        rest = [chunk async for _, chunk in chunks_of(gateway, body, last_id)]
        assert text_of(chunks + rest, 0) == text_of(whole, 0)
        if logprobs is not None:
            told = offsets_of(chunks) | offsets_of(rest)
            assert told == offsets_of(whole)
