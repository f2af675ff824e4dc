"""Which calls of tools a completion may make, and what that asks of the prompt and of the mask.

A plan follows from the caller's tools, the caller's choice and the model's chat template:

- A template that names `tools` and `<tool_call>` (Qwen, Hermes) is told of the tools; a call is
  `<tool_call>` JSON `</tool_call>` with the keys "name" and "arguments".
- A template that names `tools` alone (Llama 3) is told of them too; a call is bare JSON with the
  keys "name" and "parameters", and several are parted by ";".
- A template that names no tools cannot let the model choose: "auto" is refused. Calls that are
  forced need no choice: a system message lists the tools and the mask does the rest.

Calls that are forced ("required", or one tool by name) are valid by construction: the completion
has to match a grammar in which each tool's arguments obey its schema. Where the model chooses, text
is free; after `<tool_call>` a mask is put on if some tool is strict. Bare JSON cannot be told from
an answer in JSON before it is complete, so there a strict tool is held to its schema only when the
call is forced. This module knows nothing of HTTP bodies, of sessions or of what was generated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from specinfer.errors import InvalidRequest
from specinfer.messages import ChatMessage, Grammar
from specinfer_router.gateway.tools_parser import CallFormat, TextParser, ToolParser

MAX_TOOLS = 128
MAX_CALLS = 16
MAX_SCHEMA_CHARACTERS = 65_536
MAX_ALL_SCHEMA_CHARACTERS = 262_144
MAX_SCHEMA_DEPTH = 32
MAX_DESCRIPTION_CHARACTERS = 8_192

TAGGED = CallFormat(opening="<tool_call>", closing="</tool_call>", key="arguments")
BARE = CallFormat(opening="", closing="", key="parameters")

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TOOLS_IN_TEMPLATE = re.compile(r"\btools\b")
_NO_ARGUMENTS: Mapping[str, Any] = {
    "type": "object",
    "properties": {},
    "additionalProperties": False,
}


@dataclass(frozen=True)
class FunctionTool:
    """One tool.

    Attributes:
        name: 1 to 64 of letters, digits, "_" and "-".
        description: what it does, for the model.
        parameters: JSON schema of its arguments; None means that it takes none.
        strict: refuse a schema that cannot be kept to the letter, rather than keep what can be.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    strict: bool = False

    @property
    def schema(self) -> Mapping[str, Any]:
        """JSON schema of the arguments."""
        return _NO_ARGUMENTS if self.parameters is None else self.parameters

    def to_json(self) -> str:
        """What chat templates take: OpenAI's tool object."""
        function: dict[str, Any] = {"name": self.name}
        if self.description:
            function["description"] = self.description
        function["parameters"] = self.schema
        return json.dumps({"type": "function", "function": function}, ensure_ascii=False)


@dataclass(frozen=True)
class ToolChoice:
    """Whether the model calls tools, and which.

    Attributes:
        mode: "none", "auto" (the model chooses) or "required" (at least one call and no text).
        names: the only tools that may be called; empty allows all.
    """

    mode: Literal["none", "auto", "required"] = "auto"
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class ToolPlan:
    """What a request with tools asks of the prompt, of the mask and of whoever reads the text.

    Attributes:
        template_tools: one JSON object for each tool, for the chat template.
        instruction: for a system message where the template knows no tools, or "".
        grammar: what the completion has to match, or None.
        call_format: how the model writes calls; None where it makes none.
        names: tools that may be called.
        max_calls: calls beyond so many are dropped from the text.
        forced: the completion is calls and nothing else.
    """

    template_tools: tuple[str, ...] = ()
    instruction: str = ""
    grammar: Grammar | None = None
    call_format: CallFormat | None = None
    names: frozenset[str] = field(default_factory=frozenset)
    max_calls: int = MAX_CALLS
    forced: bool = False

    def parser(self, call_prefix: str = "") -> ToolParser | TextParser:
        """A reader of one completion's text.

        Args:
            call_prefix: part of the calls' ids, such as the session's id, so that reading the same
                text again gives the same ids; "" makes them random.
        """
        if self.call_format is None:
            return TextParser()
        return ToolParser(
            self.call_format,
            self.names,
            max_calls=self.max_calls,
            call_prefix=call_prefix,
            forced=self.forced,
        )


def plan_tools(
    tools: Sequence[FunctionTool], choice: ToolChoice, parallel: bool, template: str
) -> ToolPlan:
    """How a request's tools are served.

    Args:
        tools: what may be called; empty makes a plan without calls.
        choice: what the caller says of calling.
        parallel: whether one completion may make several calls.
        template: the model's chat template, "" where there is none.

    Raises:
        InvalidRequest: naming "tools" or "tool_choice".
    """
    check_tools(tools)
    _check_choice(tools, choice)
    if not tools or choice.mode == "none":
        return ToolPlan()
    told = _TOOLS_IN_TEMPLATE.search(template) is not None
    if not told and choice.mode == "auto":
        raise InvalidRequest(
            "this model's chat template knows no tools, so the model cannot choose one; "
            'tool_choice "required" or one tool by name works, by a grammar alone',
            field="tools",
        )
    call_format = TAGGED if told and TAGGED.opening in template else BARE
    callable_tools = [tool for tool in tools if not choice.names or tool.name in choice.names]
    max_calls = MAX_CALLS if parallel else 1
    return ToolPlan(
        template_tools=tuple(tool.to_json() for tool in tools) if told else (),
        instruction="" if told else _instruction(tools),
        grammar=_grammar(callable_tools, choice, call_format, max_calls),
        call_format=call_format,
        names=frozenset(tool.name for tool in callable_tools),
        max_calls=max_calls,
        forced=choice.mode == "required",
    )


