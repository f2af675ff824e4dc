"""Finds calls of tools in a text that comes in pieces, and streams their arguments on.

The same text gives the same content and calls however it was cut into pieces. What only looks like
the beginning of a call comes out as content; at most a few hundred characters are held back. This
module knows nothing of schemas, HTTP or tokens.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

# White space around a call that is part of neither the call nor the content.
MAX_SPACE = 64
_SPACES = " \t\r\n"


@dataclass(frozen=True)
class CallFormat:
    """How a model writes a call.

    Attributes:
        opening: stands before a call; "" when a call is bare JSON, at the start of the text or
            after another call.
        closing: stands after a call, or "".
        key: the arguments' key when a grammar forces the call; both known keys are read.
    """

    opening: str
    closing: str
    key: str


@dataclass(frozen=True)
class ContentDelta:
    """Text that belongs to no call."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """A call begins; its arguments follow."""

    index: int
    call_id: str
    name: str


@dataclass(frozen=True)
class ArgumentsDelta:
    """A piece of a call's arguments, which are JSON."""

    index: int
    text: str


ToolDelta = ContentDelta | CallStart | ArgumentsDelta


class TextParser:
    """Reads a completion that makes no calls: all of it is content.

    Attributes:
        num_calls: always 0.
        has_whole_calls: always False.
    """

    num_calls = 0
    has_whole_calls = False

    def push(self, text: str) -> list[ToolDelta]:
        """The text as content."""
        return [ContentDelta(text)] if text else []

    def finish(self) -> list[ToolDelta]:
        """Nothing is held back."""
        return []


class ToolParser:
    """Reads one completion.

    Attributes:
        num_calls: calls begun so far.
    """

    def __init__(
        self,
        call_format: CallFormat,
        names: frozenset[str],
        *,
        max_calls: int,
        call_prefix: str = "",
        forced: bool = False,
    ) -> None:
        """A reader at the start of a text.

        Args:
            call_format: how calls are written.
            names: what may be called; other names make text.
            max_calls: calls beyond so many are dropped.
            call_prefix: part of the calls' ids; "" makes them random.
            forced: the text is calls and nothing else, so that what is held back at its end is the
                beginning of one.
        """
        self.num_calls = 0
        self._forced = forced
        self._format = call_format
        self._names = names
        self._max_calls = max_calls
        self._prefix = call_prefix or secrets.token_hex(12)
        self._held = ""
        self._state = self._before_call if not call_format.opening else self._in_text
        self._scanner = _ValueScanner()
        # What led up to the place where a call may begin; text after all if none does.
        self._lead = ""
        # Only white space was seen since the start or the last call.
        self._blank = True
        self._out: list[ToolDelta] = []

    @property
    def has_whole_calls(self) -> bool:
        """Whether there are calls and the arguments of each have ended."""
        return self.num_calls > 0 and self._state != self._in_arguments

    def push(self, text: str) -> list[ToolDelta]:
        """What became certain with a piece of text, in order."""
        self._held += text
        self._run()
        return self._taken()

    def finish(self) -> list[ToolDelta]:
        """The rest; what was held back for a call that never came is content."""
        held, self._held = self._held, ""
        if self._forced:
            return self._taken()
        if self._state == self._before_call:
            held = self._lead + held
        elif self._state in (self._at_brace, self._after_call):
            held = held.lstrip(_SPACES)
            held = "" if self._format.closing.startswith(held) else held
        if not (self._blank and self.num_calls and not held.strip(_SPACES + ";")):
            self._content(held)
        return self._taken()

    def _run(self) -> None:
        while self._state():
            pass

    def _taken(self) -> list[ToolDelta]:
        out, self._out = self._out, []
        return out

    def _in_text(self) -> bool:
        """Free text, up to an opening tag; returns whether to go on."""
        opening = self._format.opening
        at = self._held.find(opening) if opening else -1
        if at >= 0:
            before, self._held = self._held[:at], self._held[at + len(opening) :]
            self._lead = opening
            if self._blank and len(before) <= MAX_SPACE and not before.strip(_SPACES):
                self._lead = before + opening
            else:
                self._content(before)
            self._state = self._before_call
            return True
        kept = _overlap(self._held, opening)
        if self._blank:
            # Blank text goes with the call that follows it, if one does.
            blank = self._held[: len(self._held) - kept]
            if len(blank) <= MAX_SPACE and not blank.strip(_SPACES):
                return False
        free = len(self._held) - kept
        self._content(self._held[:free])
        self._held = self._held[free:]
        return False

    def _before_call(self) -> bool:
        """Behind an opening tag, or where bare JSON may begin."""
        header = _HEADER.match(self._held)
        if header is not None and header["name"] in self._names:
            self._begin_call(header["name"])
            self._held = self._held[header.end() :]
            if header["end"]:
                self._arguments("{}")
                self._state = self._after_call
            else:
                self._scanner = _ValueScanner()
                self._state = self._in_arguments
            return True
        if header is None and _HEADER_PREFIX.fullmatch(self._held):
            return False
        self._content(self._lead)
        self._blank = False
        self._state = self._in_text
        return True

    def _in_arguments(self) -> bool:
        end = self._scanner.scan(self._held)
        self._arguments(self._held[:end])
        self._held = self._held[end:]
        if not self._scanner.complete:
            return False
        self._state = self._at_brace
        return True

    def _at_brace(self) -> bool:
        """Behind the arguments: the call's own closing brace."""
        text = self._held.lstrip(_SPACES)
        if not text and len(self._held) <= MAX_SPACE:
            return False
        if text.startswith("}") and len(self._held) - len(text) <= MAX_SPACE:
            self._held = text[1:]
            self._state = self._after_call
            return True
        self._blank = False
        self._state = self._in_text
        return True

    def _after_call(self) -> bool:
        """Behind a call: its closing tag, or what parts bare calls."""
        text = self._held.lstrip(_SPACES)
        if len(self._held) - len(text) > MAX_SPACE:
            return self._leave_call(False)
        mark = self._format.closing or ";"
        if text.startswith(mark):
            self._lead, self._held = mark, text[len(mark) :]
            return self._leave_call(True)
        if mark.startswith(text):
            return False
        return self._leave_call(False)

    def _leave_call(self, marked: bool) -> bool:
        self._blank = marked or bool(self._format.opening)
        bare_call_may_follow = marked and not self._format.opening
        self._state = self._before_call if bare_call_may_follow else self._in_text
        return True

    def _begin_call(self, name: str) -> None:
        self.num_calls += 1
        if self.num_calls <= self._max_calls:
            index = self.num_calls - 1
            self._out.append(CallStart(index, f"call_{self._prefix}_{index}", name))

    def _arguments(self, text: str) -> None:
        if text and self.num_calls <= self._max_calls:
            self._out.append(ArgumentsDelta(self.num_calls - 1, text))

    def _content(self, text: str) -> None:
        if text:
            self._blank = False
            self._out.append(ContentDelta(text))


