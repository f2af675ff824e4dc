"""From a prompt or a conversation to tokens, within bounds, with the target's own tokenizer.

The tokenizer and its chat template come from a verify worker as bytes; no model folder is needed.
This module knows nothing of sessions, workers or the wire.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from tokenizers import Tokenizer

from specinfer.errors import InvalidRequest, Mismatch
from specinfer.messages import ChatMessage
from specinfer_router.chat_template import ChatTemplate
from specinfer_router.text import Vocabulary, check_unicode

# Shorter texts are tokenised in less time than a thread takes to start.
OFF_LOOP_CHARACTERS = 2_000
MAX_MESSAGES = 1_000


class ServedTokenizer:
    """The tokenizer of the model that is served.

    Attributes:
        vocabulary: for turning tokens into text.
        eos_token_ids: tokens that end a text.
        max_prompt_characters: longest text that is tokenised at all.
        tokenizer_json: bytes of the tokenizer's file.
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
        self.tokenizer_json = tokenizer_json
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

    @property
    def chat_template(self) -> str:
        """The chat template's text, or ""."""
        return "" if self._template is None else self._template.source

    @property
    def takes_tools(self) -> bool:
        """Whether the chat template tells the model of tools."""
        return self._template is not None and self._template.takes_tools

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
        check_unicode(text, field)
        if len(text) <= OFF_LOOP_CHARACTERS:
            return self._encode(text, special)
        return await asyncio.to_thread(self._encode, text, special)

    async def encode_chat(
        self, messages: Sequence[ChatMessage], tools: Sequence[str] = ()
    ) -> list[int]:
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
        if tools and not self._template.takes_tools:
            raise InvalidRequest("this model's chat template knows no tools", field="tools")
        calls = (call for message in messages for call in message.tool_calls)
        length = sum(len(message.content) for message in messages)
        self._check_length(length + sum(len(call.arguments) for call in calls), "messages")
        text = await asyncio.to_thread(self._template.render, messages, tools)
        return await self.encode(text, field="messages", special=False)

    async def decode(self, token_ids: Sequence[int]) -> str:
        """Text of tokens, special ones included by name."""
        if len(token_ids) <= OFF_LOOP_CHARACTERS:
            return self._decode(token_ids)
        return await asyncio.to_thread(self._decode, token_ids)

    def _decode(self, token_ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=False)
        return text

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
