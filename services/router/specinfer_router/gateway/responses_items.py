"""Items of the Responses API: what goes into a response, and the conversation that items make.

Items keep the form in which they came, so that stored ones can be read again. This module knows
nothing of requests, answers or stores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, model_validator

from specinfer.messages import ChatMessage, ToolCall
from specinfer_router.gateway.body import Body
from specinfer_router.gateway.fields import ShortText
from specinfer_router.tokenizer import MAX_MESSAGES

Status = Literal["in_progress", "completed", "incomplete"]


def _nothing(_: Any) -> None:
    """In place of what is not kept, however large or deep it is."""


# What answers and the client's helpers say beside the conversation; it may be sent back.
Dropped = Annotated[Any, BeforeValidator(_nothing)]


class ItemBody(Body):
    """A part of an item: clients send back what they received, with null for what it had not."""

    model_config = ConfigDict(json_schema_extra={"additionalProperties": {"type": "null"}})

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = cls.model_fields
        return {key: value for key, value in data.items() if value is not None or key in known}


class InputText(ItemBody):
    """Text that goes in."""

    type: Literal["input_text"]
    text: str


class OutputText(ItemBody):
    """Text that came out of an earlier response."""

    type: Literal["output_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: Dropped = None
    parsed: Dropped = None


class Refusal(ItemBody):
    """A refusal that came out of an earlier response."""

    type: Literal["refusal"]
    refusal: str


Part = Annotated[InputText | OutputText | Refusal, Field(discriminator="type")]


class MessageItem(ItemBody):
    """One turn of a conversation."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Annotated[list[Part], Field(max_length=MAX_MESSAGES)]
    id: ShortText | None = None
    status: Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class FunctionCallItem(ItemBody):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: Annotated[str, Field(min_length=1, max_length=128)]
    name: Annotated[str, Field(min_length=1, max_length=128)]
    arguments: str
    id: ShortText | None = None
    status: Status | None = None
    parsed_arguments: Dropped = None


class FunctionCallOutputItem(ItemBody):
    """What a tool answered."""

    type: Literal["function_call_output"]
    call_id: Annotated[str, Field(min_length=1, max_length=128)]
    output: str | Annotated[list[InputText], Field(max_length=MAX_MESSAGES)]
    id: ShortText | None = None
    status: Status | None = None


def _with_type(data: Any) -> Any:
    """A message needs not say that it is one."""
    return {"type": "message"} | data if isinstance(data, dict) else data


Item = MessageItem | FunctionCallItem | FunctionCallOutputItem
_TypedItem = Annotated[Item, Field(discriminator="type"), BeforeValidator(_with_type)]
Items = Annotated[list[_TypedItem], Field(min_length=1, max_length=MAX_MESSAGES)]
_ITEMS: TypeAdapter[list[Item]] = TypeAdapter(list[_TypedItem])


def stored_items(items: str | Sequence[Item], suffix: str) -> list[dict[str, Any]]:
    """A request's input in its full form, each item with an id that ends with `suffix`_index."""
    if isinstance(items, str):
        items = [MessageItem(role="user", content=items)]
    return [_stored(item, f"in_{suffix}_{index}") for index, item in enumerate(items)]


def read_items(data: Sequence[dict[str, Any]]) -> list[Item]:
    """Items from their stored form."""
    return _ITEMS.validate_python(list(data))


def conversation(instructions: str, items: Sequence[Item]) -> tuple[ChatMessage, ...]:
    """The messages that items stand for; calls join the assistant's turn before them."""
    messages = [ChatMessage("system", instructions)] if instructions else []
    for item in items:
        if isinstance(item, FunctionCallOutputItem):
            messages.append(ChatMessage("tool", _text(item.output), tool_call_id=item.call_id))
        elif isinstance(item, MessageItem):
            role = "system" if item.role == "developer" else item.role
            messages.append(ChatMessage(role, _text(item.content)))
        else:
            _add_call(messages, ToolCall(item.call_id, item.name, item.arguments))
    return tuple(messages)


def _add_call(messages: list[ChatMessage], call: ToolCall) -> None:
    last = messages.pop() if messages and messages[-1].role == "assistant" else None
    before = last or ChatMessage("assistant", "")
    messages.append(ChatMessage("assistant", before.content, tool_calls=(*before.tool_calls, call)))


def _stored(item: Item, item_id: str) -> dict[str, Any]:
    data = item.model_dump(exclude_none=True)
    if isinstance(item, MessageItem) and isinstance(item.content, str):
        kind = "output_text" if item.role == "assistant" else "input_text"
        extra: dict[str, Any] = {"annotations": []} if kind == "output_text" else {}
        data["content"] = [{"type": kind, "text": item.content, **extra}]
    return {"id": item_id, "status": "completed"} | data


def _text(content: str | Sequence[InputText | OutputText | Refusal]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.refusal if isinstance(part, Refusal) else part.text for part in content)
