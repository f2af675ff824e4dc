"""What a user may ask of `generate` and `stream`, checked before any network is used.

Only what can be judged without a model is judged here; the router checks the rest (lengths,
vocabulary, served names). This module knows nothing of channels or the wire.
"""

from __future__ import annotations

import dataclasses
import math
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

from specinfer.errors import InvalidRequest
from specinfer.messages import ChatMessage, GenerateRequest, SpeculationOptions
from specinfer.sampling import MAX_LOGPROBS, SamplingParams, StopConditions
from specinfer.tree import MAX_TREE_NODES

MAX_REQUEST_ID_LENGTH = 128
MAX_TOKEN_ID = 2**31 - 1
_SAMPLING = frozenset(item.name for item in dataclasses.fields(SamplingParams))
_STOP = frozenset(item.name for item in dataclasses.fields(StopConditions))


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of `generate` and `stream`; each may be left out, most may be None.

    The input is the positional `prompt`, `messages` or `token_ids`: exactly one of them.
    """

    messages: Sequence[ChatMessage | Mapping[str, str]]
    """A conversation; the router makes a prompt of it with the model's chat template."""
    token_ids: Sequence[int]
    """Tokens to continue."""
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
    """How to speculate; False decodes one token a round. It changes no token."""
    detail: bool
    """Send each round's tree with its texts along."""
    timeout: float | None
    """Seconds for the whole call with its retries; left out it is the client's timeout."""
    request_id: str
    """Your id for logs and errors; left out one is made."""


_NAMES = GenerateOptions.__optional_keys__


def build_request(prompt: str | None, options: GenerateOptions) -> GenerateRequest:
    """The request for a prompt and its options.

    Raises:
        InvalidRequest: naming the option that is at fault.
        TypeError: for an option that does not exist.
    """
    given: dict[str, Any] = dict(options)
    unknown = sorted(given.keys() - _NAMES)
    if unknown:
        raise TypeError(
            f"unknown option {unknown[0]!r}; the options are {', '.join(sorted(_NAMES))}"
        )
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
        detail=_detail(given.get("detail")),
    )


def check_timeout(timeout: float | None) -> float | None:
    """The timeout itself; raises InvalidRequest unless it is None or a positive number."""
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0:
        raise InvalidRequest(
            f"timeout is a positive number of seconds, got {timeout!r}", field="timeout"
        )
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
    text = _text("request_id", value)
    if len(text) > MAX_REQUEST_ID_LENGTH or not (text.isascii() and text.isprintable()):
        raise InvalidRequest(
            f"request_id has at most {MAX_REQUEST_ID_LENGTH} printable ASCII characters",
            field="request_id",
        )
    return text


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
        if value.keys() != {"role", "content"}:
            raise InvalidRequest("a message has a role and a content", field="messages")
        value = ChatMessage(value["role"], value["content"])
    if not isinstance(value, ChatMessage):
        raise InvalidRequest(
            f"a message is a ChatMessage or a mapping, got {type(value).__name__}", field="messages"
        )
    if not _text("messages", value.role):
        raise InvalidRequest("a message needs a role, such as 'user'", field="messages")
    _text("messages", value.content)
    return value


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
    if not isinstance(chosen.get("ignore_eos", False), bool):
        raise InvalidRequest("ignore_eos is true or false", field="ignore_eos")
    return StopConditions(**chosen)


def _detail(value: object) -> bool:
    if value is not None and not isinstance(value, bool):
        raise InvalidRequest("detail is true or false", field="detail")
    return value is True


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
