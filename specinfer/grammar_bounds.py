"""How large a grammar may be and what form its text has, checked before anything is compiled.

What counts is what a grammar costs where it is used: a pattern's derivatives grow with the square
of its length, and where one text is left, every mask tokenises the rest of it. This module knows
nothing of tokens, and of schemas only the few words whose values cost something.
"""

from __future__ import annotations

import json
import math
import re
from decimal import Decimal
from functools import cache
from typing import Any

from specinfer.errors import InvalidRequest
from specinfer.messages import Grammar

MAX_SCHEMA_BYTES = 64 * 1024
MAX_CHOICES_BYTES = 16 * 1024
MAX_LARK_BYTES = 16 * 1024
# Of a regular expression, of one in a schema, and of a definition in Lark with those it names.
MAX_PATTERN_BYTES = 2 * 1024
# The least text that matches a pattern, all its counts written out.
MAX_FORCED_CHARACTERS = 16 * 1024
# A name or a value in a schema.
MAX_TEXT_CHARACTERS = 4 * 1024
MAX_PROPERTIES = 1000
MAX_PATTERN_PROPERTIES = 64
# Numbers that may be multiples of any of several have as many states as all those have together:
# the least common multiple of all in a schema.
MAX_MULTIPLES = 10_000
MAX_JSON_DEPTH = 64
MAX_CHOICES = 1024
MAX_MESSAGE_CHARACTERS = 400

_MAX_BYTES = {
    "json_schema": MAX_SCHEMA_BYTES,
    "choice": MAX_CHOICES_BYTES,
    "lark": MAX_LARK_BYTES,
}
_NOTES = ("title", "description", "$comment")
_DEFINITION = re.compile(r"^[ \t]*[?!]?([A-Za-z_]\w*)[^:\n]*:", re.MULTILINE)
_TERMINAL = re.compile(r"\b_?[A-Z][A-Z0-9_]*\b")
_PATTERN_PART = re.compile(
    r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{(?P<least>\d+)(?:,\d*)?\}[?+]?|.", re.DOTALL
)


def check_grammar(grammar: Grammar) -> None:
    """Raise InvalidRequest unless a grammar is within the bounds on its size and form."""
    size = len(grammar.text.encode(errors="surrogatepass"))
    limit = _MAX_BYTES.get(grammar.kind, MAX_PATTERN_BYTES)
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
    elif grammar.kind == "lark":
        _check_lark(grammar.text)
    else:
        _check_pattern(grammar.text)


