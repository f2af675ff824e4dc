"""How commands speak: results on stdout, everything about them on stderr, errors in one line.

This module knows nothing of clusters or requests.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from specinfer.errors import (
    Cancelled,
    InvalidCheckpoint,
    InvalidRequest,
    SpecinferError,
    Unavailable,
)

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_EXTRA_OF = {
    "grpc_health": "serve",
    "grpc_reflection": "serve",
    "jinja2": "router",
    "prometheus_client": "router",
    "redis": "router",
    "starlette": "router",
    "tokenizers": "router",
    "uvicorn": "router",
    "numpy": "model",
    "safetensors": "model",
    "torch": "model",
    "transformers": "model",
}


def output() -> Console:
    """Where results go."""
    return Console(highlight=False)


def messages() -> Console:
    """Where progress, statistics and errors go."""
    return Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """Write one JSON document and a line end to stdout, free of colour and wrapping."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def indented_json(value: Any) -> str:
    """A JSON document for a file that people read too, with its last line end."""
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"


def write(text: str) -> None:
    """Write text to stdout as it is, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def visible(text: str) -> str:
    """The text with control characters made visible: nobody else's words steer a terminal."""
    return "".join(_picture(char) for char in text)


def _picture(char: str) -> str:
    code = ord(char)
    if char in "\n\t":
        return char
    if code < 32:
        return chr(0x2400 + code)
    return "\ufffd" if 127 <= code < 160 else char


def plain(text: str, style: str = "") -> Text:
    """A cell of a table that shows somebody else's words: no markup, no control characters."""
    return Text(visible(text).replace("\n", " "), style=style)


def fail(text: str, *, status: int = 1) -> typer.Exit:
    """Print an error; the caller raises what this returns."""
    console = messages()
    console.print("[bold red]error:[/]", end=" ")
    console.print(text, markup=False, soft_wrap=True)
    return typer.Exit(status)


def friendly(command: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Turn our errors into one line and a status: 2 for the user's, 1 for all others."""

    @functools.wraps(command)
    def wrapped(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        try:
            return command(*args, **kwargs)
        except SpecinferError as error:
            raise fail(_explain(error), status=_status(error)) from error
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except BrokenPipeError:
            # The reader left (`| head`); Python would complain once more when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None

    return wrapped


def import_extra(module: str) -> ModuleType:
    """Import a part of specinfer; raises InvalidRequest naming the extra that is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        extra = _EXTRA_OF.get(missing)
        if extra is None:
            raise
        raise InvalidRequest(
            f"this needs {missing}, which is not installed: pip install 'specinfer[{extra}]'"
        ) from error


def _status(error: SpecinferError) -> int:
    return 2 if isinstance(error, InvalidRequest | InvalidCheckpoint) else 1


def _explain(error: SpecinferError) -> str:
    text = error.message
    # An error with a request's id comes from a cluster that runs.
    if isinstance(error, Unavailable) and not error.request_id:
        text += "\nIs a cluster running? `specinfer up` starts one; --router says where it is."
    elif isinstance(error, Cancelled):
        text += "\nThe cluster ended the call."
    if error.request_id:
        text += f"\nrequest id: {error.request_id}"
    return text
