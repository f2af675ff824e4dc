"""How large a grammar may be and what form its text has, checked before anything is compiled.

This module knows nothing of tokens, and of JSON schemas only that they are JSON objects.
"""

from __future__ import annotations

import json
from typing import Any

from specinfer.errors import InvalidRequest
from specinfer.messages import Grammar

MAX_SCHEMA_BYTES = 64 * 1024
# Where a long text is forced, every mask tokenises what is left of it.
MAX_PATTERN_BYTES = 16 * 1024
MAX_JSON_DEPTH = 64
MAX_CHOICES = 1024
MAX_MESSAGE_CHARACTERS = 400


def check_grammar(grammar: Grammar) -> None:
    """Raise InvalidRequest unless a grammar is within the bounds on its size and form."""
    size = len(grammar.text.encode(errors="surrogatepass"))
    limit = MAX_SCHEMA_BYTES if grammar.kind == "json_schema" else MAX_PATTERN_BYTES
    if size > limit:
        raise refusal(f"{size} bytes are more than {limit}")
    if grammar.kind == "json_object":
        if grammar.text:
            raise refusal("any JSON object has no text of its own")
    elif not grammar.text:
        raise refusal(f"a grammar of kind {grammar.kind} needs a text")
    elif grammar.kind == "json_schema":
        _check_schema(_read_json(grammar.text))
    elif grammar.kind == "choice":
        _check_choices(_read_json(grammar.text))


def _read_json(text: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise refusal(f"it is not JSON: {error}") from error
    level: list[Any] = [value]
    for _ in range(MAX_JSON_DEPTH + 1):
        level = [child for item in level for child in _children(item)]
        if not level:
            return value
    raise refusal(f"it is nested more than {MAX_JSON_DEPTH} levels deep")


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, list) else []


def _check_schema(schema: Any) -> None:
    if not isinstance(schema, dict):
        raise refusal("a JSON schema is a JSON object")
    if "x-guidance" in schema:
        raise refusal("x-guidance is not for requests to set")


def _check_choices(choices: Any) -> None:
    if not isinstance(choices, list) or not 1 <= len(choices) <= MAX_CHOICES:
        raise refusal(f"choices are a JSON list of 1 to {MAX_CHOICES} strings")
    if not all(isinstance(text, str) and text for text in choices):
        raise refusal("every choice is a string that is not empty")


def refusal(reason: str) -> InvalidRequest:
    return InvalidRequest(f"this grammar cannot be used: {shorten(reason)}", field="grammar")


def shorten(message: str) -> str:
    """One line of bounded length."""
    line = " ".join(message.replace("<non-verbose/>", "").split())
    return line[:MAX_MESSAGE_CHARACTERS]
