"""Through whole clusters: calls of tools that their schemas allow, and responses on two routers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from jsonschema import validate
from openai import AsyncOpenAI

from specinfer_cli.cluster import ClusterSettings, running_cluster
from tests.cluster.test_resume import TwoRouters, second_router

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Bonn", "Oslo", "Lima"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "note": {"type": "string", "maxLength": 12},
    },
    "required": ["city", "days", "note"],
    "additionalProperties": False,
}
FUNCTION: dict[str, Any] = {"name": "weather", "description": "Tells it.", "parameters": SCHEMA}
NAMED = {"type": "function", "function": {"name": "weather"}}
ASK: Any = [{"role": "user", "content": "What will the weather be?"}]
RESPONSE: dict[str, Any] = {"input": "the cat", "max_output_tokens": 64, "temperature": 0.8}


@pytest.fixture(scope="module")
def routers(
    tiny_settings: ClusterSettings,
    redis_server: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[TwoRouters]:
    settings = dataclasses.replace(tiny_settings, name="target", redis=redis_server, group="calls")
    folder: Path = tmp_path_factory.mktemp("second")
    with running_cluster(settings) as first, second_router(first, settings, folder) as both:
        yield both


@asynccontextmanager
async def clients(routers: TwoRouters) -> AsyncIterator[tuple[AsyncOpenAI, AsyncOpenAI]]:
    addresses = (routers.first.gateway, routers.second_gateway)
    first, second = (
        AsyncOpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0)
        for address in addresses
    )
    async with first, second:
        yield first, second


async def arguments_of_a_call(client: Any, **changes: Any) -> tuple[str, int]:
    """The arguments of the one call of a chat completion, and how many guesses came true."""
    answer = await client.chat.completions.create(
        model="target",
        messages=ASK,
        tools=[{"type": "function", "function": FUNCTION}],
        parallel_tool_calls=False,
        max_tokens=160,
        temperature=1.2,
        **changes,
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls
    assert call.function.name == "weather"
    details = answer.usage.completion_tokens_details
    return call.function.arguments, details.accepted_prediction_tokens


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "by name"])
async def test_forced_calls_obey_their_schema_and_speculation_changes_nothing(
    routers: TwoRouters, choice: Any
) -> None:
    num_accepted = 0
    async with clients(routers) as (client, _):
        for seed in range(6):
            both = []
            for enabled in (True, False):
                arguments, accepted = await arguments_of_a_call(
                    client,
                    tool_choice=choice,
                    seed=seed,
                    extra_body={"speculation": {"enabled": enabled, "widths": [2, 1, 1]}},
                )
                validate(json.loads(arguments), SCHEMA)
                both.append(arguments)
                num_accepted += accepted
            assert both[0] == both[1]
    assert num_accepted > 0


async def test_a_response_calls_a_tool(routers: TwoRouters) -> None:
    tool: Any = {"type": "function", "strict": True, **FUNCTION}
    async with clients(routers) as (client, _):
        made: Any = await client.responses.create(
            input="What will the weather be?",
            tools=[tool],
            tool_choice="required",
            parallel_tool_calls=False,
            max_output_tokens=160,
        )
    (call,) = made.output
    assert made.status == "completed"
    assert call.type == "function_call"
    validate(json.loads(call.arguments), SCHEMA)


async def test_a_broken_response_goes_on_through_another_router(routers: TwoRouters) -> None:
    """At each of some places: every event once, and the text of the unbroken one."""
    async with clients(routers) as (first, second):
        unbroken = await first.responses.create(**RESPONSE, extra_body={"seed": 5})
        for num_events in (1, 3, 4, 6, 9, 14, 20):
            stream = await first.responses.create(**RESPONSE, extra_body={"seed": 5}, stream=True)
            read: list[Any] = []
            async for event in stream:
                read.append(event)
                if len(read) == num_events:
                    break
            await stream.close()
            last = read[-1].sequence_number
            rest = await second.responses.retrieve(
                read[0].response.id, stream=True, starting_after=last
            )
            read += [event async for event in rest]
            numbers = [event.sequence_number for event in read]
            assert numbers == sorted(set(numbers))
            text = "".join(event.delta for event in read if hasattr(event, "delta"))
            assert read[-1].response.error is None, read[-1].response.error
            assert text == unbroken.output_text
            assert read[-1].response.output_text == text
            stored = await first.responses.retrieve(read[0].response.id)
            assert stored.output_text == text
            assert stored.status == unbroken.status


async def test_a_response_in_the_background_is_read_and_cancelled_elsewhere(
    routers: TwoRouters,
) -> None:
    async with clients(routers) as (first, second):
        unbroken = await first.responses.create(**RESPONSE, extra_body={"seed": 5})
        made = await first.responses.create(**RESPONSE, background=True, extra_body={"seed": 5})
        events: Any = await second.responses.retrieve(made.id, stream=True)
        text = "".join([event.delta async for event in events if hasattr(event, "delta")])
        assert text == unbroken.output_text
        made = await first.responses.create(
            input="the cat", background=True, temperature=0, max_output_tokens=400
        )
        await second.responses.cancel(made.id)
        assert (await first.responses.retrieve(made.id)).status == "cancelled"
