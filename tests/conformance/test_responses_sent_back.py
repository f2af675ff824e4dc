"""Items that a response or the client's helpers gave, sent back as the input of another one."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from openai import AsyncOpenAI
from pydantic import BaseModel

from tests.kit.gateway import TOOLS_TEMPLATE, GatewayBench, running_gateway, saying

TOOL: Any = {
    "type": "function",
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call>'


class Answer(BaseModel):
    """What is parsed."""

    city: str


def ask(items: Any = "words", **changes: Any) -> dict[str, Any]:
    """A request of few tokens."""
    return {"model": "table", "input": items, "max_output_tokens": 200} | changes


def client_of(gateway: GatewayBench) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=gateway.url + "/v1", api_key="none", max_retries=0)


@pytest.fixture
async def calling() -> AsyncIterator[GatewayBench]:
    """A gateway whose model says something and calls a tool."""
    worker = saying("So: " + CALL, chat_template=TOOLS_TEMPLATE)
    async with running_gateway(verifiers=[worker]) as gateway:
        yield gateway


@pytest.mark.parametrize("form", ["objects", "dumped", "json"])
async def test_a_parsed_call_may_be_sent_back(calling: GatewayBench, form: str) -> None:
    async with client_of(calling) as client:
        parsed = await client.responses.parse(**ask(), tools=[TOOL], top_logprobs=1)
        message, call = parsed.output
        assert call.type == "function_call"
        assert call.parsed_arguments == {"city": "Bonn"}
        forms: dict[str, list[Any]] = {
            "objects": [message, call],
            "dumped": [message.model_dump(), call.model_dump()],
            "json": [message.to_dict(), call.to_dict()],
        }
        answer = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
        again = await client.responses.create(**ask([*forms[form], answer]), tools=[TOOL])
        assert again.status == "completed"
        kept = await client.responses.input_items.list(again.id, order="asc")
        assert [item.type for item in kept.data] == [
            "message",
            "function_call",
            "function_call_output",
        ]
        # Nor does a list of items hold anything that cannot be sent back.
        items = [item.model_dump() for item in kept.data]
        assert (await client.responses.create(**ask(items), tools=[TOOL])).status == "completed"


async def test_a_parsed_message_may_be_sent_back() -> None:
    async with (
        running_gateway(verifiers=[saying('{"city": "Bonn"}')]) as gateway,
        client_of(gateway) as client,
    ):
        parsed = await client.responses.parse(**ask(), text_format=Answer)
        assert parsed.output_parsed == Answer(city="Bonn")
        for item in (parsed.output[0], parsed.output[0].model_dump()):
            again = await client.responses.create(**ask([{"role": "user", "content": "so"}, item]))
            assert again.status == "completed"


async def test_a_number_that_json_has_not_begins_no_run(calling: GatewayBench) -> None:
    content = json.dumps(ask(background=True, tools=[TOOL]))
    content = content.replace('"additionalProperties": false', '"maximum": 1e999')
    answer = await calling.http.post("/v1/responses", content=content)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")
    assert not calling.bench.verifiers[0].frames
