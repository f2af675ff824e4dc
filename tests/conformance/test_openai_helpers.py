"""What the real client returns and sends: turns sent back, headers, every field that it knows."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

import openai
import pytest
from openai import AsyncOpenAI
from openai.types import completion_create_params as completion_params
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionContentPartTextParam,
    ChatCompletionStreamOptionsParam,
    ChatCompletionSystemMessageParam,
    ChatCompletionToolMessageParam,
    ChatCompletionUserMessageParam,
)
from openai.types.chat import completion_create_params as chat_params
from openai.types.shared_params import FunctionDefinition, ResponseFormatJSONSchema
from pydantic import BaseModel

from specinfer.errors import InvalidRequest
from specinfer_router.gateway.body import Body, validate
from specinfer_router.gateway.chat_request import (
    AssistantMessage,
    ChatBody,
    JsonSchemaFormat,
    SystemMessage,
    TextPart,
    ToolMessage,
    UserMessage,
)
from specinfer_router.gateway.completions_request import CompletionBody
from specinfer_router.gateway.errors import UnsupportedParameter, UnsupportedValue
from specinfer_router.gateway.fields import StreamOptions
from specinfer_router.gateway.tool_fields import FunctionFields
from tests.kit.gateway import (
    TOOLS_TEMPLATE,
    GatewayBench,
    chat_body,
    completion_body,
    running_gateway,
    saying,
)

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
BARE_CALL = '{"name": "weather", "parameters": {"city": "Oslo"}}'


@pytest.fixture
async def gateway() -> AsyncIterator[GatewayBench]:
    async with running_gateway() as built:
        yield built


def client_of(gateway: GatewayBench, **options: Any) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=gateway.url + "/v1", api_key="none", max_retries=0, **options)


class Point(BaseModel):
    """What an answer is parsed into."""

    x: int


class Weather(BaseModel):
    """What a call's arguments are parsed into."""

    city: str


WEATHER: Any = openai.pydantic_function_tool(Weather, name="weather")


# The client's own: the type that it gives what it parsed is another one than it writes down.
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning")
async def test_a_parsed_answer_can_be_sent_back() -> None:
    async with (
        running_gateway(verifiers=[saying('{"x": 4}')]) as gateway,
        client_of(gateway) as client,
    ):
        body = chat_body(max_tokens=60)
        messages = list(body.pop("messages"))
        parse = client.chat.completions.parse
        first = await parse(**body, messages=messages, response_format=Point)
        assert first.choices[0].message.parsed == Point(x=4)
        messages += [first.choices[0].message, {"role": "user", "content": "again"}]
        second = await parse(**body, messages=messages, response_format=Point)
        assert second.choices[0].message.parsed == Point(x=4)
        messages[1] = first.choices[0].message.model_dump()
        assert (await client.chat.completions.create(**body, messages=messages)).choices


async def test_parsed_calls_can_be_sent_back() -> None:
    verifier = saying(CALL, chat_template=TOOLS_TEMPLATE)
    async with running_gateway(verifiers=[verifier]) as gateway, client_of(gateway) as client:
        body = chat_body(max_tokens=100, tools=[WEATHER])
        messages = list(body.pop("messages"))
        first = await client.chat.completions.parse(**body, messages=messages)
        message = first.choices[0].message
        (call,) = message.tool_calls or []
        assert call.function.parsed_arguments == Weather(city="Oslo")
        answer = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
        for sent in (message, message.model_dump()):
            again = [*messages, sent, answer]
            second = await client.chat.completions.create(**body, messages=again)
            assert second.choices[0].finish_reason == "tool_calls"


async def test_nulls_that_others_invented_are_nothing(gateway: GatewayBench) -> None:
    turn = {"role": "assistant", "content": "a", "reasoning_content": None, "async_": None}
    user = {"role": "user", "content": "b"}
    assert (await gateway.chat(messages=[turn, user], reasoning=None)).status_code == 200


async def test_the_clients_own_headers_are_taken(gateway: GatewayBench) -> None:
    headers = {"OpenAI-Beta": "assistants=v2", "x-stainless-retry-count": "1"}
    options = {"organization": "org", "project": "proj", "default_headers": headers}
    async with client_of(gateway, **options) as client:
        raw = await client.chat.completions.with_raw_response.create(**chat_body())
        sent = raw.http_request.headers
        assert (sent["openai-organization"], sent["openai-project"]) == ("org", "proj")
        assert "x-stainless-lang" in sent
        assert raw.status_code == 200


