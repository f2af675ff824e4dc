"""Fields that chat completions and completions share, and what they mean to the router.

The names and meanings are OpenAI's; those that OpenAI does not have are vLLM's, and `speculation`
is ours. This module knows nothing of messages, streams or answers.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from specinfer.errors import InvalidRequest
from specinfer.messages import Grammar, SpeculationOptions
from specinfer.sampling import MAX_SEED, SamplingParams, StopConditions
from specinfer_router.checks import MAX_REQUEST_ID_LENGTH
from specinfer_router.gateway.body import Body, unserved

MAX_CHOICES_PER_PROMPT = 8
MAX_WIDTHS = 64
_PRIORITY_OF_TIER = {"flex": -1, "priority": 1}

ShortText = Annotated[str, Field(max_length=512)]
Metadata = Annotated[dict[Annotated[str, Field(max_length=64)], ShortText], Field(max_length=16)]


class StreamOptions(Body):
    """What a stream carries beside its chunks."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: (
        Annotated[Literal[False], unserved(True, advice="chunks are not padded here")] | None
    ) = None


class SpeculationFields(Body):
    """How to speculate; none of it changes a token. `detail` sends each round's tree along."""

    enabled: bool = True
    max_nodes: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    max_depth: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    widths: Annotated[list[Annotated[int, Field(ge=1)]], Field(max_length=MAX_WIDTHS)] | None = None
    detail: bool = False


class StructuredOutputs(Body):
    """What the text has to match: exactly one of these."""

    json_schema: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: Annotated[str, Field(min_length=1)] | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    grammar: Annotated[str, Field(min_length=1)] | None = None
    json_object: Literal[True] | None = None


class GenerationFields(Body):
    """Fields of every request that generates."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES_PER_PROMPT)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    speculation: SpeculationFields | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    user: ShortText | None = None


def sampling_of(body: GenerationFields, choice: int) -> SamplingParams:
    """How the tokens of one choice are drawn; raises InvalidRequest.

    Each choice has a seed of its own, counted up from the request's.
    """
    given = {
        name: getattr(body, name)
        for name in (
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        )
        if getattr(body, name) is not None
    }
    if given.get("top_k") == -1:
        # vLLM's way to say that all tokens are kept.
        given["top_k"] = 0
    # Seeds of OpenAI's may be negative; two that differ there differ here.
    seed = ((body.seed or 0) + choice) & MAX_SEED
    return SamplingParams(**given, logit_bias=_biases(body.logit_bias or {}), seed=seed)


def stop_of(body: GenerationFields, max_tokens: int | None) -> StopConditions:
    """When the stream ends; raises InvalidRequest."""
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return StopConditions(
        max_tokens=max_tokens,
        stop=stop,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
    )


def speculation_of(body: GenerationFields) -> SpeculationOptions:
    """How to speculate."""
    asked = body.speculation or SpeculationFields()
    return SpeculationOptions(
        enabled=asked.enabled,
        max_nodes=asked.max_nodes,
        max_depth=asked.max_depth,
        widths=tuple(asked.widths or ()),
    )


def grammar_of(asked: StructuredOutputs | None) -> Grammar | None:
    """What the text has to match; raises InvalidRequest unless one thing is asked for."""
    if asked is None:
        return None
    given = {name: value for name, value in asked if value is not None}
    if len(given) != 1:
        raise InvalidRequest(
            "structured_outputs takes exactly one of json, regex, choice, grammar and json_object",
            field="structured_outputs",
        )
    ((name, value),) = given.items()
    if name == "json_object":
        return Grammar("json_object")
    text = value if isinstance(value, str) else json.dumps(value)
    return Grammar("lark" if name == "grammar" else name, text)


def priority_of(body: GenerationFields, service_tier: str | None) -> int:
    """Higher starts first; vLLM's `priority` counts the other way. Raises InvalidRequest."""
    tier = _PRIORITY_OF_TIER.get(service_tier or "", 0)
    if body.priority is not None and tier:
        raise InvalidRequest("give either priority or service_tier", field="priority")
    return tier if body.priority is None else -body.priority


def check_stream_options(body: GenerationFields) -> None:
    """Raise InvalidRequest for options of a stream without a stream."""
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options needs stream: true", field="stream_options")


def choice_id(request_id: str, choice: int, number: int) -> str:
    """Id of one choice's request: the call's own, where it has one choice alone."""
    if number == 1:
        return request_id
    suffix = f"-{choice}"
    return request_id[: MAX_REQUEST_ID_LENGTH - len(suffix)] + suffix


def _biases(named: dict[str, float]) -> dict[int, float]:
    biases: dict[int, float] = {}
    for key, bias in named.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 10):
            raise InvalidRequest("logit_bias is keyed by token numbers", field="logit_bias")
        biases[int(key)] = bias
    return biases