class _ValueScanner:
    """Finds the end of a JSON object: brackets are counted, strings are skipped."""

    def __init__(self) -> None:
        self.complete = False
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def scan(self, text: str) -> int:
        """How many characters of `text` belong to the object."""
        for index, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.complete = True
                    return index + 1
        return len(text)


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that is a beginning of `mark`, but not all of it."""
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if mark.startswith(text[-length:]):
            return length
    return 0


# {"name": "x", "arguments": and then {, or {"name": "x"} for a call without arguments.
_SPACE = rf"[{_SPACES}]{{0,{MAX_SPACE}}}"
_NAME_PART = r"(?P<name>[A-Za-z0-9_-]{1,64})"
_KEY = r'"(?:arguments|parameters)"'


def _nested(parts: list[str]) -> str:
    """Matches any beginning of the parts in order."""
    return "".join(f"(?:{part}" for part in parts) + ")?" * len(parts)


def _header_prefix() -> str:
    parts = [_SPACE, r"\{", _SPACE, *'"name"', _SPACE, ":", _SPACE, '"', "[A-Za-z0-9_-]{0,64}"]
    parts += ['"', _SPACE, ",", _SPACE]
    keys = (_nested([*f'"{key}"', _SPACE, ":", _SPACE]) for key in ("arguments", "parameters"))
    return _nested([*parts, f"(?:{'|'.join(keys)})"])


_HEADER = re.compile(
    rf'{_SPACE}\{{{_SPACE}"name"{_SPACE}:{_SPACE}"{_NAME_PART}"{_SPACE}'
    rf"(?:(?P<end>\}})|,{_SPACE}{_KEY}{_SPACE}:{_SPACE}(?=\{{))"
)
_HEADER_PREFIX = re.compile(_header_prefix())