@pytest.mark.parametrize(
    ("stop", "reason"), [("Oslo", "stop"), ("</tool_call>", "tool_calls"), ("{", "stop")]
)
async def test_a_call_that_a_stop_string_cuts_off_is_no_reason_to_call(
    stop: str, reason: str
) -> None:
    verifier = saying(CALL, chat_template=TOOLS_TEMPLATE)
    async with running_gateway(verifiers=[verifier]) as gateway, client_of(gateway) as client:
        body = chat_body(max_tokens=100, tools=[WEATHER], stop=stop)
        whole = await client.chat.completions.create(**body)
        assert whole.choices[0].finish_reason == reason
        stream = await client.chat.completions.create(**body, stream=True)
        reasons = [chunk.choices[0].finish_reason async for chunk in stream]
        assert reasons[-1] == reason


@pytest.mark.parametrize(
    ("template", "text"), [(TOOLS_TEMPLATE, CALL), (None, BARE_CALL)], ids=["tagged", "bare"]
)
async def test_a_forced_call_that_is_cut_off_early_is_no_content(
    template: str | None, text: str
) -> None:
    options = {} if template is None else {"chat_template": template}
    verifier = saying(text, **options)
    async with running_gateway(verifiers=[verifier]) as gateway:
        forced = {"tools": [WEATHER], "tool_choice": "required"}
        for max_tokens in (3, 12, 20):
            (choice,) = (await gateway.chat(max_tokens=max_tokens, **forced)).json()["choices"]
            assert choice["finish_reason"] == "length"
            assert choice["message"]["content"] == ""
            streamed = await gateway.chat(max_tokens=max_tokens, stream=True, **forced)
            assert '"content":"{' not in streamed.text
            assert '"content":"<' not in streamed.text


def known_to_us(model: type[Body]) -> set[str]:
    """Names that a body either takes or refuses as known."""
    taken = {field.alias or name for name, field in model.model_fields.items()}
    return taken | set(model.unsupported)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (chat_params.CompletionCreateParamsStreaming, ChatBody),
        (completion_params.CompletionCreateParamsStreaming, CompletionBody),
        (ChatCompletionStreamOptionsParam, StreamOptions),
        (ChatCompletionSystemMessageParam, SystemMessage),
        (ChatCompletionUserMessageParam, UserMessage),
        (ChatCompletionAssistantMessageParam, AssistantMessage),
        (ChatCompletionToolMessageParam, ToolMessage),
        (ChatCompletionContentPartTextParam, TextPart),
        (FunctionDefinition, FunctionFields),
        (ResponseFormatJSONSchema, JsonSchemaFormat),
    ],
)
def test_every_field_of_the_client_is_known(theirs: Any, ours: type[Body]) -> None:
    assert set(get_type_hints(theirs)) - known_to_us(ours) == set()


def literals(hint: Any) -> Iterator[str]:
    """Values that a type names, on its surface or in a list."""
    if get_origin(hint) is Literal:
        yield from get_args(hint)
        return
    for part in get_args(hint):
        yield from literals(part)


CHOICES = [
    (name, value)
    for name in ("modalities", "reasoning_effort", "service_tier", "verbosity")
    for value in literals(get_type_hints(chat_params.CompletionCreateParamsStreaming)[name])
]


def refusal(body: dict[str, Any]) -> InvalidRequest | None:
    """What is wrong with a chat completion's body."""
    try:
        validate(json.dumps(body).encode(), ChatBody)
    except InvalidRequest as error:
        return error
    return None


@pytest.mark.parametrize(("name", "value"), [*CHOICES, ("store", True), ("store", False)])
def test_every_value_of_the_client_is_known(name: str, value: Any) -> None:
    refused = refusal(chat_body() | {name: [value] if name == "modalities" else value})
    if refused is not None:
        assert isinstance(refused, UnsupportedValue)
        assert refused.field.startswith(name)
        assert json.dumps(value) in refused.message
    assert type(refusal(chat_body() | {name: "other"})) is InvalidRequest


@pytest.mark.parametrize(
    ("model", "body"), [(ChatBody, chat_body()), (CompletionBody, completion_body())]
)
def test_what_is_not_served_is_refused_as_such(model: type[Body], body: dict[str, Any]) -> None:
    assert model.unsupported
    for name in model.unsupported:
        with pytest.raises(UnsupportedParameter) as refused:
            validate(json.dumps(body | {name: {}}).encode(), model)
        assert refused.value.field == name
        with pytest.raises(InvalidRequest):
            validate(json.dumps(body | {f"{name}_": {}}).encode(), model)