def _read_json(text: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise refusal(f"it is not JSON: {error}") from error
    _check_depth(value)
    return value


def _check_depth(value: Any) -> None:
    level: list[Any] = [value]
    for _ in range(MAX_JSON_DEPTH + 1):
        level = [child for item in level for child in _children(item)]
        if not level:
            return
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
    _check_costs(schema)


def _check_costs(schema: Any) -> None:
    multiple = 1
    waiting: list[tuple[Any, bool]] = [(schema, False)]
    while waiting:
        value, literal = waiting.pop()
        if isinstance(value, str) and len(value) > MAX_TEXT_CHARACTERS:
            raise refusal(f"a text in it has more than {MAX_TEXT_CHARACTERS} characters")
        if isinstance(value, dict):
            multiple = math.lcm(multiple, _check_keywords(value))
            for name, child in value.items():
                if literal or name not in _NOTES or not isinstance(child, str):
                    waiting.append((child, literal or name in ("const", "enum")))
        elif isinstance(value, list):
            waiting += [(child, literal) for child in value]
        if multiple > MAX_MULTIPLES:
            raise refusal(
                f"the least common multiple of its multipleOf is more than {MAX_MULTIPLES}"
            )


def _check_keywords(part: dict[str, Any]) -> int:
    """Check one object of a schema; returns its multipleOf without a decimal point, or 1."""
    if len(part) > MAX_PROPERTIES:
        raise refusal(f"an object in it has more than {MAX_PROPERTIES} names")
    if any(len(name) > MAX_TEXT_CHARACTERS for name in part):
        raise refusal(f"a name in it has more than {MAX_TEXT_CHARACTERS} characters")
    patterns = part.get("patternProperties")
    if isinstance(patterns, dict):
        if len(patterns) > MAX_PATTERN_PROPERTIES:
            raise refusal(f"patternProperties has more than {MAX_PATTERN_PROPERTIES} patterns")
        for pattern in patterns:
            _check_pattern(pattern)
    if isinstance(part.get("pattern"), str):
        _check_pattern(part["pattern"])
    multiple = part.get("multipleOf")
    if isinstance(multiple, bool) or not isinstance(multiple, (int, float)):
        return 1
    return _num_states(multiple)


def _num_states(multiple: float) -> int:
    number = Decimal(str(multiple))
    if not number.is_finite() or number.adjusted() > 9:
        return MAX_MULTIPLES + 1
    digits, exponent = number.normalize().as_tuple()[1:]
    whole = int("".join(map(str, digits)))
    return max(int(whole * 10 ** max(int(exponent), 0)), 1)


def _check_pattern(pattern: str) -> None:
    if len(pattern.encode(errors="surrogatepass")) > MAX_PATTERN_BYTES:
        raise refusal(f"a pattern in it has more than {MAX_PATTERN_BYTES} bytes")
    if _least_length(pattern) > MAX_FORCED_CHARACTERS:
        raise refusal(f"a pattern in it asks for more than {MAX_FORCED_CHARACTERS} characters")


def _least_length(pattern: str) -> int:
    """About how long the shortest match is; no more than a few characters too short."""
    # For each open group: the shortest alternative so far, what this one has, and its last piece.
    groups: list[list[int]] = [[-1, 0, 0]]
    for part in _PATTERN_PART.finditer(pattern):
        piece, group = part.group(), groups[-1]
        if piece == "(":
            groups.append([-1, 0, 0])
        elif piece == ")" and len(groups) > 1:
            least = _shortest(groups.pop())
            groups[-1][1:] = [groups[-1][1] + least, least]
        elif piece == "|":
            group[:] = [_shortest(group), 0, 0]
        elif piece in "?*":
            group[1:] = [group[1] - group[2], 0]
        elif part["least"]:
            # Larger numbers say nothing more, and would cost something to multiply.
            grown = min(group[2] * min(int(part["least"][:9]), 2**30), 2**30)
            group[1:] = [group[1] - group[2] + grown, grown]
        elif piece not in "+^$":
            group[1:] = [group[1] + 1, 1]
    while len(groups) > 1:
        groups[-2][1] += _shortest(groups.pop())
    return _shortest(groups[0])


def _shortest(group: list[int]) -> int:
    return group[1] if group[0] < 0 else min(group[0], group[1])


def without_schemas(lark: str) -> str:
    """Lark without the JSON schemas in it, each of them checked; raises InvalidRequest."""
    pieces = lark.split("%json")
    for number, piece in enumerate(pieces[1:], start=1):
        text = piece.lstrip()
        try:
            schema, end = json.JSONDecoder().raw_decode(text)
        except (ValueError, RecursionError) as error:
            raise refusal("what follows %json is no JSON schema") from error
        _check_depth(schema)
        _check_costs(schema)
        pieces[number] = text[end:]
    return " ".join(pieces)


def least_repeats(lark: str) -> int:
    """At most so many times over does Lark's least match repeat what it is written with."""
    counts = (int(count[:9]) for count in re.findall(r"[{~]\s*(\d+)", lark))
    product = 1
    for count in counts:
        product = min(product * max(count, 1), 2**30)
    return product


def _check_lark(text: str) -> None:
    if "%llguidance" in text:
        raise refusal("%llguidance is not for requests to set")
    text = without_schemas(text)
    starts = [*_DEFINITION.finditer(text)]
    if not starts:
        raise refusal("it defines nothing; a Lark grammar has at least the rule start")
    ends = [start.start() for start in starts[1:]] + [len(text)]
    bodies: dict[str, str] = {}
    for start, end in zip(starts, ends, strict=True):
        bodies[start[1]] = bodies.get(start[1], "") + text[start.end() : end]
    open_names: set[str] = set()

    @cache
    def size(name: str) -> int:
        """Of a definition with all terminals written out; one that names itself is not our work."""
        if name in open_names or len(open_names) > MAX_JSON_DEPTH:
            return 0 if name in open_names else MAX_PATTERN_BYTES + 1
        open_names.add(name)
        body = bodies[name]
        named = sum(size(other) for other in _TERMINAL.findall(body) if other in bodies)
        open_names.discard(name)
        return min(len(body.encode(errors="surrogatepass")) + named, MAX_PATTERN_BYTES + 1)

    for name, body in bodies.items():
        own = len(body.encode(errors="surrogatepass"))
        if (size(name) if _TERMINAL.fullmatch(name) else own) > MAX_PATTERN_BYTES:
            raise refusal(f"written out, {name} has more than {MAX_PATTERN_BYTES} bytes")


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
