"""What rounds add to a router's metrics: kept as they come, and counted many at a time.

A round changes thirty numbers, and rounds resemble each other: those of a batch that are of one
kind are counted together. Whoever looks at a metric has what is kept counted first, from whatever
thread, so that nothing is ever missing. This module knows nothing of sessions or workers.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from threading import Lock
from typing import TypeVar

from specinfer.messages import RoundFacts
from specinfer.metrics.catalogue import MAX_POSITION, PART, RANK
from specinfer.metrics.instruments import Instruments
from specinfer.metrics.series import Count
from specinfer.telemetry import Span
from specinfer.tree import TokenTree

PREDICTION = "prediction"
# Rounds kept before they are counted.
MAX_KEPT = 64
_POSITIONS = tuple(str(depth) for depth in range(MAX_POSITION + 1))
_MAX_RANK = len(RANK.values)

_Kept = TypeVar("_Kept")


# What is counted of a round's tree, see `RoundCounts.observe_tree`: parents, accepted nodes, nodes
# of the drafter, its name and its worker.
_Guesses = tuple[tuple[int, ...], tuple[int, ...], int, str, str]


class RoundCounts:
    """The metrics that rounds add to."""

    def __init__(self, of: Instruments) -> None:
        """Take them from a process's instruments, and count before those are shown."""
        self._rounds: deque[tuple[RoundFacts, int, dict[str, str] | None]] = deque()
        self._trees: deque[_Guesses] = deque()
        # Held by whoever counts: the loop's thread, or one that looks.
        self._counting = Lock()
        self._num_rejected = 0
        self._take_speculation(of)
        parts = of.histogram("round_seconds")
        self._parts = [parts.of(part) for part in PART.values]
        self._round_seconds = of.histogram("round_duration_seconds").of()
        of.before_shown(self.count)

    def _take_speculation(self, of: Instruments) -> None:
        self._num_drafts = of.counter("spec_decode_num_drafts").of()
        self._num_draft_tokens = of.counter("spec_decode_num_draft_tokens").of()
        self._num_accepted = of.counter("spec_decode_num_accepted_tokens").of()
        accepted = of.counter("spec_decode_num_accepted_tokens_per_pos")
        self._accepted_per_pos = [accepted.of(position) for position in _POSITIONS]
        drafts = of.counter("spec_decode_num_drafts_per_pos")
        self._drafts_per_pos = [drafts.of(position) for position in _POSITIONS]
        self._draft_per_rank = of.counter("spec_decode_num_draft_tokens_per_rank")
        self._accepted_per_rank = of.counter("spec_decode_num_accepted_tokens_per_rank")
        self._drafter_draft = of.counter("drafter_draft_tokens")
        self._drafter_accepted = of.counter("drafter_accepted_tokens")
        self._tree_nodes = of.histogram("tree_nodes").of()
        self._tree_depth = of.histogram("tree_depth").of()
        self._round_tokens = of.histogram("tokens_per_round").of()
        self._root_only = of.counter("root_only_rounds")
        self._generation_tokens = of.counter("generation_tokens").of()

    @property
    def num_rejected(self) -> int:
        """Guesses that were verified and not confirmed."""
        self.count()
        return self._num_rejected

    def observe_round(self, facts: RoundFacts, num_tokens: int, span: Span) -> None:
        """Keep one committed round, which `span` is of."""
        self._rounds.append((facts, num_tokens, exemplar(span)))
        # An exemplar's time is that of its counting.
        if span.traced or len(self._rounds) >= MAX_KEPT:
            self.count()

    def observe_tree(
        self,
        tree: TokenTree,
        accepted: Sequence[int],
        *,
        num_draft_nodes: int,
        drafter: str,
        worker: str,
    ) -> None:
        """Keep a round's guesses, to be counted by rank and by who made them.

        Args:
            tree: what was verified; more than a root.
            accepted: nodes that the target confirmed and the text kept, in order.
            num_draft_nodes: nodes that the drafter brought, the root included; they come first,
                and the rest is of the caller's prediction.
            drafter: name of the drafter's model.
            worker: address of the draft worker.
        """
        self._trees.append((tree.parents, tuple(accepted), num_draft_nodes, drafter, worker))
        if len(self._trees) >= MAX_KEPT:
            self.count()

    def count(self) -> None:
        """Count what is kept; from any thread."""
        with self._counting:
            rounds = _taken(self._rounds)
            if rounds:
                self._count_kinds([(facts, num_tokens) for facts, num_tokens, _ in rounds])
                self._count_seconds([(facts, traced) for facts, _, traced in rounds])
            for guesses, times in Tally(_taken(self._trees)).items():
                self._count_guesses(guesses, times)

    def _count_kinds(self, rounds: Sequence[tuple[RoundFacts, int]]) -> None:
        """Everything but the seconds."""
        kinds = Tally(
            (
                facts.num_draft_tokens,
                facts.num_accepted_tokens,
                facts.draft_depth,
                facts.root_only_reason,
                num_tokens,
            )
            for facts, num_tokens in rounds
        )
        for (num_draft, num_accepted, depth, reason, num_tokens), times in kinds.items():
            if reason:
                self._root_only.of(reason).inc(times)
            if num_draft:
                self._num_drafts.inc(times)
                self._num_draft_tokens.inc(times * num_draft)
                self._tree_nodes.observe(num_draft, times=times)
                self._tree_depth.observe(depth, times=times)
                self._num_rejected += times * (num_draft - num_accepted)
                _count_up_to(self._drafts_per_pos, depth, times)
            if num_accepted:
                self._num_accepted.inc(times * num_accepted)
                _count_up_to(self._accepted_per_pos, num_accepted, times)
            self._round_tokens.observe(num_tokens, times=times)
            self._generation_tokens.inc(times * num_tokens)

    def _count_seconds(self, rounds: Sequence[tuple[RoundFacts, dict[str, str] | None]]) -> None:
        splits = [_split(facts) for facts, _ in rounds]
        for part, spent in zip(self._parts, zip(*splits, strict=True), strict=True):
            part.observe_all(spent)
        for split, (_, traced) in zip(splits, rounds, strict=True):
            self._round_seconds.observe(sum(split), traced)

    def _count_guesses(self, guesses: _Guesses, times: int) -> None:
        parents, accepted, num_draft_nodes, drafter, worker = guesses
        ranks, num_of_rank = _ranks(parents)
        for rank, num_nodes in num_of_rank:
            self._draft_per_rank.of(rank).inc(times * num_nodes)
        for node in accepted:
            self._accepted_per_rank.of(ranks[node]).inc(times)
        num_accepted = sum(node < num_draft_nodes for node in accepted)
        if num_draft_nodes > 1:
            self._drafter_draft.of(drafter, worker).inc(times * (num_draft_nodes - 1))
            self._drafter_accepted.of(drafter, worker).inc(times * num_accepted)
        if len(parents) > num_draft_nodes:
            num_predicted = len(parents) - num_draft_nodes
            self._drafter_draft.of(PREDICTION, "").inc(times * num_predicted)
            num_right = len(accepted) - num_accepted
            self._drafter_accepted.of(PREDICTION, "").inc(times * num_right)


