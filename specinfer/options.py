"""What a user may ask of `generate` and `stream`, checked before any network is used.

Only what can be judged without a model is judged here; the router checks the rest (lengths,
vocabulary, served names). This module knows nothing of channels or the wire.
"""

from __future__ import annotations

import dataclasses
import json
import math
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

from specinfer.errors import InvalidRequest
from specinfer.messages import (
    ChatMessage,
    GenerateRequest,
    Grammar,
    ResumeRequest,
    SpeculationOptions,
    ToolCall,
)
from specinfer.sampling import MAX_LOGPROBS, SamplingParams, StopConditions
from specinfer.tree import MAX_TREE_NODES

MAX_REQUEST_ID_LENGTH = 128
MAX_TOKEN_ID = 2**31 - 1
MAX_PRIORITY = 100
_SAMPLING = frozenset(item.name for item in dataclasses.fields(SamplingParams))
_STOP = frozenset(item.name for item in dataclasses.fields(StopConditions))


class ChatOptions(TypedDict, total=False):
    """Keyword arguments of `chat`; each may be left out, most may be None."""

    model: str
    """Served name; left out it is the cluster's model."""
    max_tokens: int | None
    """Most tokens to generate; None fills the model's length."""
    temperature: float
    """0 takes the most probable token; the default is 1."""
    top_k: int
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float
    """Keep the smallest set of tokens whose mass reaches top_p."""
    min_p: float
    """Drop tokens less probable than min_p times the most probable one."""
    repetition_penalty: float
    """Divides positive and multiplies negative logits of tokens seen; 1 is off."""
    presence_penalty: float
    """Subtracted once from logits of tokens seen in the output."""
    frequency_penalty: float
    """Subtracted for each time a token was seen in the output."""
    logit_bias: Mapping[int, float]
    """Added to the logits of the named tokens."""
    seed: int | None
    """Decides all noise; None lets the router choose, and the completion tells which it was."""
    stop: str | Sequence[str]
    """Strings that end the text; they are not part of it."""
    stop_token_ids: Sequence[int]
    """Tokens that end the text beside the model's own end tokens."""
    ignore_eos: bool
    """Go on after the model's end token."""
    logprobs: int | None
    """Most probable tokens to report with each token; None reports no logprobs."""
    speculation: SpeculationOptions | bool
    """How to speculate; False decodes plainly. It changes no token."""
    tools: Sequence[Mapping[str, Any] | str]
    """Tools that the chat template tells the model of: one JSON object each."""
    grammar: Grammar | None
    """What the completion has to match; or one of the four that follow."""
    json_schema: Mapping[str, Any] | str | None
    """The completion is JSON that this schema allows."""
    json_object: bool
    """The completion is any JSON object."""
    regex: str | None
    """The completion as a whole matches this regular expression."""
    choice: Sequence[str] | None
    """The completion is one of these texts."""
    prediction: str
    """Text that the completion is expected to be like; it is guessed from and changes no token."""
    affinity_key: str
    """Requests with the same key go to the same worker, and find its prefix cache warm."""
    priority: int
    """Among requests that wait, higher ones start first; the default is 0."""
    detail: bool
    """Send each round's tree with its texts along."""
    timeout: float | None
    """Seconds for the whole call with its retries; left out it is the client's."""
    attempt_timeout: float | None
    """Longest silence of one attempt in seconds; left out it is the client's."""
    request_id: str
    """Your id for logs and errors; left out one is made."""


class GenerateOptions(ChatOptions, total=False):
    """Keyword arguments of `generate` and `stream`: those of `chat`, and the input.

    The input is the positional `prompt`, `messages` or `token_ids`: exactly one of them.
    """

    messages: Sequence[ChatMessage | Mapping[str, Any]]
    """A conversation; the router makes a prompt of it with the model's chat template."""
    token_ids: Sequence[int]
    """Tokens to continue."""


class ResumeOptions(TypedDict, total=False):
    """Keyword arguments of `resume`; each may be left out."""

    timeout: float | None
    """Seconds for the whole call with its retries; left out it is the client's."""
    attempt_timeout: float | None
    """Longest silence of one attempt in seconds; left out it is the client's."""
    request_id: str
    """Your id for logs and errors; left out it is that of the request."""


_NAMES = GenerateOptions.__optional_keys__
_RESUME_NAMES = ResumeOptions.__optional_keys__
_MESSAGE_NAMES = frozenset(item.name for item in dataclasses.fields(ChatMessage))
_GRAMMARS = ("grammar", "json_schema", "json_object", "regex", "choice")


