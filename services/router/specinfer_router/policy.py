"""How large a tree to ask for: the one decision about speculation, and it never changes a token.

`StaticShape` asks for the same tree in every round; `specinfer_router.goodput` has the policy that
asks for the one that promises most tokens a second. This module knows nothing of workers, tokens or
the wire.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from operator import mul
from typing import Protocol

from specinfer.messages import RoundFacts, ShapeQuery, SpeculationOptions, StepCost
from specinfer.step_curve import StepCurve
from specinfer_router.calibration import Calibration
from specinfer_router.round_history import RoundHistory

PLAIN_WEIGHT = 0.05
# Why a round has no guess, where none of the session's has any.
LASTING_REASONS = frozenset({"disabled", "no_drafter"})


class TreeShapePolicy(Protocol):
    """Chooses a tree's shape for one round."""

    def history(self, temperature: float, context_len: int) -> RoundHistory:
        """What to keep of a new session of `context_len` tokens that draws at `temperature`."""
        ...

    def plan(
        self,
        options: SpeculationOptions,
        history: RoundHistory,
        num_sessions: int,
        of_late: int = 0,
    ) -> ShapeQuery:
        """The shape to ask for when `num_sessions` share the verify worker; 0: not known yet.

        A moment ago there were `of_late`, if that is more, or in a moment, where it is not known.
        """
        ...

    def never_guesses(self, options: SpeculationOptions) -> bool:
        """Whether no round of such a request will have guesses, whatever is learned."""
        ...


@dataclass(frozen=True)
class StaticShape:
    """The request's shape, or else the cluster's: widths or best-first."""

    default: ShapeQuery
    calibration: Calibration = field(
        default_factory=lambda: Calibration(StepCurve(())), compare=False
    )

    def history(self, temperature: float, context_len: int) -> RoundHistory:
        """What is kept here changes no shape."""
        return RoundHistory(self.calibration, temperature=temperature, context_len=context_len)

    def plan(
        self,
        options: SpeculationOptions,
        history: RoundHistory,
        num_sessions: int,
        of_late: int = 0,
    ) -> ShapeQuery:
        """The same shape in every round."""
        return requested(options, self.default)

    def never_guesses(self, options: SpeculationOptions) -> bool:
        """Whether that shape is the root alone."""
        return is_root_alone(requested(options, self.default))


class PlainSpeed:
    """What one token costs without guesses: a moving average over rounds of the root alone.

    Until there was one it is the measured step of a single row. A round of one token between others
    with guesses does not count: it waits for the wire, as decoding without guesses hardly does.
    """

    def __init__(self, costs: Sequence[StepCost]) -> None:
        """Begin with what the target measured of itself."""
        self._seconds = StepCurve(costs).at(1) if costs else 0.0

    @property
    def seconds(self) -> float:
        """Seconds of a token without guesses; 0 while nothing is known."""
        return self._seconds

    def observe(self, facts: RoundFacts, num_tokens: int) -> None:
        """Take in a round that decoded so many tokens, all kept, and no prompt."""
        between = num_tokens == 1 and facts.root_only_reason not in LASTING_REASONS
        if facts.num_draft_tokens or not num_tokens or between:
            return
        seconds = facts.verify_seconds + facts.queue_seconds + facts.router_seconds
        seconds += facts.network_seconds
        weight = PLAIN_WEIGHT if self._seconds else 1.0
        self._seconds += weight * (seconds / num_tokens - self._seconds)


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


def is_root_alone(shape: ShapeQuery) -> bool:
    """Whether a shape has no room for a guess."""
    return shape.max_nodes == 0 or shape.max_depth == 0


def within(options: SpeculationOptions, max_tree_nodes: int) -> SpeculationOptions:
    """The options with no larger tree than there may be, its root included in `max_tree_nodes`.

    Before a choice is made, for what takes longest to choose among are trees that nobody grows.
    """
    if options.max_nodes is None or options.max_nodes < max_tree_nodes:
        return options
    return replace(options, max_nodes=max_tree_nodes - 1)


def clip(shape: ShapeQuery, *, max_nodes: int, max_depth: int) -> ShapeQuery:
    """The shape within a round's room; widths lose whole levels from the bottom."""
    fits = 0 < shape.max_depth <= shape.max_nodes <= max_nodes and shape.max_depth <= max_depth
    if fits and not shape.widths:
        return shape
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