def exemplar(span: Span) -> dict[str, str] | None:
    """What ties an observation to its trace; None where no collector has it."""
    return {"trace_id": span.trace_id} if span.traced else None


@lru_cache(maxsize=256)
def _ranks(parents: tuple[int, ...]) -> tuple[tuple[str, ...], tuple[tuple[str, int], ...]]:
    """The label of each node's place among its siblings, and below the root how many have which.

    Trees are of few shapes, and a round's is nearly always one that was seen before.
    """
    num_before: Tally[int] = Tally()
    ranks = []
    for parent in parents:
        ranks.append(str(min(num_before[parent], _MAX_RANK)))
        num_before[parent] += 1
    return tuple(ranks), tuple(Tally(ranks[1:]).items())


def _taken(kept: deque[_Kept]) -> list[_Kept]:
    """What is kept now, taken out; others may add meanwhile."""
    return [kept.popleft() for _ in range(len(kept))]


def _count_up_to(counters: Sequence[Count], depth: int, times: int) -> None:
    """Count depths 1 to `depth`; those deeper than the last counter count as the deepest."""
    for counter in counters[:depth]:
        counter.inc(times)
    if depth > len(counters):
        counters[-1].inc(times * (depth - len(counters)))


def _split(facts: RoundFacts) -> tuple[float, ...]:
    """A round's seconds in the order of the label `part`."""
    return (
        facts.draft_seconds,
        facts.verify_seconds,
        facts.queue_seconds,
        facts.network_seconds,
        facts.commit_seconds,
        max(0.0, facts.router_seconds - facts.commit_seconds),
    )
