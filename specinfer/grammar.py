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
import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from llguidance import LLMatcher, LLTokenizer

from specinfer.errors import (
    InternalError,
    InvalidRequest,
    Mismatch,
    ResourceExhausted,
    SpecinferError,
)
from specinfer.grammar_bounds import check_grammar, refusal, shorten
from specinfer.grammar_source import matcher_limits, source_of
from specinfer.grammar_state import CompiledGrammar, GrammarState, TooMuchWork
from specinfer.messages import Grammar

_MAX_REFUSED = 1024
_TRIED_DEPTH = 3

__all__ = ["CompiledGrammar", "GrammarChecker", "GrammarCompiler", "GrammarState"]

log = logging.getLogger(__name__)

Value = TypeVar("Value")


class GrammarCompiler:
    """Compiles grammars against one tokenizer; methods may be called from any thread.

    Args:
        tokenizer_json: bytes of tokenizer.json; it is read when the first grammar comes.
        vocab_size: tokens that the model knows.
        end_token_ids: tokens that end a text.
        max_kept: compiled grammars kept, the least recently used one leaves first; one that has
            used up its states takes some tens of MB.
        max_states: states of the lexer that the sessions of a grammar compute, at some 1.5 kB each,
            before they begin anew.
    """

    def __init__(
        self,
        tokenizer_json: bytes,
        vocab_size: int,
        end_token_ids: Sequence[int],
        *,
        max_kept: int = 8,
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
        self._making: dict[Grammar, Future[CompiledGrammar]] = {}
        self._refused: OrderedDict[bytes, str] = OrderedDict()
        self._max_states = max_states

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """The compiled form of a grammar; takes milliseconds, or some hundred for the first one.

        Raises:
            InvalidRequest: the grammar is too large, malformed, cannot be met, or asks for what is
                not supported; `field` is "grammar".
            Mismatch: the tokenizer cannot be used.
        """
        with self._lock:
            if (reason := self._refused.get(_key(grammar))) is not None:
                raise refusal(reason)
            if grammar in self._kept:
                self._kept.move_to_end(grammar)
                return self._kept[grammar]
            mine = Future[CompiledGrammar]()
            making = self._making.setdefault(grammar, mine)
        if making is not mine:
            return making.result()
        try:
            compiled = self._compile(grammar)
        except BaseException as error:
            mine.set_exception(error)
            raise
        else:
            mine.set_result(compiled)
            return compiled
        finally:
            with self._lock:
                del self._making[grammar]

    def _compile(self, grammar: Grammar) -> CompiledGrammar:
        check_grammar(grammar)
        compiled = CompiledGrammar(
            grammar,
            lambda: self._make_matcher(grammar),
            self._vocab_size,
            self._end_token_ids,
            lambda reason: self._refuse(grammar, reason),
        )
        _try_masks(compiled.start())
        with self._lock:
            self._kept[grammar] = compiled
            while len(self._kept) > self._max_kept:
                self._kept.popitem(last=False)
        return compiled

    def _refuse(self, grammar: Grammar, reason: str) -> None:
        """Compile this grammar no more."""
        with self._lock:
            self._kept.pop(grammar, None)
            self._refused[_key(grammar)] = reason
            while len(self._refused) > _MAX_REFUSED:
                self._refused.popitem(last=False)

    def _make_matcher(self, grammar: Grammar) -> LLMatcher:
        tokenizer = self._load_tokenizer()
        limits = matcher_limits(grammar, self._max_states)
        try:
            matcher = LLMatcher(tokenizer, source_of(grammar), log_level=0, limits=limits)
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
            compiled = self._compiler.compile(grammar)
            compiled.make_spares()
            state = compiled.start()
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


def _try_masks(state: GrammarState) -> None:
    """Raise InvalidRequest when nothing can match or the first masks are too much work."""
    paths: list[tuple[int, ...]] = [()]
    for depth in range(_TRIED_DEPTH):
        known: list[tuple[int, ...]] = []
        for path in paths:
            try:
                mask = state.mask_after(path)
            except TooMuchWork:
                raise
            except InvalidRequest:
                if depth == 0:
                    raise
                continue  # a dead end is the concern of the sessions that come to it
            allowed = [] if mask is None else _tokens_in(mask)
            known += [(*path, allowed[len(allowed) * n // 3]) for n in range(3) if allowed]
        paths = list(dict.fromkeys(known))


def _tokens_in(mask: bytes) -> list[int]:
    return [number for number in range(8 * len(mask)) if mask[number >> 3] >> (number & 7) & 1]


def _key(grammar: Grammar) -> bytes:
    content = f"{grammar.kind}\n{grammar.text}".encode(errors="surrogatepass")
    return hashlib.sha256(content).digest()
