"""Tools as request bodies write them: chat's nested objects and the Responses API's flat ones.

This module turns both into what `tools` plans with; it knows nothing of templates or grammars.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from specinfer.errors import InvalidRequest
from specinfer_router.gateway.body import Body
from specinfer_router.gateway.tools import (
    MAX_DESCRIPTION_CHARACTERS,
    MAX_TOOLS,
    FunctionTool,
    ToolChoice,
)

ToolName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Description = Annotated[str, Field(max_length=MAX_DESCRIPTION_CHARACTERS)]
ChoiceWord = Literal["none", "auto", "required"]


class ChatFunction(Body):
    """The function of a chat tool."""

    name: ToolName
    description: Description | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChatTool(Body):
    """A tool of chat completions."""

    type: Literal["function"]
    function: ChatFunction


class ChatFunctionName(Body):
    """A function that is chosen."""

    name: ToolName


class ChatNamedChoice(Body):
    """One tool that has to be called, or that may be."""

    type: Literal["function"]
    function: ChatFunctionName


class ChatAllowedTools(Body):
    """Some of the tools."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[ChatNamedChoice], Field(min_length=1, max_length=MAX_TOOLS)]


class ChatAllowedChoice(Body):
    """A choice among some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: ChatAllowedTools


ChatTools = Annotated[list[ChatTool], Field(max_length=MAX_TOOLS)]
ChatToolChoice = ChoiceWord | ChatNamedChoice | ChatAllowedChoice


class ResponseTool(Body):
    """A tool of the Responses API."""

    type: Literal["function"]
    name: ToolName
    description: Description | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseNamedChoice(Body):
    """One tool that has to be called, or that may be."""

    type: Literal["function"]
    name: ToolName


class ResponseAllowedChoice(Body):
    """A choice among some of the tools."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[ResponseNamedChoice], Field(min_length=1, max_length=MAX_TOOLS)]


ResponseTools = Annotated[list[ResponseTool], Field(max_length=MAX_TOOLS)]
ResponseToolChoice = ChoiceWord | ResponseNamedChoice | ResponseAllowedChoice


def chat_tools(tools: Sequence[ChatTool] | None) -> list[FunctionTool]:
    """The tools of a chat request."""
    return [_function_tool(tool.function) for tool in tools or ()]


def chat_choice(choice: ChatToolChoice | None) -> ToolChoice:
    """The tool_choice of a chat request; "auto" where there is none."""
    if isinstance(choice, ChatNamedChoice):
        return ToolChoice("required", (choice.function.name,))
    if isinstance(choice, ChatAllowedChoice):
        allowed = choice.allowed_tools
        return ToolChoice(allowed.mode, tuple(tool.function.name for tool in allowed.tools))
    return ToolChoice(choice or "auto")


def response_tools(tools: Sequence[ResponseTool] | None) -> list[FunctionTool]:
    """The tools of a request to the Responses API."""
    return [_function_tool(tool) for tool in tools or ()]


def response_choice(choice: ResponseToolChoice | None) -> ToolChoice:
    """The tool_choice of a request to the Responses API; "auto" where there is none."""
    if isinstance(choice, ResponseNamedChoice):
        return ToolChoice("required", (choice.name,))
    if isinstance(choice, ResponseAllowedChoice):
        return ToolChoice(choice.mode, tuple(tool.name for tool in choice.tools))
    return ToolChoice(choice or "auto")


def check_format(choice: ToolChoice, has_format: bool) -> None:
    """Raise InvalidRequest where both calls and a format of the answer are forced."""
    if has_format and choice.mode == "required":
        raise InvalidRequest(
            "a completion cannot be a tool call and match a format at once", field="tool_choice"
        )


def _function_tool(tool: ChatFunction | ResponseTool) -> FunctionTool:
    return FunctionTool(
        tool.name, tool.description or "", tool.parameters, strict=tool.strict or False
    )