def instructed(messages: Sequence[ChatMessage], instruction: str) -> tuple[ChatMessage, ...]:
    """A conversation with a plan's instruction at the end of its first system message."""
    if not instruction:
        return tuple(messages)
    if messages and messages[0].role == "system":
        first = messages[0]
        return replace(first, content=f"{first.content}\n\n{instruction}"), *messages[1:]
    return ChatMessage("system", instruction), *messages


def check_tools(tools: Sequence[FunctionTool]) -> None:
    """Raise InvalidRequest for tools past the bounds, or with names that are none or not unique."""
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest(f"a request has at most {MAX_TOOLS} tools", field="tools")
    seen: set[str] = set()
    num_characters = 0
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        if not _NAME.fullmatch(tool.name):
            raise InvalidRequest(
                'a tool\'s name is 1 to 64 letters, digits, "_" or "-"', field=where
            )
        if tool.name in seen:
            raise InvalidRequest(f"two tools are named {tool.name}", field=where)
        seen.add(tool.name)
        if len(tool.description) > MAX_DESCRIPTION_CHARACTERS:
            raise InvalidRequest(
                f"a description has at most {MAX_DESCRIPTION_CHARACTERS} characters", field=where
            )
        num_characters += _schema_characters(tool, where)
        if num_characters > MAX_ALL_SCHEMA_CHARACTERS:
            raise InvalidRequest(
                f"all schemas together have at most {MAX_ALL_SCHEMA_CHARACTERS} characters",
                field="tools",
            )


def _schema_characters(tool: FunctionTool, where: str) -> int:
    parameters = tool.schema
    if parameters.get("type", "object") != "object":
        raise InvalidRequest('a tool\'s parameters are a schema of type "object"', field=where)
    if any(depth > MAX_SCHEMA_DEPTH for depth in _depths(parameters)):
        raise InvalidRequest(f"a schema nests at most {MAX_SCHEMA_DEPTH} levels", field=where)
    num_characters = len(json.dumps(parameters))
    if num_characters > MAX_SCHEMA_CHARACTERS:
        raise InvalidRequest(
            f"a schema has at most {MAX_SCHEMA_CHARACTERS} characters", field=where
        )
    return num_characters


def _depths(value: Any) -> Iterator[int]:
    """How deep each object and list stands, without recursion."""
    waiting = [(value, 0)]
    while waiting:
        item, depth = waiting.pop()
        yield depth
        if depth > MAX_SCHEMA_DEPTH:
            return
        if isinstance(item, Mapping):
            waiting.extend((child, depth + 1) for child in item.values())
        elif isinstance(item, list):
            waiting.extend((child, depth + 1) for child in item)


def _check_choice(tools: Sequence[FunctionTool], choice: ToolChoice) -> None:
    if not tools and choice.mode == "required":
        raise InvalidRequest("tool_choice needs tools", field="tool_choice")
    known = {tool.name for tool in tools}
    for name in choice.names:
        if name not in known:
            raise InvalidRequest(
                f"tool_choice names {name!r}, which is not among the tools", field="tool_choice"
            )


def _instruction(tools: Sequence[FunctionTool]) -> str:
    lines = "\n".join(tool.to_json() for tool in tools)
    return (
        f"Tools, one JSON object a line:\n{lines}\nCall a tool by writing a JSON object with its "
        f'"name" and its "{BARE.key}", several parted by "; ".'
    )


def _grammar(
    tools: Sequence[FunctionTool], choice: ToolChoice, call_format: CallFormat, max_calls: int
) -> Grammar | None:
    """Calls and nothing else where they are forced; free text with checked calls if need be."""
    if choice.mode == "required":
        separator = "\\n" if call_format.opening else "; "
        more = f' ("{separator}" call){{0,{max_calls - 1}}}' if max_calls > 1 else ""
        opening, closing = _around(call_format)
        start = f"start: call{more}\ncall: {opening}body{closing}\n"
    elif call_format.opening and any(tool.strict for tool in tools):
        start = (
            "start: tagged* TEXT\n"
            f'tagged: trigger body "\\n{call_format.closing}"\n'
            # Lazy: the text ends at the first tag, and what follows has to be a call.
            f'trigger[lazy]: TEXT "{call_format.opening}\\n"\n'
            "TEXT: /(.|\\n)*/\n"
        )
    else:
        return None
    bodies = " | ".join(f"body_{index}" for index in range(len(tools)))
    rules = "".join(_body(index, tool, call_format) for index, tool in enumerate(tools))
    return Grammar("lark", f"{start}body: {bodies}\n{rules}")


def _around(call_format: CallFormat) -> tuple[str, str]:
    if not call_format.opening:
        return "", ""
    return f'"{call_format.opening}\\n" ', f' "\\n{call_format.closing}"'


def _body(index: int, tool: FunctionTool, call_format: CallFormat) -> str:
    head = json.dumps(f'{{"name": "{tool.name}", "{call_format.key}": ')
    # Spaced as the models were taught; free white space invites endless runs of it.
    options = {
        "item_separator": ", ",
        "key_separator": ": ",
        "whitespace_flexible": False,
        "lenient": not tool.strict,
    }
    schema = {"type": "object", **tool.schema, "x-guidance": options}
    # One line of ASCII: a grammar's comments and ends of lines mean nothing inside.
    rule = f"arguments_{index}: %json {json.dumps(schema)}"
    return f'body_{index}: {head} arguments_{index} "}}"\n{rule}\n'
