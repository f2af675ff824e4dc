"""From tokens to text, one token at a time, and where a stop string cuts it.

The text that comes out is the text of decoding all tokens at once, cut into pieces that never split
a character. This module knows nothing of sessions, rounds, models or the wire.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Protocol

from tokenizers import Tokenizer

from specinfer.errors import InvalidRequest

REPLACEMENT = "\ufffd"
# SentencePiece's sign for a space.
WORD_START = "\u2581"
_SURROGATE = re.compile("[\ud800-\udfff]")
MAX_HELD_TOKENS = 32
CONTEXT_TOKENS = 6


def check_unicode(text: str, field: str) -> None:
    """Raise InvalidRequest for half a character (a lone surrogate), which nothing can encode."""
    if not text.isascii() and _SURROGATE.search(text):
        raise InvalidRequest(f"{field} is no valid Unicode", field=field)


@dataclass(frozen=True)
class Vocabulary:
    """What turning tokens into text needs to know of a tokenizer, worked out once.

    Attributes:
        tokenizer: the tokenizer itself.
        byte_level: whether its decoder is GPT-2's: every token is a string of bytes.
        special_ids: tokens that have no text, such as the end token.
        byte_ids: SentencePiece's byte tokens, "<0x00>" to "<0xFF>".
    """

    tokenizer: Tokenizer
    byte_level: bool
    special_ids: frozenset[int]
    byte_ids: frozenset[int]
    # What was looked up already, at most the vocabulary.
    _pieces: dict[int, bytes] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Vocabulary:
        """Inspect a tokenizer."""
        decoder = json.loads(tokenizer.to_str()).get("decoder") or {}
        added = tokenizer.get_added_tokens_decoder()
        bytes_found = (tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        return cls(
            tokenizer=tokenizer,
            byte_level=decoder.get("type") == "ByteLevel",
            special_ids=frozenset(token_id for token_id, token in added.items() if token.special),
            byte_ids=frozenset(token_id for token_id in bytes_found if token_id is not None),
        )

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 of one token by itself, perhaps a part of a character; special tokens by name."""
        token = self.tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self.special_ids:
            return token.encode()
        if self.byte_level:
            return byte_level_bytes(token)
        if token_id in self.byte_ids:
            return bytes([int(token[3:5], 16)])
        return token.replace(WORD_START, " ").encode()

    def piece(self, token_id: int) -> bytes:
        """Bytes of one token of a byte-level vocabulary in a text; special tokens have none."""
        found = self._pieces.get(token_id)
        if found is None:
            token = self.tokenizer.id_to_token(token_id)
            if token is None:
                return b""
            found = b"" if token_id in self.special_ids else byte_level_bytes(token)
            self._pieces[token_id] = found
        return found

    def pieces(self, token_ids: Sequence[int]) -> bytes:
        """As `piece` of one after the other."""
        try:
            return b"".join([self._pieces[token_id] for token_id in token_ids])
        except KeyError:
            return b"".join(map(self.piece, token_ids))

    def token_texts(self, token_ids: Sequence[int]) -> tuple[str, ...]:
        """Text of each token by itself; a part of a character reads as U+FFFD."""
        return tuple(self.token_bytes(token).decode(errors="replace") for token in token_ids)

    def detokenizer(self, prompt_ids: Sequence[int]) -> Detokenizer:
        """A detokenizer for the completion of a prompt."""
        if self.byte_level:
            return ByteDetokenizer(self)
        return WindowDetokenizer(self, prompt_ids)


class Detokenizer(Protocol):
    """Turns tokens into text as they come."""

    def push(self, token_id: int) -> str:
        """Text that became certain with this token; "" while a character is incomplete."""
        ...

    def push_all(self, token_ids: Sequence[int]) -> str:
        """As `push` of one after the other."""
        ...

    def flush(self) -> str:
        """The rest at the end of the stream; an incomplete character becomes U+FFFD."""
        ...


