"""Conversations: the turns so far, and a reply with the completion that it came from.

This module knows nothing of templates, tool-call formats or the wire: a reply's content is the text
that the model made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from specinfer.completion import Completion
from specinfer.messages import ChatMessage, ToolCall


@dataclass(frozen=True)
class ChatReply:
    """An answer of the model.

    Attributes:
        message: the assistant's turn, to be put after the others.
        completion: everything about how it was made.
    """

    message: ChatMessage
    completion: Completion

    @property
    def text(self) -> str:
        """What the model said."""
        return self.message.content


@dataclass(frozen=True)
class Conversation:
    """Turns of a conversation, kept between calls; each method gives a longer one.

        talk = Conversation.begin(system="Answer in one sentence.")
        talk = talk.ask("What does textwrap.dedent do?")
        reply = client.chat(talk)
        talk = talk.answer(reply).ask("And indent?")

    Attributes:
        messages: the turns, in order.
    """

    messages: tuple[ChatMessage, ...] = ()

    @classmethod
    def begin(cls, system: str = "") -> Self:
        """A conversation with nothing but instructions for the model, or with nothing."""
        return cls((ChatMessage("system", system),) if system else ())

    def ask(self, text: str) -> Self:
        """With a turn of the user's."""
        return self.add(ChatMessage("user", text))

    def answer(self, reply: ChatReply | Completion | str) -> Self:
        """With the model's turn: a reply, a completion, or its text."""
        if isinstance(reply, ChatReply):
            return self.add(reply.message)
        return self.add(reply_of(reply).message if isinstance(reply, Completion) else _said(reply))

    def call_tools(self, *calls: ToolCall, content: str = "") -> Self:
        """With a turn in which the model called tools."""
        return self.add(ChatMessage("assistant", content, tool_calls=calls))

    def tool_result(self, tool_call_id: str, content: str, name: str = "") -> Self:
        """With what a tool answered."""
        return self.add(ChatMessage("tool", content, name=name, tool_call_id=tool_call_id))

    def add(self, message: ChatMessage) -> Self:
        """With one more turn."""
        return type(self)((*self.messages, message))


ChatInput = str | Conversation | Sequence[ChatMessage | Mapping[str, Any]]


def turns_of(messages: ChatInput) -> Sequence[ChatMessage | Mapping[str, Any]]:
    """The turns of whatever a chat may be given as: a question, turns, or a conversation."""
    if isinstance(messages, str):
        return (ChatMessage("user", messages),)
    return messages.messages if isinstance(messages, Conversation) else messages


def reply_of(completion: Completion) -> ChatReply:
    """A completion as the assistant's turn."""
    return ChatReply(_said(completion.text), completion)


def _said(text: str) -> ChatMessage:
    return ChatMessage("assistant", text)
