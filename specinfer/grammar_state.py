"""What may follow an output within a compiled grammar, as bit masks, one session at a time.

This module never compiles while a session asks: what it may need anew is made ahead. It knows
nothing of logits, tensors, trees, or of how a grammar's text is read, and is not for the SDK.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from llguidance import LLMatcher

from specinfer.errors import InvalidRequest
from specinfer.grammar_bounds import shorten
from specinfer.messages import Grammar

# What the library calls a place where the text can neither go on nor end.
_NOTHING_FOLLOWS = "NoExtension"
# And what it says of a token that the text cannot go on with.
_NO_MATCH = "satisfy the grammar"
# And of a lexer that has no room left for what it computes lazily.
_STATES_USED_UP = "too many states"
# Copies of a compiled grammar made ahead, where no engine waits: for sessions that go on after one
# edition is used up, and after a session that failed used up the next one for itself.
NUM_SPARES = 2


class TooMuchWork(InvalidRequest):
    """The grammar needs more work than it may have."""


class _StatesUsedUp(TooMuchWork):
    """The lexer's states are used up, by this session or by others of the same grammar."""


class GrammarState:
    """One session's way through a grammar. It belongs to one thread at a time.

    What it answers depends on the output it is asked about and on nothing that was asked before;
    it only goes back and forth from where it stands, so nearby questions are cheap.
    """

    def __init__(self, compiled: CompiledGrammar) -> None:
        self.compiled = compiled
        self._restart()

    @property
    def grammar(self) -> Grammar:
        """What the output has to match."""
        return self.compiled.grammar

    def mask_after(self, output_ids: Sequence[int]) -> bytes | None:
        """The tokens that may follow an output.

        Args:
            output_ids: all tokens after the prompt.

        Returns:
            One bit a token, the lowest bit of the first byte for token 0, in ceil(vocab_size / 8)
            bytes; None after an end token, where nothing is asked for any more. End tokens are
            allowed exactly where the output matches as it is.

        Raises:
            InvalidRequest: the output does not match, nothing may follow it, or the grammar needs
                more work than a token may cost; `field` is "grammar".
        """
        if not self.compiled.end_token_ids.isdisjoint(output_ids):
            return None
        tokens = list(output_ids)
        alone = False
        while True:
            edition = self._edition
            try:
                return self._mask_after(tokens)
            except _StatesUsedUp:
                # Others may have used them up: once more with those of an edition that others have
                # begun, and once more with new ones, if any were made ahead.
                renewed = None if alone else self.compiled.renew(edition)
                if renewed is None:
                    raise
                alone = renewed
                self._restart()
            except TooMuchWork as error:
                self.compiled.on_too_much_work(error.message)
                raise

    def _mask_after(self, output_ids: list[int]) -> bytes:
        self._move_to(output_ids)
        mask = bytearray(self._matcher.compute_bitmask()[: (self.compiled.vocab_size + 7) // 8])
        error = self._matcher.get_error()
        if error and _NOTHING_FOLLOWS not in error:
            raise self._too_much_work()
        accepting = self._matcher.is_accepting()
        for token_id in self.compiled.end_token_ids:
            bit = 1 << (token_id & 7)
            mask[token_id >> 3] = mask[token_id >> 3] & ~bit | (bit if accepting else 0)
        if error or not any(mask):
            raise self._failure("the grammar allows no token")
        return bytes(mask)

    def _move_to(self, output_ids: list[int]) -> None:
        """Let the matcher stand after these tokens, from the last place that agrees with them."""
        agreed = _common_length(self._consumed, output_ids)
        num_back = len(self._consumed) - agreed
        if num_back and not self._matcher.rollback(num_back):
            self._restart()
            agreed = 0
        del self._consumed[agreed:]
        new = output_ids[agreed:]
        if new and not 0 <= min(new) <= max(new) < self.compiled.vocab_size:
            raise self._failure("the output has a token outside the vocabulary")
        num_taken = self._matcher.try_consume_tokens(new)
        self._consumed += new[:num_taken]
        if num_taken < len(new):
            # Only now does the matcher say why it took no more.
            over = _NOTHING_FOLLOWS in self._matcher.stop_reason()
            self._matcher.consume_token(new[num_taken])
            if not over and _NO_MATCH not in self._matcher.get_error():
                raise self._too_much_work()
            raise self._failure(f"the output does not match the grammar at token {new[num_taken]}")
        if self._matcher.is_error():
            raise self._too_much_work()

    def _failure(self, what: str) -> InvalidRequest:
        num_tokens = len(self._consumed)
        self._restart()
        return InvalidRequest(f"{what} after {num_tokens} tokens of output", field="grammar")

    def _too_much_work(self) -> TooMuchWork:
        reason, num_tokens = shorten(self._matcher.get_error()), len(self._consumed)
        self._restart()
        kind = _StatesUsedUp if _STATES_USED_UP in reason else TooMuchWork
        return kind(
            f"the grammar is too much work after {num_tokens} tokens of output: {reason}",
            field="grammar",
        )

    def _restart(self) -> None:
        self._edition, self._matcher = self.compiled.new_matcher()
        self._consumed: list[int] = []


class CompiledGrammar:
    """A grammar over one tokenizer's tokens; what it allows never changes. Threads may share it.

    Attributes:
        grammar: what it was compiled from.
        vocab_size: tokens that the model knows.
        end_token_ids: tokens that end a text.
        on_too_much_work: told why, when a mask took more work than it may.
    """

    def __init__(
        self,
        grammar: Grammar,
        make_matcher: Callable[[], LLMatcher],
        vocab_size: int,
        end_token_ids: frozenset[int],
        on_too_much_work: Callable[[str], None],
    ) -> None:
        """Compile it; raises as `make_matcher` does."""
        self.grammar = grammar
        self.vocab_size = vocab_size
        self.end_token_ids = end_token_ids
        self.on_too_much_work = on_too_much_work
        self._make_matcher = make_matcher
        self._lock = threading.Lock()
        self._matcher = make_matcher()
        self._edition = 0
        self._making_spares = threading.Lock()
        self._spares: list[LLMatcher] = []

    def start(self) -> GrammarState:
        """A state before the first token of output."""
        return GrammarState(self)

    def new_matcher(self) -> tuple[int, LLMatcher]:
        """A matcher before the first token, and its edition.

        What matchers of one edition compute lazily they share, and its bound too.
        """
        with self._lock:
            return self._edition, self._matcher.deep_copy()

    def make_spares(self) -> None:
        """Make editions ahead; takes a compilation's time for each that is missing."""
        with self._making_spares:
            while len(self._spares) < NUM_SPARES:
                self._spares.append(self._make_matcher())

    def renew(self, edition: int) -> bool | None:
        """Let new matchers share nothing with those of an edition; never waits or compiles.

        Returns:
            True when the next edition is all new, False when others have it already, and None when
            there is no other and none was made ahead.
        """
        with self._lock:
            if edition != self._edition:
                return False
            if not self._spares:
                return None
            self._matcher = self._spares.pop()
            self._edition += 1
            return True


def _common_length(first: list[int], second: list[int]) -> int:
    """How many tokens two lists begin with alike."""
    low, high = 0, min(len(first), len(second))
    if first[:high] == second[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if first[:middle] == second[:middle]:
            low = middle
        else:
            high = middle
    return low