class ByteDetokenizer:
    """For byte-level vocabularies: a token is bytes, and bytes become UTF-8 as they fill up."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Text that became certain with this token."""
        return self._decoder.decode(self._vocabulary.piece(token_id))

    def push_all(self, token_ids: Sequence[int]) -> str:
        """As `push` of one after the other."""
        return self._decoder.decode(self._vocabulary.pieces(token_ids))

    def flush(self) -> str:
        """The rest at the end of the stream."""
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For every other decoder: decode a short window twice and keep the difference.

    A run of byte tokens is decoded when it ends, for the decoder judges a run as a whole. A window
    that still ends in U+FFFD waits for its character, at most MAX_HELD_TOKENS tokens.
    """

    def __init__(self, vocabulary: Vocabulary, prompt_ids: Sequence[int]) -> None:
        self._vocabulary = vocabulary
        # The prompt's tail stands before the text, or the first word would lose its space.
        self._shown = [
            token_id
            for token_id in prompt_ids[-CONTEXT_TOKENS:]
            if token_id not in vocabulary.special_ids
        ]
        self._held: list[int] = []
        self._num_tries = 0

    def push(self, token_id: int) -> str:
        """Text that became certain with this token."""
        if token_id in self._vocabulary.special_ids:
            return ""
        self._held.append(token_id)
        if token_id in self._vocabulary.byte_ids:
            return ""
        text = self._held_text()
        self._num_tries += 1
        if text.endswith(REPLACEMENT) and self._num_tries < MAX_HELD_TOKENS:
            return ""
        return self._release(text)

    def push_all(self, token_ids: Sequence[int]) -> str:
        """As `push` of one after the other."""
        return "".join(map(self.push, token_ids))

    def flush(self) -> str:
        """The rest at the end of the stream."""
        return self._release(self._held_text()) if self._held else ""

    def _release(self, text: str) -> str:
        self._shown, self._held, self._num_tries = self._held, [], 0
        return text

    def _held_text(self) -> str:
        decode = self._vocabulary.tokenizer.decode
        shown = decode(self._shown, skip_special_tokens=True)
        return decode(self._shown + self._held, skip_special_tokens=True)[len(shown) :]


class StopMatcher:
    """Finds the first stop string in a text that comes in pieces (Knuth, Morris and Pratt).

    The match that ends first wins, and of those that end together the longest. Text that may be
    the beginning of a stop string is held back. A character costs amortised constant time for each
    stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(sorted(stops, key=len, reverse=True))
        self._fallbacks = tuple(_fallbacks(stop) for stop in self._stops)
        self._matched = [0] * len(self._stops)
        self._held = ""

    @property
    def idle(self) -> bool:
        """Whether there is nothing to find."""
        return not self._stops

    def push(self, text: str) -> tuple[str, str]:
        """Text free to show, and the stop string found or ""; after a match nothing may follow."""
        if not self._stops:
            return text, ""
        whole = self._held + text
        for index, character in enumerate(text, start=len(self._held) + 1):
            stop = self._advance(character)
            if stop:
                return whole[: index - len(stop)], stop
        kept = len(whole) - max(self._matched)
        self._held = whole[kept:]
        return whole[:kept], ""

    def flush(self) -> str:
        """Text held back for a match that never came."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> str:
        found = ""
        for which, stop in enumerate(self._stops):
            matched = self._matched[which]
            while matched and stop[matched] != character:
                matched = self._fallbacks[which][matched - 1]
            matched += stop[matched] == character
            if matched == len(stop):
                found = found or stop
                matched = self._fallbacks[which][matched - 1]
            self._matched[which] = matched
        return found


def _fallbacks(stop: str) -> tuple[int, ...]:
    """For each prefix of `stop`, the length of its longest proper suffix that is a prefix too."""
    table = [0] * len(stop)
    matched = 0
    for index in range(1, len(stop)):
        while matched and stop[matched] != stop[index]:
            matched = table[matched - 1]
        matched += stop[matched] == stop[index]
        table[index] = matched
    return tuple(table)


def byte_level_bytes(token: str) -> bytes:
    """What a token of a byte-level vocabulary stands for."""
    byte_of = _byte_alphabet()
    try:
        return bytes([byte_of[character] for character in token])
    except KeyError:
        # An added token that is plain text rather than letters of the byte alphabet.
        return token.encode()


@cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others follow U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + index): byte for index, byte in enumerate(others)}
