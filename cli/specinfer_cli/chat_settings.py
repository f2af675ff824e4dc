"""What `/set` and `/settings` of a chat know: names of options, and how their values read.

This module knows nothing of conversations or terminals.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

from specinfer.errors import InvalidRequest
from specinfer.options import GenerateOptions, build_request
from specinfer_cli.conversation import speculation_of

NUMBERS: dict[str, type[int] | type[float]] = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "max_tokens": int,
    "seed": int,
}
SHAPE = ("max_nodes", "max_depth")
UNSET = ("none", "default")


def changed(options: GenerateOptions, name: str, text: str) -> GenerateOptions:
    """The options with one of them changed; "none" takes it back to the default.

    Raises:
        InvalidRequest: naming the option when there is no such option, or when the value is no
            number or out of its range.
    """
    result: dict[str, Any] = dict(options)
    if name in SHAPE:
        shape: dict[str, Any] = {name: _number(name, text, int)}
        result["speculation"] = dataclasses.replace(speculation_of(options), **shape)
    elif name in NUMBERS:
        result[name] = _number(name, text, NUMBERS[name])
    else:
        names = ", ".join((*NUMBERS, *SHAPE))
        raise InvalidRequest(f"there is no setting {name!r}; the settings are {names}", field=name)
    kept = cast(GenerateOptions, {key: value for key, value in result.items() if value is not None})
    # The SDK judges the whole, as it will when the next question is asked.
    build_request("x", kept)
    return kept


def lines(options: GenerateOptions, system: str | None) -> list[str]:
    """Every setting that has a value, one a line."""
    values: dict[str, Any] = {name: options.get(name) for name in NUMBERS}
    chosen = speculation_of(options)
    values |= {name: getattr(chosen, name) for name in SHAPE}
    told = [f"{name:<20}{_say(value)}" for name, value in values.items()]
    return [*told, f"{'speculation':<20}{'on' if chosen.enabled else 'off'}", _system(system)]


def _number(name: str, text: str, kind: type[int] | type[float]) -> int | float | None:
    if text in UNSET:
        return None
    try:
        return kind(text)
    except ValueError as error:
        what = "a whole number" if kind is int else "a number"
        raise InvalidRequest(f"{name} is {what} or none, got {text!r}", field=name) from error


def _say(value: float | None) -> str:
    return "default" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _system(system: str | None) -> str:
    return f"{'system':<20}{system if system is not None else 'none'}"
