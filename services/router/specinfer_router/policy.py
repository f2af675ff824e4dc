"""How large a tree to ask for: the one decision about speculation, and it never changes a token.

`StaticShape` asks for the same tree in every round. `AdaptiveShape` asks for the one that promises
most tokens a second. This module knows nothing of workers, tokens or the wire.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from operator import mul
from typing import Protocol

from specinfer.messages import RoundFacts, ShapeQuery, SpeculationOptions, StepCost
from specinfer.step_curve import StepCurve

PROBE_ROUNDS = 16
PROBE_WEIGHT = 0.5
PLAIN_WEIGHT = 0.05


@dataclass
class RoundHistory:
    """What a session's rounds so far tell about the next one.

    Attributes:
        acceptance: moving average of how often a guess was confirmed when its parent was.
        draft_seconds: moving average of a propose's round trip for each level of the tree.
        num_idle_rounds: rounds without a guess since the last one with a guess.
    """

    acceptance: float = 0.7
    draft_seconds: float = 0.0
    num_idle_rounds: int = 0
    weight: float = 0.15

    def observe(self, *, depth: int, num_accepted: int, seconds: float | None) -> None:
        """Take in a round whose tree was `depth` levels deep and took `seconds` to get.

        None says that the time is no measure of a level: the drafter read a prompt first.
        """
        if depth == 0:
            self.num_idle_rounds += 1
            return
        was_idle, self.num_idle_rounds = self.num_idle_rounds > 0, 0
        for trial in range(min(depth, num_accepted + 1)):
            self.acceptance += self.weight * ((trial < num_accepted) - self.acceptance)
        if seconds is None:
            return
        # What was known before a pause is old: one slow answer must not silence a drafter for long.
        weight = PROBE_WEIGHT if was_idle else self.weight
        weight = weight if self.draft_seconds else 1.0
        self.draft_seconds += weight * (seconds / depth - self.draft_seconds)


class TreeShapePolicy(Protocol):
    """Chooses a tree's shape for one round."""

    def plan(
        self, options: SpeculationOptions, history: RoundHistory, num_sessions: int
    ) -> ShapeQuery:
        """The shape to ask for when `num_sessions` share the verify worker."""
        ...


@dataclass(frozen=True)
class StaticShape:
    """The request's shape, or else the cluster's: widths or best-first."""

    default: ShapeQuery

    def plan(
        self, options: SpeculationOptions, history: RoundHistory, num_sessions: int
    ) -> ShapeQuery:
        """The same shape in every round."""
        return requested(options, self.default)


@dataclass(frozen=True)
class AdaptiveShape:
    """The depth that promises most tokens a second (after SmartSpec, arXiv 2406.14066).

    With acceptance a, a tree of depth k yields tau(k) = (1 - a^(k+1)) / (1 - a) tokens a round. Its
    n(k) nodes are as many as `default` allows and cost no more than `slack` over k nodes, for a
    pass is nearly free up to some number of rows. With B sessions in a pass and measured costs T,

        goodput(k) = tau(k) / (T(B * (n(k) + 1)) + k * draft_seconds),    goodput(0) = 1 / T(B)

    Speculation has to win by `margin`. While it does not, every PROBE_ROUNDS-th round speculates
    all the same, for acceptance is unknown without a guess.
    """

    default: ShapeQuery
    costs: StepCurve
    slack: float = 0.05
    margin: float = 0.1

    def plan(
        self, options: SpeculationOptions, history: RoundHistory, num_sessions: int
    ) -> ShapeQuery:
        """The depth and nodes of highest goodput, possibly none."""
        asked = requested(options, self.default)
        if asked.widths or asked.max_nodes == 0:
            return asked
        batch = max(1, num_sessions)
        best, best_goodput = replace(asked, max_nodes=0), (1 + self.margin) / self.costs.at(batch)
        tokens, chance = 1.0, 1.0
        for depth in range(1, min(asked.max_depth, asked.max_nodes) + 1):
            chance *= history.acceptance
            tokens += chance
            nodes = self._free_nodes(depth, asked.max_nodes, batch)
            seconds = self.costs.at(batch * (nodes + 1)) + depth * history.draft_seconds
            if tokens / seconds > best_goodput:
                best = replace(asked, max_nodes=nodes, max_depth=depth)
                best_goodput = tokens / seconds
        probing = best.max_nodes == 0 and history.num_idle_rounds >= PROBE_ROUNDS
        return replace(asked, max_nodes=1, max_depth=1) if probing else best

    def _free_nodes(self, depth: int, max_nodes: int, batch: int) -> int:
        allowed = self.costs.at(batch * (depth + 1)) * (1 + self.slack)
        nodes = depth
        while nodes < max_nodes and self.costs.at(batch * (nodes + 2)) <= allowed:
            nodes += 1
        return nodes


class PlainSpeed:
    """What one token costs without guesses: a moving average over rounds of the root alone.

    Until there was one it is the measured step of a single row.
    """

    def __init__(self, costs: Sequence[StepCost]) -> None:
        """Begin with what the target measured of itself."""
        self._seconds = StepCurve(costs).at(1) if costs else 0.0

    @property
    def seconds(self) -> float:
        """Seconds of a round without guesses; 0 while nothing is known."""
        return self._seconds

    def observe(self, facts: RoundFacts) -> None:
        """Take in a round that is not a session's first, which computes the prompt."""
        if facts.num_draft_tokens:
            return
        seconds = facts.verify_seconds + facts.queue_seconds + facts.router_seconds
        seconds += facts.network_seconds
        weight = PLAIN_WEIGHT if self._seconds else 1.0
        self._seconds += weight * (seconds - self._seconds)


def requested(options: SpeculationOptions, default: ShapeQuery) -> ShapeQuery:
    """What a request asks for, with the cluster's shape where it says nothing."""
    if not options.enabled:
        return replace(default, max_nodes=0)
    widths = options.widths or default.widths
    shape = default
    if options.widths:
        shape = replace(shape, max_nodes=num_nodes(widths), max_depth=len(widths), widths=widths)
    if options.max_nodes is not None:
        shape = replace(shape, max_nodes=options.max_nodes)
    if options.max_depth is not None:
        shape = replace(shape, max_depth=options.max_depth)
    return shape


def clip(shape: ShapeQuery, *, max_nodes: int, max_depth: int) -> ShapeQuery:
    """The shape within a round's room; widths lose whole levels from the bottom."""
    max_nodes = max(0, min(shape.max_nodes, max_nodes))
    max_depth = max(0, min(shape.max_depth, max_depth, max_nodes))
    if max_depth == 0:
        return replace(shape, max_nodes=0, max_depth=0, widths=())
    widths = shape.widths[:max_depth]
    while num_nodes(widths) > max_nodes:
        widths = widths[:-1]
    if shape.widths and not widths:
        return replace(shape, max_nodes=0, max_depth=0, widths=())
    return replace(shape, max_nodes=max_nodes, max_depth=max_depth, widths=widths)


def num_nodes(widths: Sequence[int]) -> int:
    """Nodes below the root of SpecInfer's <k1,...,km> expansion."""
    return sum(accumulate(widths, mul))
