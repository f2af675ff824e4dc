"""From a request's bytes to a checked model: bounded, and with errors that name the parameter.

This module knows nothing of what the models mean.
"""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any, ClassVar, NoReturn, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from starlette.requests import ClientDisconnect, Request

from specinfer.errors import Cancelled, InvalidRequest
from specinfer_router.gateway.errors import (
    BodyTooLarge,
    UnknownParameter,
    UnsupportedParameter,
    UnsupportedValue,
)

MAX_BODY_BYTES = 2**23
# Smaller bodies are read in less time than a thread takes to start.
OFF_LOOP_BYTES = 2**14
MAX_PARAMETER_LENGTH = 200
# Lists and objects within each other, the body itself counted.
MAX_DEPTH = 64
_UNSUPPORTED_PARAMETER = "unsupported_parameter"
_UNSUPPORTED_VALUE = "unsupported_value"


def _null_for_others(schema: dict[str, Any]) -> None:
    schema["additionalProperties"] = {"type": "null"}


class Body(BaseModel):
    """A request's body: no coercion, no unknown fields but null ones, no NaN."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        frozen=True,
        json_schema_extra=_null_for_others,
    )

    # Names that clients know and that are not served, with what to do instead.
    unsupported: ClassVar[dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        """Clients send null for what they leave out, fields that others invented included."""
        if not isinstance(data, dict) or None not in data.values():
            return data
        known = {field.alias or name for name, field in cls.model_fields.items()}
        return {name: value for name, value in data.items() if value is not None or name in known}


def unserved(*values: str | bool, advice: str, key: str = "") -> BeforeValidator:
    """Refuse values of OpenAI's that are not served, as what they are.

    Args:
        values: the values; none of them refuses every value but null.
        advice: why not, or what to do instead.
        key: where in an object the value stands; "" means that it stands by itself.
    """

    def check(value: Any) -> Any:
        told = value.get(key) if key and isinstance(value, dict) else value
        if not values and told is not None:
            raise PydanticCustomError(_UNSUPPORTED_PARAMETER, "{advice}", {"advice": advice})
        if isinstance(told, str | bool) and any(told == other for other in values):
            context = {"value": json.dumps(told), "advice": advice}
            raise PydanticCustomError(
                _UNSUPPORTED_VALUE, "{value} is not supported: {advice}", context
            )
        return value

    return BeforeValidator(check)


_Body = TypeVar("_Body", bound=Body)


async def parse_body(
    request: Request, model: type[_Body], *, max_bytes: int = MAX_BODY_BYTES
) -> _Body:
    """The body of a request, checked.

    Raises:
        BodyTooLarge: it has more than `max_bytes` bytes; the rest is not read.
        UnknownParameter: it has a field that `model` does not know.
        UnsupportedParameter: it has a field that is known and not served.
        UnsupportedValue: a field has a value that is known and not served.
        InvalidRequest: it is no JSON, or a parameter has a wrong value.
        Cancelled: the caller left while sending it.
    """
    content = await _read(request, max_bytes)
    if len(content) <= OFF_LOOP_BYTES:
        return validate(content, model)
    return await asyncio.to_thread(validate, content, model)


def validate(content: bytes, model: type[_Body]) -> _Body:
    """A model from JSON; raises InvalidRequest."""
    try:
        text = content.decode("utf-8-sig")
        data = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the body is no JSON that is served here: {error}") from error
    if not isinstance(data, dict):
        raise InvalidRequest("the body is a JSON object")
    _check_depth(data)
    if "\\u" in text:
        _check_unicode(data)
    for name, advice in model.unsupported.items():
        # Clients send null for what they leave out.
        if data.pop(name, None) is not None:
            raise UnsupportedParameter(f"{name} is not supported: {advice}", field=name)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _explained(error, data) from error


async def _read(request: Request, max_bytes: int) -> bytes:
    pieces = bytearray()
    try:
        async for piece in request.stream():
            pieces += piece
            if len(pieces) > max_bytes:
                raise BodyTooLarge(f"a body has at most {max_bytes} bytes")
    except ClientDisconnect as error:
        raise Cancelled("the caller left while sending the body") from error
    return bytes(pieces)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _finite(digits: str) -> float:
    """JSON writes numbers that no float holds; what comes of them could not be sent on."""
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits[:32]} is too large a number")
    return number


def _check_depth(data: dict[str, Any]) -> None:
    """Raise InvalidRequest for what nests so deep that work on it would run out of stack."""
    level: list[Any] = [data]
    for _ in range(MAX_DEPTH):
        children = (item.values() if isinstance(item, dict) else item for item in level)
        level = [item for items in children for item in items if isinstance(item, dict | list)]
        if not level:
            return
    raise InvalidRequest(f"the body nests more than {MAX_DEPTH} levels deep")


def _check_unicode(data: dict[str, Any]) -> None:
    """JSON's escapes can write half a surrogate pair, which no UTF-8 and no tokenizer takes."""
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest("the body holds half of a surrogate pair") from error


def _explained(error: ValidationError, data: Any) -> InvalidRequest:
    """The complaint that reaches deepest into the body; a union complains once for each member.

    Of those that reach as deep, one that knows what was meant says more.
    """
    complaints = error.errors(include_url=False, include_context=False, include_input=False)
    known = (_UNSUPPORTED_PARAMETER, _UNSUPPORTED_VALUE)
    complaint = max(
        complaints,
        key=lambda item: (len(_steps(item["loc"], item["type"], data)), item["type"] in known),
    )
    steps = _steps(complaint["loc"], complaint["type"], data)
    parameter = _parameter(steps)
    if complaint["type"] == "extra_forbidden":
        return UnknownParameter(f"unknown parameter: {parameter!r}", field=parameter)
    if complaint["type"] == "missing":
        return InvalidRequest(f"missing required parameter: {parameter!r}", field=parameter)
    reason = complaint["msg"].removeprefix("Value error, ")
    if complaint["type"] == _UNSUPPORTED_PARAMETER:
        return UnsupportedParameter(f"{parameter} is not supported: {reason}", field=parameter)
    if complaint["type"] == _UNSUPPORTED_VALUE:
        return UnsupportedValue(f"invalid value for {parameter!r}: {reason}", field=parameter)
    return InvalidRequest(f"invalid value for {parameter!r}: {reason}", field=parameter)


def _steps(location: tuple[int | str, ...], kind: str, data: Any) -> list[int | str]:
    """The part of a complaint's location that exists in the body: unions add names of their own."""
    steps: list[int | str] = []
    for step in location:
        if _holds(data, step):
            data = data[step]
            steps.append(step)
    if kind == "missing":
        steps.append(location[-1])
    return steps


def _holds(data: Any, step: int | str) -> bool:
    if isinstance(data, list):
        return isinstance(step, int) and 0 <= step < len(data)
    return isinstance(data, dict) and step in data


def _parameter(steps: list[int | str]) -> str:
    """OpenAI's notation, such as messages[0].content."""
    name = ""
    for step in steps:
        name += f"[{step}]" if isinstance(step, int) else f".{step}" if name else step
    # A caller's own key may be as long as it likes, and go into a header or a log.
    return name[:MAX_PARAMETER_LENGTH]
