"""Grammars over vocabularies of a few letters, and what they allow found out another way.

Knows tokens and texts; no tensors and nothing of sessions.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence

from specinfer.grammar import CompiledGrammar, GrammarCompiler, GrammarState
from specinfer.messages import Grammar
from tests.kit.tokenizers import letters_tokenizer

END = "<|end|>"
LETTERS = (END, "a", "b", "ab", "<|stop|>")
END_TOKEN_IDS = (0, 4)


class HeldCompiler(GrammarCompiler):
    """Compiles nothing before it is let go."""

    def __init__(self, tokens: Sequence[str] = LETTERS) -> None:
        super().__init__(letters_tokenizer(*tokens).to_str().encode(), len(tokens), (0,))
        self.gate = threading.Event()

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        assert self.gate.wait(20)
        return super().compile(grammar)


def letters_compiler(tokens: Sequence[str] = LETTERS, vocab_size: int = 0) -> GrammarCompiler:
    """A compiler over a vocabulary of these tokens, and maybe some without a text."""
    ends = [number for number, token in enumerate(tokens) if token.startswith("<|")]
    content = letters_tokenizer(*tokens).to_str().encode()
    return GrammarCompiler(content, vocab_size or len(tokens), ends)


def regex_state(pattern: str, tokens: Sequence[str] = LETTERS) -> GrammarState:
    """A session's state before the first token."""
    return letters_compiler(tokens).compile(Grammar("regex", pattern)).start()


def token_ids_of(mask: bytes | None) -> list[int] | None:
    """The tokens in a bit mask."""
    if mask is None:
        return None
    return [index for index in range(8 * len(mask)) if mask[index >> 3] >> (index & 7) & 1]


def matches_to_the_end(pattern: str, token_ids: Sequence[int]) -> bool:
    """Whether tokens up to their first end token spell a match, as Python's `re` sees it."""
    ends = [index for index, token_id in enumerate(token_ids) if token_id in END_TOKEN_IDS]
    text = "".join(LETTERS[token_id] for token_id in token_ids[: ends[0]]) if ends else None
    return text is not None and re.fullmatch(pattern, text) is not None
