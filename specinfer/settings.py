"""Settings of a process: a frozen dataclass, filled once from flags and environment.

A field `max_sessions` of a service with prefix `SPECINFER_VERIFY` is the flag `--max-sessions` and
the variable `SPECINFER_VERIFY_MAX_SESSIONS`; the flag wins. Nothing else reads the environment.
This module knows nothing of what the settings mean.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from specinfer.errors import InvalidRequest

_Settings = TypeVar("_Settings")
_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off", ""})


def setting(default: Any, help_text: str) -> Any:
    """A dataclass field with its default and the text of `--help`."""
    return dataclasses.field(default=default, metadata={"help": help_text})


def required_setting(help_text: str) -> Any:
    """A dataclass field that has to be given."""
    return dataclasses.field(metadata={"help": help_text})


def read_settings(
    kind: type[_Settings],
    *,
    program: str,
    description: str,
    prefix: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
) -> _Settings:
    """Fill a frozen dataclass of str, int, float, bool, Path, X | None and tuple[X, ...] fields.

    A tuple is a flag that may be repeated, and a comma-separated variable.

    Raises:
        InvalidRequest: when a variable cannot be read as its field's type, or the dataclass itself
            refuses the values. Bad flags end the process with argparse's message and status 2.
    """
    parser = argparse.ArgumentParser(prog=program, description=description)
    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):  # type: ignore[arg-type]
        variable = f"{prefix}_{item.name.upper()}"
        _add_flag(parser, item, hints[item.name], variable, environment.get(variable))
    given = vars(parser.parse_args(arguments))
    return kind(**{name: _frozen(value) for name, value in given.items()})


def _add_flag(
    parser: argparse.ArgumentParser,
    item: dataclasses.Field[Any],
    hint: Any,
    variable: str,
    from_environment: str | None,
) -> None:
    base, repeated = _base_type(hint)
    required = item.default is dataclasses.MISSING and from_environment is None
    default = None if item.default is dataclasses.MISSING else item.default
    if from_environment is not None:
        default = _from_environment(variable, from_environment, base, repeated)
    text = f"{item.metadata.get('help', '')} [{variable}]".replace("%", "%%")
    options: dict[str, Any] = {"default": default, "help": text, "dest": item.name}
    if base is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        read = finite_number if base is float else base
        options |= {"type": read, "required": required, "metavar": base.__name__.upper()}
        if repeated:
            options["action"] = _Collect
    parser.add_argument("--" + item.name.replace("_", "-"), **options)


class _Collect(argparse.Action):
    """Like `append`, but the first flag replaces the default instead of adding to it."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        seen = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*seen, values] if isinstance(seen, list) else [values])


def _base_type(hint: Any) -> tuple[Any, bool]:
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return arguments[0], True
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return next(item for item in arguments if item is not types.NoneType), False
    return hint, False


def _from_environment(variable: str, text: str, base: Any, repeated: bool) -> Any:
    if repeated:
        parts = [part.strip() for part in text.split(",") if part.strip()]
        return tuple(_parse(variable, part, base) for part in parts)
    return _parse(variable, text, base)


def _parse(variable: str, text: str, base: Any) -> Any:
    if base is bool:
        if text.lower() in _TRUE | _FALSE:
            return text.lower() in _TRUE
        raise InvalidRequest(f"{variable} is true or false, got {text!r}", field=variable)
    if base is Path:
        return Path(text)
    try:
        return finite_number(text) if base is float else base(text)
    except ValueError as error:
        raise InvalidRequest(
            f"{variable} is not a {base.__name__}: {text!r}", field=variable
        ) from error


def finite_number(text: str) -> float:
    """A float that can be calculated with; raises ValueError for NaN and the infinities."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