def build_request(prompt: str | None, options: GenerateOptions) -> GenerateRequest:
    """The request for a prompt and its options.

    Raises:
        InvalidRequest: naming the option that is at fault.
        TypeError: for an option that does not exist.
    """
    given: dict[str, Any] = dict(options)
    _check_names(given, _NAMES)
    token_ids, messages = given.get("token_ids"), given.get("messages")
    if sum(value is not None for value in (prompt, token_ids, messages)) != 1:
        raise InvalidRequest("give exactly one of prompt, messages and token_ids", field="prompt")
    return GenerateRequest(
        prompt=None if prompt is None else _prompt(prompt),
        token_ids=None if token_ids is None else _token_ids("token_ids", token_ids),
        messages=None if messages is None else _messages(messages),
        model=_text("model", given.get("model") or ""),
        sampling=_sampling(given),
        random_seed=given.get("seed") is None,
        stop=_stop(given),
        num_logprobs=_num_logprobs(given.get("logprobs")),
        speculation=_speculation(given.get("speculation", True)),
        request_id=_request_id(given.get("request_id")),
        tools=_tools(given.get("tools") or (), messages),
        grammar=_grammar(given),
        prediction=_text("prediction", given.get("prediction") or ""),
        affinity_key=_short("affinity_key", given.get("affinity_key") or ""),
        priority=_priority(given.get("priority") or 0),
        detail=_flag("detail", given.get("detail")),
    )


def build_resume(session_id: str, offset: int, options: ResumeOptions) -> ResumeRequest:
    """The request for the rest of a stream; raises as `build_request` does."""
    _check_names(options, _RESUME_NAMES)
    if isinstance(offset, bool) or not isinstance(offset, int) or not 0 <= offset <= MAX_TOKEN_ID:
        raise InvalidRequest(f"offset is a number of tokens, got {offset!r}", field="offset")
    request_id = options.get("request_id") or ""
    return ResumeRequest(
        check_id("session_id", session_id), offset, _request_id(request_id) if request_id else ""
    )


def check_id(name: str, value: str) -> str:
    """The id itself; raises InvalidRequest unless it is a short, printable string."""
    if not value:
        raise InvalidRequest(f"{name} is empty", field=name)
    return _short(name, value)


def check_timeout(timeout: float | None, name: str = "timeout") -> float | None:
    """The timeout itself; raises InvalidRequest unless it is None or a positive number."""
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0:
        raise InvalidRequest(f"{name} is a positive number of seconds, got {timeout!r}", field=name)
    return None if math.isinf(timeout) else float(timeout)


def _prompt(prompt: object) -> str:
    text = _text("prompt", prompt)
    if not text:
        raise InvalidRequest("the prompt is empty", field="prompt")
    return text


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(f"{name} is a string, got {type(value).__name__}", field=name)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{name} cannot be written as UTF-8: {error}", field=name) from error
    return value


def _request_id(value: object) -> str:
    if value is None or value == "":
        return uuid.uuid4().hex
    return _short("request_id", value)


def _short(name: str, value: object) -> str:
    text = _text(name, value)
    if len(text) > MAX_REQUEST_ID_LENGTH or not (text.isascii() and text.isprintable()):
        raise InvalidRequest(
            f"{name} has at most {MAX_REQUEST_ID_LENGTH} printable ASCII characters", field=name
        )
    return text


def _check_names(given: Mapping[str, Any], names: frozenset[str]) -> None:
    unknown = sorted(given.keys() - names)
    if unknown:
        raise TypeError(
            f"unknown option {unknown[0]!r}; the options are {', '.join(sorted(names))}"
        )


def _sequence(name: str, values: object) -> Sequence[Any]:
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise InvalidRequest(f"{name} is a sequence, got {type(values).__name__}", field=name)
    return tuple(values)


def _token_ids(name: str, values: object) -> tuple[int, ...]:
    token_ids = _sequence(name, values)
    if not token_ids:
        raise InvalidRequest(f"{name} is empty", field=name)
    for token_id in token_ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise InvalidRequest(f"{name} are whole numbers, got {token_id!r}", field=name)
        if not 0 <= token_id <= MAX_TOKEN_ID:
            raise InvalidRequest(f"{name} are between 0 and {MAX_TOKEN_ID}", field=name)
    return tuple(token_ids)


def _messages(values: object) -> tuple[ChatMessage, ...]:
    messages = tuple(_message(value) for value in _sequence("messages", values))
    if not messages:
        raise InvalidRequest("messages is empty", field="messages")
    return messages


def _message(value: object) -> ChatMessage:
    if isinstance(value, Mapping):
        if not {"role", "content"} <= value.keys() <= _MESSAGE_NAMES:
            raise InvalidRequest(
                "a message has a role and a content, and may have name, tool_call_id and "
                f"tool_calls; got {', '.join(sorted(map(str, value)))}",
                field="messages",
            )
        calls = _sequence("messages", value.get("tool_calls", ()))
        value = ChatMessage(**{**value, "tool_calls": tuple(_tool_call(call) for call in calls)})
    if not isinstance(value, ChatMessage):
        raise InvalidRequest(
            f"a message is a ChatMessage or a mapping, got {type(value).__name__}", field="messages"
        )
    if not _text("messages", value.role):
        raise InvalidRequest("a message needs a role, such as 'user'", field="messages")
    for text in (value.content, value.name, value.tool_call_id):
        _text("messages", text)
    for call in value.tool_calls:
        _tool_call(call)
    return value


