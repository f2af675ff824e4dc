"""The body of a chat completion, and the request that it makes.

This module knows nothing of streams or answers.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from specinfer.errors import InvalidRequest
from specinfer.messages import ChatMessage, GenerateRequest, Grammar, ToolCall
from specinfer.sampling import MAX_LOGPROBS
from specinfer_router.gateway.body import Body, unserved
from specinfer_router.gateway.fields import (
    GenerationFields,
    Metadata,
    ShortText,
    check_stream_options,
    choice_id,
    grammar_of,
    priority_of,
    sampling_of,
    speculation_of,
    stop_of,
)
from specinfer_router.gateway.tool_fields import (
    ONLY_FUNCTIONS,
    ToolChoiceFields,
    Tools,
    function_tools,
    tool_choice_of,
)
from specinfer_router.gateway.tools import ToolPlan, instructed, plan_tools
from specinfer_router.tokenizer import MAX_MESSAGES

MAX_TOOL_CALLS = 128


class TextPart(Body):
    """Text among other kinds of content, of which none is served."""

    type: Annotated[
        Literal["text"],
        unserved("image_url", "input_audio", "file", advice="this model reads text alone"),
        unserved("refusal", advice="send a refusal as the message's refusal"),
    ]
    text: str
    prompt_cache_breakpoint: Annotated[None, unserved(advice="use prompt_cache_key")] = None


Content = str | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES)]


class FunctionCall(Body):
    """A function's name and its arguments, as JSON in a string."""

    name: str
    arguments: str
    # What the client's helpers made of the arguments; they send it back.
    parsed_arguments: Any = None


class ToolCallFields(Body):
    """A call that the assistant made."""

    id: str
    type: Annotated[Literal["function"], unserved("custom", advice=ONLY_FUNCTIONS)]
    function: FunctionCall


class SystemMessage(Body):
    """What the model is told before the conversation."""

    role: Literal["system", "developer"]
    content: Content
    name: ShortText | None = None


class UserMessage(Body):
    """What the user says."""

    role: Literal["user"]
    content: Content
    name: ShortText | None = None


class AssistantMessage(Body):
    """What the model said, in the form in which an answer tells it."""

    role: Literal["assistant"]
    content: Content | None = None
    name: ShortText | None = None
    refusal: str | None = None
    tool_calls: Annotated[list[ToolCallFields], Field(max_length=MAX_TOOL_CALLS)] | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: Annotated[None, unserved(advice="this model reads text alone")] = None
    function_call: Annotated[None, unserved(advice="use tool_calls")] = None
    # What the client's helpers made of the content; they send it back.
    parsed: Any = None


class ToolMessage(Body):
    """What a tool answered."""

    role: Literal["tool"]
    content: Content
    tool_call_id: ShortText
    name: ShortText | None = None


Message = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage,
    Field(discriminator="role"),
    unserved("function", advice="use the role tool", key="role"),
]


class JsonSchema(Body):
    """A named JSON schema."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextFormat(Body):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(Body):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(Body):
    """JSON that a schema describes."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class Prediction(Body):
    """Text that the answer is expected to be like; it is guessed from."""

    type: Literal["content"]
    content: Content


Modality = Annotated[Literal["text"], unserved("audio", advice="this model writes text alone")]


class ChatBody(GenerationFields):
    """The body of POST /v1/chat/completions."""

    unsupported: ClassVar[dict[str, str]] = {
        "audio": "this model writes text alone",
        "web_search_options": "there is no web search here",
        "functions": "use tools",
        "function_call": "use tool_choice",
        "moderation": "there is no moderation here",
        "best_of": "use n",
        "prompt_cache_options": "use prompt_cache_key",
        "prompt_cache_retention": "use prompt_cache_key",
    }

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    response_format: (
        Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]
        | None
    ) = None
    tools: Tools | None = None
    tool_choice: ToolChoiceFields | None = None
    parallel_tool_calls: bool | None = None
    prediction: Prediction | None = None
    prompt_cache_key: ShortText | None = None
    safety_identifier: ShortText | None = None
    metadata: Metadata | None = None
    service_tier: (
        Annotated[
            Literal["auto", "default", "flex", "priority"],
            unserved("scale", "fast", advice="the tiers here are default, flex and priority"),
        ]
        | None
    ) = None
    store: (
        Annotated[
            Literal[False],
            unserved(True, advice="chat completions are not kept; /v1/responses keeps its answers"),
        ]
        | None
    ) = None
    modalities: Annotated[list[Modality], Field(min_length=1, max_length=1)] | None = None
    reasoning_effort: (
        Annotated[
            Literal["none", "medium"],
            unserved(
                "minimal", "low", "high", "xhigh", "max", advice="there is no reasoning to set"
            ),
        ]
        | None
    ) = None
    verbosity: (
        Annotated[
            Literal["medium"], unserved("low", "high", advice="this model has no verbosity to set")
        ]
        | None
    ) = None


