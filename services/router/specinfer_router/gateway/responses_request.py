"""The body of POST /v1/responses, the request that it makes, and the response that it begins.

This module knows nothing of streams, stores or what was generated.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from specinfer.errors import InvalidRequest
from specinfer.messages import GenerateRequest, Grammar, SpeculationOptions
from specinfer.sampling import MAX_LOGPROBS, MAX_SEED, SamplingParams, StopConditions
from specinfer_router.gateway.body import Body
from specinfer_router.gateway.fields import Metadata, ShortText, SpeculationFields
from specinfer_router.gateway.responses_items import Item, Items, conversation
from specinfer_router.gateway.tools import (
    MAX_TOOLS,
    FunctionTool,
    ToolChoice,
    ToolPlan,
    instructed,
    plan_tools,
)
from specinfer_router.tokenizer import MAX_MESSAGES

_PRIORITY_OF_TIER = {"flex": -1, "priority": 1}
_LOGPROBS = "message.output_text.logprobs"


class ResponseTool(Body):
    """A tool; functions are the one kind."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseNamedTool(Body):
    """One tool by its name."""

    type: Literal["function"]
    name: str


class ResponseAllowedTools(Body):
    """A choice among some of the tools."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[ResponseNamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class ResponseTextFormat(Body):
    """Any text."""

    type: Literal["text"]


class ResponseJsonObjectFormat(Body):
    """Any JSON object."""

    type: Literal["json_object"]


class ResponseJsonSchemaFormat(Body):
    """JSON that a schema describes."""

    type: Literal["json_schema"]
    name: Annotated[str, Field(min_length=1, max_length=64)]
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseTextFields(Body):
    """What the text has to be like."""

    format: (
        Annotated[
            ResponseTextFormat | ResponseJsonObjectFormat | ResponseJsonSchemaFormat,
            Field(discriminator="type"),
        ]
        | None
    ) = None
    verbosity: Literal["medium"] | None = None


class ResponseStreamOptions(Body):
    """What a stream carries beside its events."""

    include_obfuscation: Literal[False] | None = None


class ResponseBody(Body):
    """The body of POST /v1/responses."""

    unsupported: ClassVar[dict[str, str]] = {
        "conversation": "use previous_response_id",
        "prompt": "there are no stored prompts here",
        "reasoning": "this model has no reasoning to set",
        "max_tool_calls": "it counts built-in tools, of which there are none",
        "moderation": "there is no moderation here",
        "context_management": "a conversation is never shortened here",
        "prompt_cache_options": "use prompt_cache_key",
        "prompt_cache_retention": "use prompt_cache_key",
    }

    model: str | None = None
    input: str | Items
    instructions: str | None = None
    previous_response_id: ShortText | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    include: (
        Annotated[list[Literal["message.output_text.logprobs"]], Field(max_length=8)] | None
    ) = None
    text: ResponseTextFields | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: (
        Literal["none", "auto", "required"]
        | Annotated[ResponseNamedTool | ResponseAllowedTools, Field(discriminator="type")]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    background: bool | None = None
    store: bool | None = None
    truncation: Literal["disabled"] | None = None
    metadata: Metadata | None = None
    prompt_cache_key: ShortText | None = None
    safety_identifier: ShortText | None = None
    user: ShortText | None = None
    service_tier: Literal["auto", "default", "flex", "priority"] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    speculation: SpeculationFields | None = None

    @property
    def stored(self) -> bool:
        """Whether the response can be retrieved."""
        return self.store is not False

    @property
    def num_logprobs(self) -> int | None:
        """Most probable tokens to report with each; None reports none."""
        if self.top_logprobs is None and _LOGPROBS not in (self.include or ()):
            return None
        return self.top_logprobs or 0


def check_create(body: ResponseBody) -> None:
    """Raise InvalidRequest for fields that do not go together."""
    if body.background and not body.stored:
        raise InvalidRequest(
            "a response in the background is read from the store; leave store out", field="store"
        )
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options needs stream: true", field="stream_options")
    if body.speculation is not None and body.speculation.detail:
        raise InvalidRequest(
            "trees are shown by chat completions alone", field="speculation.detail"
        )


def response_plan(body: ResponseBody, template: str) -> ToolPlan:
    """How tools are offered and their calls read; raises InvalidRequest."""
    tools = [
        FunctionTool(tool.name, tool.description or "", tool.parameters, strict=bool(tool.strict))
        for tool in body.tools or ()
    ]
    return plan_tools(tools, _choice(body), body.parallel_tool_calls is not False, template)


def generate_request(
    body: ResponseBody, items: Sequence[Item], plan: ToolPlan, request_id: str
) -> GenerateRequest:
    """What the router is asked for.

    Args:
        body: checked.
        items: the whole conversation, earlier responses included.
        plan: of the body's tools.
        request_id: of the call.

    Raises:
        InvalidRequest: naming the parameter.
    """
    if len(items) > MAX_MESSAGES:
        raise InvalidRequest(
            f"a conversation has at most {MAX_MESSAGES} items, earlier responses included",
            field="previous_response_id" if body.previous_response_id else "input",
        )
    speculation = body.speculation or SpeculationFields()
    return GenerateRequest(
        messages=instructed(conversation(body.instructions or "", items), plan.instruction),
        model=body.model or "",
        sampling=_sampling(body),
        random_seed=body.seed is None,
        stop=_stop(body),
        num_logprobs=body.num_logprobs,
        speculation=SpeculationOptions(
            enabled=speculation.enabled,
            max_nodes=speculation.max_nodes,
            max_depth=speculation.max_depth,
            widths=tuple(speculation.widths or ()),
        ),
        request_id=request_id,
        tools=plan.template_tools,
        grammar=_grammar(body, plan),
        affinity_key=body.prompt_cache_key or "",
        priority=_PRIORITY_OF_TIER.get(body.service_tier or "", 0),
    )


def new_response(body: ResponseBody, created_at: int, model: str) -> dict[str, Any]:
    """The response object before anything was generated; its id comes with its session."""
    text = body.text.model_dump(by_alias=True, exclude_none=True) if body.text else {}
    choice = body.tool_choice
    return {
        "id": "",
        "object": "response",
        "created_at": created_at,
        "completed_at": None,
        "status": "in_progress",
        "background": bool(body.background),
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default" if body.service_tier in (None, "auto") else body.service_tier,
        "store": body.stored,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": {"type": "text"}, "verbosity": "medium"} | text,
        "tool_choice": choice.model_dump() if isinstance(choice, Body) else choice or "auto",
        "tools": [_told_tool(tool) for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }


def check_encodable(response: dict[str, Any]) -> None:
    """Refuse what could not be answered, before anything runs under an id that nobody learns.

    Raises:
        InvalidRequest: it holds a number that JSON has not, or is too deep.
    """
    try:
        json.dumps(response, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the body holds what no answer can repeat: {error}") from error


def _told_tool(tool: ResponseTool) -> dict[str, Any]:
    return {
        "type": "function",
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        "strict": bool(tool.strict),
    }


def _choice(body: ResponseBody) -> ToolChoice:
    choice = body.tool_choice
    if isinstance(choice, ResponseNamedTool):
        return ToolChoice("required", (choice.name,))
    if isinstance(choice, ResponseAllowedTools):
        return ToolChoice(choice.mode, tuple(tool.name for tool in choice.tools))
    return ToolChoice(choice or ("auto" if body.tools else "none"))


def _sampling(body: ResponseBody) -> SamplingParams:
    return SamplingParams(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=body.seed or 0,
    )


def _stop(body: ResponseBody) -> StopConditions:
    if body.max_output_tokens is not None and body.max_output_tokens < 1:
        raise InvalidRequest("max_output_tokens is at least 1", field="max_output_tokens")
    return StopConditions(max_tokens=body.max_output_tokens)


def _grammar(body: ResponseBody, plan: ToolPlan) -> Grammar | None:
    asked = body.text.format if body.text else None
    grammar = None
    if isinstance(asked, ResponseJsonObjectFormat):
        grammar = Grammar("json_object")
    elif isinstance(asked, ResponseJsonSchemaFormat):
        grammar = Grammar("json_schema", json.dumps(asked.schema_))
    if grammar is not None and plan.grammar is not None:
        raise InvalidRequest(
            "text.format and tool_choice each say what the text must match; give one",
            field="text.format",
        )
    return grammar or plan.grammar
