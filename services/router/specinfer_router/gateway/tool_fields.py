"""Tools and the choice among them, as chat completions write them.

This module knows nothing of what tools ask of the prompt or of the mask: `tools` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from specinfer_router.gateway.body import Body, unserved
from specinfer_router.gateway.tools import MAX_TOOLS, FunctionTool, ToolChoice

ONLY_FUNCTIONS = "functions are the one kind of tool"


class FunctionFields(Body):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolFields(Body):
    """A tool; functions are the one kind."""

    type: Annotated[Literal["function"], unserved("custom", advice=ONLY_FUNCTIONS)]
    function: FunctionFields


class FunctionName(Body):
    """A function by its name."""

    name: str


class NamedTool(Body):
    """One tool by its name."""

    type: Literal["function"]
    function: FunctionName


class AllowedToolsFields(Body):
    """Some of the tools."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedTools(Body):
    """A choice among some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedToolsFields


Tools = Annotated[list[ToolFields], Field(max_length=MAX_TOOLS)]
ToolChoiceFields = (
    Literal["none", "auto", "required"]
    | Annotated[
        NamedTool | AllowedTools,
        Field(discriminator="type"),
        unserved("custom", advice=ONLY_FUNCTIONS, key="type"),
    ]
)


def function_tools(tools: Sequence[ToolFields]) -> list[FunctionTool]:
    """The tools as a plan takes them."""
    return [
        FunctionTool(
            name=tool.function.name,
            description=tool.function.description or "",
            parameters=tool.function.parameters,
            strict=bool(tool.function.strict),
        )
        for tool in tools
    ]


def tool_choice_of(choice: ToolChoiceFields | None, *, any_tools: bool) -> ToolChoice:
    """The choice as a plan takes it; without one, tools are called as the model likes."""
    if choice is None:
        return ToolChoice("auto" if any_tools else "none")
    if isinstance(choice, NamedTool):
        return ToolChoice("required", (choice.function.name,))
    if isinstance(choice, AllowedTools):
        allowed = choice.allowed_tools
        return ToolChoice(allowed.mode, tuple(tool.function.name for tool in allowed.tools))
    return ToolChoice(choice)