def tool_plan_of(body: ChatBody, template: str) -> ToolPlan:
    """How tools are offered and their calls read; raises InvalidRequest."""
    tools = function_tools(body.tools or ())
    choice = tool_choice_of(body.tool_choice, any_tools=bool(tools))
    return plan_tools(tools, choice, body.parallel_tool_calls is not False, template)


def chat_requests(body: ChatBody, plan: ToolPlan, request_id: str) -> list[GenerateRequest]:
    """One request for each choice; raises InvalidRequest."""
    check_stream_options(body)
    grammar = _grammar(body, plan)
    stop = stop_of(body, _max_tokens(body))
    messages = instructed(chat_messages(body.messages), plan.instruction)
    prediction = body.prediction
    number = body.n or 1
    return [
        GenerateRequest(
            messages=messages,
            model=body.model,
            sampling=sampling_of(body, choice),
            random_seed=body.seed is None,
            stop=stop,
            num_logprobs=_num_logprobs(body),
            speculation=speculation_of(body),
            request_id=choice_id(request_id, choice, number),
            tools=plan.template_tools,
            grammar=grammar,
            prediction=_text(prediction.content) if prediction else "",
            affinity_key=body.prompt_cache_key or "",
            priority=priority_of(body, body.service_tier),
            detail=bool(body.speculation and body.speculation.detail),
        )
        for choice in range(number)
    ]


def chat_messages(messages: list[Message]) -> tuple[ChatMessage, ...]:
    """A conversation as the router takes it."""
    return tuple(_message(message) for message in messages)


def format_grammar(
    asked: TextFormat | JsonObjectFormat | JsonSchemaFormat | None,
) -> Grammar | None:
    """What a response format demands of the text; raises InvalidRequest."""
    if asked is None or isinstance(asked, TextFormat):
        return None
    if isinstance(asked, JsonObjectFormat):
        return Grammar("json_object")
    if asked.json_schema.schema_ is None:
        raise InvalidRequest(
            "a json_schema format needs a schema", field="response_format.json_schema.schema"
        )
    return Grammar("json_schema", json.dumps(asked.json_schema.schema_))


def _grammar(body: ChatBody, plan: ToolPlan) -> Grammar | None:
    wanted = {
        "response_format": format_grammar(body.response_format),
        "structured_outputs": grammar_of(body.structured_outputs),
        "tool_choice": plan.grammar,
    }
    given = {name: grammar for name, grammar in wanted.items() if grammar is not None}
    if len(given) > 1:
        names = list(given)
        raise InvalidRequest(
            f"{' and '.join(names)} each say what the text must match; give one", field=names[1]
        )
    return next(iter(given.values()), None)


def _max_tokens(body: ChatBody) -> int | None:
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise InvalidRequest(
            "max_tokens is the older name of max_completion_tokens; give one", field="max_tokens"
        )
    return new if old is None else old


def _num_logprobs(body: ChatBody) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs is not None:
        raise InvalidRequest("top_logprobs needs logprobs: true", field="top_logprobs")
    return None


def _message(message: SystemMessage | UserMessage | AssistantMessage | ToolMessage) -> ChatMessage:
    role = "system" if message.role == "developer" else message.role
    content = "" if message.content is None else _text(message.content)
    name = message.name or ""
    if isinstance(message, ToolMessage):
        return ChatMessage(role, content, name, message.tool_call_id)
    if not isinstance(message, AssistantMessage):
        return ChatMessage(role, content, name)
    calls = tuple(
        ToolCall(call.id, call.function.name, call.function.arguments)
        for call in message.tool_calls or ()
    )
    return ChatMessage(role, content or message.refusal or "", name, tool_calls=calls)


def _text(content: str | list[TextPart]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.text for part in content)
