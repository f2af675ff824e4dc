"""Grammars over tokens: which tokens may follow an output so that it can still match.

    GrammarCompiler   from a Grammar to a CompiledGrammar, within bounds; keeps the last few
    CompiledGrammar   may be shared; `start` gives each session a state of its own
    GrammarState      the tokens allowed after any output, as a bit mask
    GrammarChecker    the compiler for an event loop: threads of its own, bounds on time and queue

The work is llguidance's, which computes masks lazily and counts its steps ("fuel"), so that neither
a large grammar nor an awkward one runs away. This module knows nothing of logits, tensors, trees or
sessions, and it is not for the SDK, which does without llguidance.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from specinfer.errors import (
    InternalError,
    InvalidRequest,
    Mismatch,
    ResourceExhausted,
    SpecinferError,
)
from specinfer.grammar_bounds import check_grammar, refusal, shorten
from specinfer.messages import Grammar

# At most one space between the tokens of JSON: a model that likes blanks still comes to an end.
_WHITESPACE = r"\x20?"
# What the library calls a place where the text can neither go on nor end.
_NOTHING_FOLLOWS = "NoExtension"
# And what it says of a token that the text cannot go on with.
_NO_MATCH = "satisfy the grammar"

log = logging.getLogger(__name__)

Value = TypeVar("Value")


class _TooMuchWork(InvalidRequest):
    """The grammar needs more work or more states than it may have."""


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
        try:
            return self._mask_after(tokens)
        except _TooMuchWork:
            # The lexer's states are those of all sessions of the grammar together, so others may
            # have used them up: once more, with new ones.
            self.compiled.renew(self._edition)
            self._restart()
            return self._mask_after(tokens)

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

    def _too_much_work(self) -> _TooMuchWork:
        reason, num_tokens = shorten(self._matcher.get_error()), len(self._consumed)
        self._restart()
        return _TooMuchWork(
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
    """

    def __init__(
        self,
        grammar: Grammar,
        make_matcher: Callable[[], LLMatcher],
        vocab_size: int,
        end_token_ids: frozenset[int],
    ) -> None:
        """Compile it; raises as `make_matcher` does."""
        self.grammar = grammar
        self.vocab_size = vocab_size
        self.end_token_ids = end_token_ids
        self._make_matcher = make_matcher
        self._lock = threading.Lock()
        self._matcher = make_matcher()
        self._edition = 0

    def start(self) -> GrammarState:
        """A state before the first token of output."""
        return GrammarState(self)

    def new_matcher(self) -> tuple[int, LLMatcher]:
        """A matcher before the first token, and its edition.

        What matchers of one edition compute lazily they share, and its bound too.
        """
        with self._lock:
            return self._edition, self._matcher.deep_copy()

    def renew(self, edition: int) -> None:
        """Let new matchers share nothing with those of an edition; takes a compilation's time."""
        with self._lock:
            if edition == self._edition:
                self._matcher = self._make_matcher()
                self._edition += 1


class GrammarCompiler:
    """Compiles grammars against one tokenizer; methods may be called from any thread.

    Args:
        tokenizer_json: bytes of tokenizer.json; it is read when the first grammar comes.
        vocab_size: tokens that the model knows.
        end_token_ids: tokens that end a text.
        max_kept: compiled grammars kept, the least recently used one leaves first.
        max_states: states of the lexer that the sessions of a grammar compute, at some 1.5 kB each,
            before they begin anew.
    """

    def __init__(
        self,
        tokenizer_json: bytes,
        vocab_size: int,
        end_token_ids: Sequence[int],
        *,
        max_kept: int = 32,
        max_states: int = 25_000,
    ) -> None:
        self._tokenizer_json = tokenizer_json
        self._vocab_size = vocab_size
        self._end_token_ids = frozenset(end_token_ids)
        self._max_kept = max_kept
        self._lock = threading.Lock()
        self._tokenizer_lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._kept: OrderedDict[Grammar, CompiledGrammar] = OrderedDict()
        self._limits = LLParserLimits(max_lexer_states=max_states, verbose_errors=False)

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """The compiled form of a grammar; takes milliseconds, or some hundred for the first one.

        Raises:
            InvalidRequest: the grammar is too large, malformed, cannot be met, or asks for what is
                not supported; `field` is "grammar".
            Mismatch: the tokenizer cannot be used.
        """
        with self._lock:
            if grammar in self._kept:
                self._kept.move_to_end(grammar)
                return self._kept[grammar]
        check_grammar(grammar)
        compiled = CompiledGrammar(
            grammar, lambda: self._make_matcher(grammar), self._vocab_size, self._end_token_ids
        )
        compiled.start().mask_after(())  # a grammar that nothing can match is refused here
        with self._lock:
            self._kept[grammar] = compiled
            while len(self._kept) > self._max_kept:
                self._kept.popitem(last=False)
        return compiled

    def _make_matcher(self, grammar: Grammar) -> LLMatcher:
        tokenizer = self._load_tokenizer()
        try:
            matcher = LLMatcher(tokenizer, _source(grammar), log_level=0, limits=self._limits)
        except ValueError as error:
            raise refusal(str(error)) from error
        if matcher.is_error():
            raise refusal(matcher.get_error())
        return matcher

    def _load_tokenizer(self) -> LLTokenizer:
        with self._tokenizer_lock:
            if self._tokenizer is None:
                ends = sorted(self._end_token_ids)
                if not ends or ends[-1] >= self._vocab_size:
                    raise Mismatch(f"grammars need end tokens of the vocabulary, got {ends}")
                try:
                    self._tokenizer = LLTokenizer(
                        self._tokenizer_json.decode(), n_vocab=self._vocab_size, eos_token=ends
                    )
                except (ValueError, RuntimeError, OverflowError) as error:
                    message = f"grammars cannot use this tokenizer: {shorten(str(error))}"
                    raise Mismatch(message) from error
            return self._tokenizer


