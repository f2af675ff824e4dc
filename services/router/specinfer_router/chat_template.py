"""A model's chat template: a conversation in, a prompt out, within bounds.

Templates come with the model and are not trusted: they run in jinja2's immutable sandbox with
limits on time and size. This module knows nothing of tokenizers, sessions or the wire.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from specinfer.errors import InvalidRequest, Mismatch
from specinfer.messages import ChatMessage, ToolCall
from specinfer_router.text import check_unicode

MAX_TEMPLATE_SECONDS = 1.0
# Templates write tools and arguments as JSON again, with a call of Python's for every level.
MAX_JSON_DEPTH = 64
_TOOLS = re.compile(r"\btools\b")
# What a template's expressions may raise when a conversation does not suit them.
_TEMPLATE_FAULTS = (
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
    MemoryError,
)


class ChatTemplate:
    """A chat template in the sandbox.

    Attributes:
        source: the template's text.
        takes_tools: whether it tells the model of tools.
    """

    def __init__(self, source: str, bos_token: str, eos_token: str, max_characters: int) -> None:
        """Compile a template; raises Mismatch when it is none."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _strftime_now
        # jinja2's own filter escapes for HTML, which models have never seen.
        environment.filters["tojson"] = _to_json
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise Mismatch(f"the model's chat template cannot be read: {error}") from error
        self.source = source
        self.takes_tools = _TOOLS.search(source) is not None
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._max_characters = max_characters

    def render(self, messages: Sequence[ChatMessage], tools: Sequence[str] = ()) -> str:
        """The prompt of a conversation; call it on a thread of its own, it traces that thread.

        Args:
            messages: the conversation.
            tools: one JSON object each.

        Raises:
            InvalidRequest: the template refuses the conversation or exceeds its bounds, a tool
                is no JSON, or one of them has JSON too deep or what is no valid Unicode.
        """
        values: dict[str, Any] = {"messages": [_turn(message) for message in messages]}
        if tools:
            values["tools"] = [_parsed_tool(tool) for tool in tools]
        before = sys.gettrace()
        # The thread's own time: a busy machine does not make a template slow.
        sys.settrace(_deadline_tracer(time.thread_time() + MAX_TEMPLATE_SECONDS))
        try:
            return self._generate(values)
        except (TemplateError, *_TEMPLATE_FAULTS) as error:
            raise InvalidRequest(
                f"the model's chat template refuses this conversation: {error}", field="messages"
            ) from error
        finally:
            sys.settrace(before)

    def _generate(self, values: dict[str, Any]) -> str:
        pieces: list[str] = []
        num_characters = 0
        for piece in self._template.generate(add_generation_prompt=True, **self._tokens, **values):
            num_characters += len(piece)
            if num_characters > self._max_characters:
                raise InvalidRequest("the conversation makes too long a prompt", field="messages")
            pieces.append(piece)
        return "".join(pieces)


def _turn(message: ChatMessage) -> dict[str, Any]:
    """A message as templates know it; what is empty is left out."""
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name:
        turn["name"] = message.name
    if message.tool_call_id:
        turn["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        turn["tool_calls"] = [_call(call) for call in message.tool_calls]
    return turn


def _call(call: ToolCall) -> dict[str, Any]:
    try:
        arguments = _read_json(call.arguments, "messages")
    except ValueError:
        # What a model once said is shown to it again as it was.
        arguments = call.arguments
    function = {"name": call.name, "arguments": arguments}
    return {"type": "function", "id": call.id, "function": function}


def _parsed_tool(tool: str) -> Any:
    try:
        return _read_json(tool, "tools")
    except ValueError as error:
        raise InvalidRequest("each tool is one JSON object", field="tools") from error


def _read_json(text: str, field: str) -> Any:
    """JSON within bounds; raises ValueError for what is none and InvalidRequest for the rest."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise _too_deep(field) from error
    level = [value]
    for _ in range(MAX_JSON_DEPTH + 1):
        level = [child for item in level for child in _children(item, field)]
        if not level:
            return value
    raise _too_deep(field)


def _children(value: Any, field: str) -> list[Any]:
    if isinstance(value, str):
        # JSON can spell halves of characters, which no tokenizer takes.
        check_unicode(value, field)
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value if isinstance(value, list) else []


def _too_deep(field: str) -> InvalidRequest:
    return InvalidRequest(
        f"{field} has JSON that is nested more than {MAX_JSON_DEPTH} levels deep", field=field
    )


def _deadline_tracer(deadline: float) -> Any:
    """A trace function that stops code which runs past the deadline, loops without output too."""

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if time.thread_time() > deadline:
            raise InvalidRequest(
                f"the chat template took more than {MAX_TEMPLATE_SECONDS:g} s", field="messages"
            )
        return trace

    return trace


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _strftime_now(pattern: str) -> str:
    return time.strftime(pattern)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
