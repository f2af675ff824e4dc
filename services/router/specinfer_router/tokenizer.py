"""From a prompt or a conversation to tokens, within bounds, with the target's own tokenizer.

The tokenizer and its chat template come from a verify worker as bytes; no model folder is needed.
Templates run in jinja2's immutable sandbox with limits on time and size. This module knows nothing
of sessions, workers or the wire.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from specinfer.errors import InvalidRequest, Mismatch
from specinfer.messages import ChatMessage
from specinfer_router.text import Vocabulary

# Shorter texts are tokenised in less time than a thread takes to start.
OFF_LOOP_CHARACTERS = 2_000
MAX_TEMPLATE_SECONDS = 1.0
MAX_MESSAGES = 1_000
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


class ServedTokenizer:
    """The tokenizer of the model that is served.

    Attributes:
        vocabulary: for turning tokens into text.
        eos_token_ids: tokens that end a text.
        max_prompt_characters: longest text that is tokenised at all.
    """

    def __init__(
        self,
        tokenizer_json: bytes,
        *,
        chat_template: str = "",
        eos_token_ids: Sequence[int] = (),
        bos_token: str = "",
        eos_token: str = "",
        max_prompt_characters: int = 2**21,
    ) -> None:
        """Load the tokenizer and compile its template; raises Mismatch when either is none."""
        try:
            tokenizer = Tokenizer.from_str(tokenizer_json.decode())
        except Exception as error:  # the library raises plain Exception for a malformed file
            raise Mismatch(f"the verify worker's tokenizer cannot be read: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.vocabulary = Vocabulary.of(tokenizer)
        self.eos_token_ids = frozenset(eos_token_ids)
        self.max_prompt_characters = max_prompt_characters
        self._tokenizer = tokenizer
        self._template = (
            ChatTemplate(chat_template, bos_token, eos_token, max_prompt_characters)
            if chat_template
            else None
        )

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be served."""
        return self._template is not None

    async def encode(self, text: str, *, field: str = "prompt", special: bool = True) -> list[int]:
        """Tokens of a text.

        Args:
            text: the text; its length is checked before any work is done.
            field: request field to name when the text is refused.
            special: add the tokens that the tokenizer puts around a prompt, such as a begin token.

        Raises:
            InvalidRequest: the text is empty, too long, or no valid Unicode.
        """
        if not text:
            raise InvalidRequest(f"{field} is empty", field=field)
        self._check_length(len(text), field)
        if len(text) <= OFF_LOOP_CHARACTERS:
            return self._encode(text, special)
        return await asyncio.to_thread(self._encode, text, special)

    async def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Tokens of a conversation, ready for the assistant's turn.

        Raises:
            InvalidRequest: the model has no chat template, the conversation is empty, too long, or
                the template refuses it.
        """
        if self._template is None:
            raise InvalidRequest(
                "this model has no chat template; send a prompt instead", field="messages"
            )
        if not 1 <= len(messages) <= MAX_MESSAGES:
            raise InvalidRequest(
                f"a conversation has 1 to {MAX_MESSAGES} messages", field="messages"
            )
        self._check_length(sum(len(message.content) for message in messages), "messages")
        text = await asyncio.to_thread(self._template.render, messages)
        return await self.encode(text, field="messages", special=False)

    def _check_length(self, num_characters: int, field: str) -> None:
        if num_characters > self.max_prompt_characters:
            raise InvalidRequest(
                f"{field} has {num_characters} characters, more than {self.max_prompt_characters}",
                field=field,
            )

    def _encode(self, text: str, special: bool) -> list[int]:
        # The batch form lets other threads run meanwhile; the single one does not.
        encoded = self._tokenizer.encode_batch([text], add_special_tokens=special)
        token_ids: list[int] = encoded[0].ids
        return token_ids


class ChatTemplate:
    """A model's chat template, in the sandbox."""

    def __init__(self, source: str, bos_token: str, eos_token: str, max_characters: int) -> None:
        """Compile a template; raises Mismatch when it is none."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise Mismatch(f"the model's chat template cannot be read: {error}") from error
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._max_characters = max_characters

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """The prompt of a conversation; call it on a thread of its own, it traces that thread.

        Raises:
            InvalidRequest: the template refuses the conversation, or exceeds its bounds.
        """
        turns = [{"role": message.role, "content": message.content} for message in messages]
        pieces: list[str] = []
        num_characters = 0
        before = sys.gettrace()
        sys.settrace(_deadline_tracer(time.monotonic() + MAX_TEMPLATE_SECONDS))
        try:
            for piece in self._template.generate(
                messages=turns, add_generation_prompt=True, **self._tokens
            ):
                num_characters += len(piece)
                if num_characters > self._max_characters:
                    raise InvalidRequest(
                        "the conversation makes too long a prompt", field="messages"
                    )
                pieces.append(piece)
        except (TemplateError, *_TEMPLATE_FAULTS) as error:
            raise InvalidRequest(
                f"the model's chat template refuses this conversation: {error}", field="messages"
            ) from error
        finally:
            sys.settrace(before)
        return "".join(pieces)


def _deadline_tracer(deadline: float) -> Any:
    """A trace function that stops code which runs past the deadline, loops without output too."""

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if time.monotonic() > deadline:
            raise InvalidRequest(
                f"the chat template took more than {MAX_TEMPLATE_SECONDS:g} s", field="messages"
            )
        return trace

    return trace


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