class GrammarChecker:
    """Compiles grammars for an event loop, on threads of its own.

    Args:
        compiler: does the work.
        max_seconds: longest time that a grammar may take, waiting included.
        max_waiting: most grammars at work or waiting.
        num_threads: grammars compiled at once.
    """

    def __init__(
        self,
        compiler: GrammarCompiler,
        *,
        max_seconds: float = 5.0,
        max_waiting: int = 256,
        num_threads: int = 2,
    ) -> None:
        self._compiler = compiler
        self._max_seconds = max_seconds
        self._max_waiting = max_waiting
        self._num_waiting = 0
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="grammar")

    async def check(self, grammar: Grammar) -> None:
        """Raise unless the grammar can be used.

        Raises:
            InvalidRequest: as `GrammarCompiler.compile` says, or it takes too long to compile.
            ResourceExhausted: too many grammars wait to be compiled.
            Mismatch: the tokenizer cannot be used.
        """
        await self._run(lambda: self._compiler.compile(grammar))

    async def begin(self, grammar: Grammar, output_ids: Sequence[int] = ()) -> GrammarState:
        """A session's state after the output that it has already.

        Raises as `check` does, and InvalidRequest when the output does not match.
        """

        def start() -> GrammarState:
            state = self._compiler.compile(grammar).start()
            state.mask_after(output_ids)
            return state

        return await self._run(start)

    def close(self) -> None:
        """Let the threads end."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self, work: Callable[[], Value]) -> Value:
        if self._num_waiting >= self._max_waiting:
            raise ResourceExhausted("too many grammars wait to be compiled", retry_after=1.0)
        started = threading.Event()

        def run() -> Value:
            started.set()
            return work()

        self._num_waiting += 1
        try:
            async with asyncio.timeout(self._max_seconds):
                return await asyncio.get_running_loop().run_in_executor(self._threads, run)
        except TimeoutError as error:
            raise self._late(started.is_set()) from error
        except SpecinferError:
            raise
        except Exception as error:  # whoever asked gets an answer
            log.exception("a grammar failed to compile")
            raise InternalError(f"the grammar failed to compile: {shorten(str(error))}") from error
        finally:
            self._num_waiting -= 1

    def _late(self, started: bool) -> SpecinferError:
        if not started:
            return ResourceExhausted("too many grammars wait to be compiled", retry_after=1.0)
        return InvalidRequest(
            f"the grammar takes more than {self._max_seconds:g} s to compile", field="grammar"
        )


def _source(grammar: Grammar) -> str:
    """The grammar in llguidance's form; raises ValueError for a schema that it does not take."""
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    if grammar.kind == "lark":
        return LLMatcher.grammar_from_lark(grammar.text)
    if grammar.kind == "choice":
        choices = (json.dumps(text, ensure_ascii=False) for text in json.loads(grammar.text))
        return LLMatcher.grammar_from_lark("start: " + " | ".join(choices))
    return LLMatcher.grammar_from_json_schema(
        grammar.text or '{"type":"object"}',
        overrides={
            "item_separator": ",",
            "key_separator": ":",
            "whitespace_pattern": _WHITESPACE,
            "coerce_one_of": False,
            "lenient": False,
        },
    )


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
