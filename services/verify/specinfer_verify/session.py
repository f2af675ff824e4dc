"""One session as the verify tier sees it, and the step that waits for a pass.

Plain state, owned by the engine's thread. This module knows nothing of tensors, passes or gRPC.
"""

from __future__ import annotations

import math
from concurrent.futures import Future
from dataclasses import dataclass, field

from specinfer.errors import StaleEpoch
from specinfer.grammar import GrammarState
from specinfer.messages import TokenLogprob, VerifyResult
from specinfer.sampling import SamplingParams
from specinfer.tree import TokenTree
from specinfer_engine.sequence import SequenceState

# How many of its usual deviations a session may come later than usual before nobody waits for it.
PATIENCE = 2.0
SLACK_SECONDS = 0.001
ABSENCE_WEIGHT = 0.5


@dataclass(frozen=True)
class StepItem:
    """A step as it came.

    Attributes:
        session_id, epoch, owner: of whom, and of which state of it.
        tree: what is to be checked.
        num_tokens: most plain tokens to decode before the answer.
        arrival: when it came, in seconds of the engine's clock.
    """

    session_id: str
    epoch: int
    owner: int
    tree: TokenTree
    num_tokens: int
    arrival: float


@dataclass
class PendingStep:
    """A tree that waits for its pass.

    Attributes:
        given: the tree as it came, to know a repeated item by.
        tree: what is left of it within the model's length and the pool; after a plain pass of
            several the root that it led to.
        kept: for each node of `tree`, its index in `given`.
        arrival: when the item came, in seconds of the engine's clock.
        futures: who waits; a repeated item adds one.
        num_tokens: tokens that are still to be decoded before the answer, one a pass.
        compute_seconds: time in passes that carried the session since it came.
        partial: what came of its passes so far, or None.
        ready: since when it waits for its next pass.
    """

    given: TokenTree
    tree: TokenTree
    kept: tuple[int, ...]
    arrival: float
    futures: list[Future[VerifyResult]]
    num_tokens: int = 1
    compute_seconds: float = 0.0
    partial: VerifyResult | None = None
    ready: float = field(init=False)

    def __post_init__(self) -> None:
        self.ready = self.arrival

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Decoded since it came, and told nobody."""
        return () if self.partial is None else self.partial.token_ids

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        """Theirs."""
        return () if self.partial is None else self.partial.logprobs

    def repeats(self, item: StepItem) -> bool:
        """Whether an item asks for the same."""
        return item.tree == self.given and item.num_tokens == self.num_tokens + len(self.token_ids)

    @classmethod
    def unasked(cls, root: TokenTree, now: float) -> PendingStep:
        """A step that nobody waits for."""
        return cls(root, root, (0,), now, [])

    def go_on(self, result: VerifyResult, now: float) -> None:
        """Take the token of a plain pass in, and wait for the next pass, from that token."""
        self.num_tokens -= 1
        self.compute_seconds = result.compute_seconds
        self.partial, self.ready = result, now
        self.tree = TokenTree.root_only(result.token_ids[-1])

    def begin_again(self) -> None:
        """From the root that was given."""
        self.num_tokens += len(self.token_ids)
        self.tree, self.partial = self.given, None


@dataclass
class Absence:
    """How long a session is away between an answer and its next step.

    Attributes:
        answered: when it was answered last, or None before the first time.
        seconds: moving average of its absences; infinite until there was one.
        num_rows: rows of the step that was answered.
        deviation: moving average of how far absences are from the usual.
    """

    answered: float | None = None
    seconds: float = math.inf
    num_rows: int = 0
    deviation: float = 0.0

    def leave(self, now: float, num_rows: int) -> None:
        """It was answered."""
        self.answered, self.num_rows = now, num_rows

    def come_back(self, now: float) -> None:
        """Its next step is here."""
        if self.answered is None:
            return
        away = max(0.0, now - self.answered)
        if not math.isfinite(self.seconds):
            self.seconds, self.deviation = away, away / 2
            return
        error = away - self.seconds
        self.deviation += ABSENCE_WEIGHT * (abs(error) - self.deviation)
        self.seconds += ABSENCE_WEIGHT * error

    @property
    def due(self) -> float:
        """When it is expected back."""
        return math.inf if self.answered is None else self.answered + self.seconds

    @property
    def latest(self) -> float:
        """Until when it is waited for."""
        return self.due + PATIENCE * self.deviation + SLACK_SECONDS


@dataclass
class Session:
    """One session's place in the worker.

    Attributes:
        session_id: the router's name for it.
        age: order of opening; the highest number is the youngest session.
        epoch: commits so far.
        sampling: how tokens are drawn.
        num_prompt_tokens: tokens of the prompt; what follows is output.
        num_logprobs: most probable tokens to report, or None.
        state: tokens and where their keys and values lie.
        last_active: when the last item came or was answered.
        grammar: where the session stands in what its output has to match, or None.
        prefill_eagerly: whether the prompt is computed before a step asks for it; a preempted
            session waits for its next step instead, so that idle sessions never fight for blocks.
        pending: the step that waits, or None.
        last_result: answer to the last step, for a router that asks again.
        num_cached_tokens: prompt tokens found in the prefix cache; None until the first look.
        owner: how often the session was claimed when it was opened.
        stream: the stream that opened it last, or None.
        answered: whether a step was answered since it holds blocks.
        absence: how long it is away between its steps.
        num_plain_steps: steps in a row that asked for the root alone.
        ahead: the result of such a step that was not asked for yet, whose token `state` has
            already, or None.
    """

    session_id: str
    age: int
    epoch: int
    sampling: SamplingParams
    num_prompt_tokens: int
    num_logprobs: int | None
    state: SequenceState
    last_active: float
    grammar: GrammarState | None = None
    prefill_eagerly: bool = True
    pending: PendingStep | None = None
    last_result: VerifyResult | None = None
    num_cached_tokens: int | None = None
    owner: int = 0
    stream: object | None = None
    answered: bool = False
    absence: Absence = field(default_factory=Absence)
    num_plain_steps: int = 0
    ahead: VerifyResult | None = None

    @property
    def wants_prefill(self) -> bool:
        """Whether tokens before its root are to be computed now."""
        return self.num_missing > 0 and (self.pending is not None or self.prefill_eagerly)

    @property
    def base_len(self) -> int:
        """Tokens before the root."""
        return len(self.state) - 1

    @property
    def num_missing(self) -> int:
        """Tokens before the root that have no keys and values yet."""
        return self.base_len - self.state.num_cached

    def told(self, result: VerifyResult, num_rows: int, now: float) -> None:
        """Its step, of so many rows, is answered."""
        self.epoch, self.last_result, self.last_active = result.epoch, result, now
        self.pending, self.answered = None, True
        self.num_plain_steps = self.num_plain_steps + 1 if num_rows == 1 else 0
        self.absence.leave(now, num_rows)

    def take_ahead(self, epoch: int, tree: TokenTree) -> VerifyResult | None:
        """The result that is there before its step came; any other step takes it back."""
        if self.ahead is None:
            return None
        result, root = self.ahead, self.state.token_ids[-2]
        if (epoch, *tree.token_ids) != (self.epoch, root):
            self.take_back()
            return None
        self.ahead = None
        return result

    @property
    def num_unanswered(self) -> int:
        """Tokens at the end of `state` that nobody was told yet."""
        told_of = self.ahead or self.pending
        return 0 if told_of is None else len(told_of.token_ids)

    def take_back(self) -> None:
        """Forget the tokens that nobody was told; a step that waits begins again."""
        if unanswered := self.num_unanswered:
            root = self.state.token_ids[-1 - unanswered]
            self.state.truncate(len(self.state) - 1 - unanswered)
            self.state.append((root,))
            self.ahead = None
            if self.pending is not None:
                self.pending.begin_again()

    def repeats(
        self,
        epoch: int,
        token_ids: tuple[int, ...],
        sampling: SamplingParams,
        num_prompt: int,
        num_logprobs: int | None,
        grammar: GrammarState | None,
    ) -> bool:
        """Whether an open repeats what is known; raises StaleEpoch when it is behind it."""
        if epoch < self.epoch:
            raise StaleEpoch(f"session {self.session_id} is at epoch {self.epoch}, not {epoch}")
        same_tokens = epoch == self.epoch and self.state.token_ids == list(token_ids)
        same_answers = self.num_prompt_tokens == num_prompt and self.num_logprobs == num_logprobs
        known_grammar = None if self.grammar is None else self.grammar.grammar
        same_grammar = known_grammar == (None if grammar is None else grammar.grammar)
        return same_tokens and self.sampling == sampling and same_answers and same_grammar


def fit_tree(tree: TokenTree, *, max_depth: int, max_nodes: int) -> tuple[TokenTree, list[int]]:
    """The part of a tree within a depth and a number of nodes, and the kept nodes' old indices.

    Under MATCH a smaller tree ends the walk sooner and changes no token.
    """
    kept = [node for node, depth in enumerate(tree.depths) if depth <= max_depth][:max_nodes]
    if len(kept) == len(tree):
        return tree, kept
    new_index = {-1: -1} | {old: new for new, old in enumerate(kept)}
    return TokenTree(
        tuple(tree.token_ids[node] for node in kept),
        tuple(new_index[tree.parents[node]] for node in kept),
    ), kept