def _tool_call(value: object) -> ToolCall:
    if isinstance(value, Mapping) and value.keys() == {"id", "name", "arguments"}:
        value = ToolCall(**value)
    if not isinstance(value, ToolCall):
        raise InvalidRequest("a tool call has an id, a name and arguments", field="messages")
    for text in (value.id, value.name, value.arguments):
        _text("messages", text)
    return value


def _tools(values: object, messages: object) -> tuple[str, ...]:
    tools = tuple(_json_text("tools", value, Mapping) for value in _sequence("tools", values))
    if tools and messages is None:
        raise InvalidRequest("tools go with messages, not with a prompt", field="tools")
    return tools


def _json_text(name: str, value: object, kinds: type | tuple[type, ...]) -> str:
    """JSON of a value, or of a text that holds one, which has to be of one of `kinds`."""
    try:
        parsed = json.loads(_text(name, value)) if isinstance(value, str) else value
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{name} cannot be read as JSON: {error}", field=name) from error
    if not isinstance(parsed, kinds):
        raise InvalidRequest(f"{name} is a JSON object, got {type(parsed).__name__}", field=name)
    return _text(name, text)


def _grammar(given: Mapping[str, Any]) -> Grammar | None:
    named = [name for name in _GRAMMARS if given.get(name) not in (None, False)]
    if not named:
        return None
    if len(named) > 1:
        raise InvalidRequest(f"give one of {' and '.join(named)}", field=named[1])
    (name,) = named
    value = given[name]
    if name == "json_schema":
        return Grammar(name, _json_text(name, value, Mapping))
    if name == "json_object":
        _flag(name, value)
        return Grammar(name)
    if name == "regex":
        if not _text(name, value):
            raise InvalidRequest("regex is empty", field=name)
        return Grammar(name, value)
    if name == "choice":
        return Grammar(name, json.dumps(_choices(value), ensure_ascii=False))
    if not isinstance(value, Grammar):
        raise InvalidRequest(f"grammar is a Grammar, got {type(value).__name__}", field=name)
    _text(name, value.text)
    return value


def _choices(values: object) -> list[str]:
    choices = [_text("choice", value) for value in _sequence("choice", values)]
    if not choices or not all(choices):
        raise InvalidRequest("choice holds at least one text, and none is empty", field="choice")
    return choices


def _priority(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > MAX_PRIORITY:
        raise InvalidRequest(
            f"priority is a whole number from {-MAX_PRIORITY} to {MAX_PRIORITY}, got {value!r}",
            field="priority",
        )
    return value


def _flag(name: str, value: object) -> bool:
    if value is not None and not isinstance(value, bool):
        raise InvalidRequest(f"{name} is true or false", field=name)
    return bool(value)


def _sampling(given: Mapping[str, Any]) -> SamplingParams:
    chosen = {name: given[name] for name in _SAMPLING if given.get(name) is not None}
    if not isinstance(chosen.get("logit_bias", {}), Mapping):
        raise InvalidRequest("logit_bias maps token ids to numbers", field="logit_bias")
    return SamplingParams(**chosen)


def _stop(given: Mapping[str, Any]) -> StopConditions:
    chosen = {name: given[name] for name in _STOP if given.get(name) is not None}
    if "stop" in chosen:
        stop = (chosen["stop"],) if isinstance(chosen["stop"], str) else chosen["stop"]
        chosen["stop"] = tuple(_text("stop", text) for text in _sequence("stop", stop))
    if "stop_token_ids" in chosen:
        chosen["stop_token_ids"] = tuple(_sequence("stop_token_ids", chosen["stop_token_ids"]))
    _flag("ignore_eos", chosen.get("ignore_eos"))
    return StopConditions(**chosen)


def _num_logprobs(value: object) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_LOGPROBS:
        raise InvalidRequest(
            f"logprobs is a whole number from 0 to {MAX_LOGPROBS}, got {value!r}", field="logprobs"
        )
    return value


def _speculation(value: object) -> SpeculationOptions:
    if value is None or isinstance(value, bool):
        return SpeculationOptions(enabled=value is not False)
    if not isinstance(value, SpeculationOptions):
        raise InvalidRequest(
            "speculation is SpeculationOptions, True or False", field="speculation"
        )
    limits = (("max_nodes", value.max_nodes, 0), ("max_depth", value.max_depth, 0))
    for name, limit, low in (*limits, *(("widths", width, 1) for width in value.widths)):
        if limit is not None and not (isinstance(limit, int) and low <= limit < MAX_TREE_NODES):
            raise InvalidRequest(
                f"speculation.{name} is between {low} and {MAX_TREE_NODES - 1}, got {limit!r}",
                field=f"speculation.{name}",
            )
    return value
