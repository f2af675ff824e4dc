"""Rounds of sessions that share a pass, by a clock of their own: known costs, known acceptance.

A drafter that knows its acceptance by rank and depth grows the best tree within the shape that it
is asked for; the walk draws which child is right. Knows nothing of models, links or real time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from specinfer.messages import ShapeQuery, SpeculationOptions, VerifyResult
from specinfer.step_curve import StepCurve
from specinfer.tree import TokenTree
from specinfer_router.policy import TreeShapePolicy
from specinfer_router.round_history import RoundHistory
from specinfer_router.seats import Checked, Guess

Acceptance = Sequence[Sequence[float]]


@dataclass
class World:
    """What is true of target and drafter, whatever a policy believes.

    Attributes:
        costs: of the target's passes.
        acceptance: P[depth - 1][rank]; the last row stands for deeper levels.
        draft_fixed, draft_level: seconds of a propose and of each of its levels.
        context_len: of every session.
        draft_crowding: how much longer a propose takes for each other one at the same time.
        contention: how much longer a pass takes while others are drafted for, at most.
        gathers: whether a pass waits for who is drafted for; else nobody is held up by others.
        pace: how much longer everything takes in a round, by its number.
    """

    costs: StepCurve
    acceptance: Acceptance
    draft_fixed: float = 0.0005
    draft_level: float = 0.0005
    context_len: int = 100
    draft_crowding: float = 0.0
    contention: float = 1.0
    gathers: bool = False
    pace: Callable[[int], float] = lambda _: 1.0


@dataclass
class Totals:
    """What came of some rounds."""

    num_tokens: int = 0
    num_nodes: int = 0
    num_rounds: int = 0
    seconds: float = 0.0

    @property
    def speed(self) -> float:
        """Tokens a second, of all sessions."""
        return self.num_tokens / self.seconds


class Simulation:
    """Sessions side by side: all propose, one pass checks all, all learn.

    With `in_turn` each session plans its next round as soon as it has learnt, as those of a router
    do, and not when all have.
    """

    def __init__(
        self,
        world: World,
        policy: TreeShapePolicy,
        num_sessions: int,
        seed: int,
        *,
        in_turn: bool = False,
    ) -> None:
        self.world = world
        self._in_turn = in_turn
        self._plans: list[ShapeQuery] = []
        self.last_shapes: list[ShapeQuery] = []
        self._policy = policy
        self._num_rounds = 0
        self._random = random.Random(seed)
        self._histories = [policy.history(0.0, world.context_len) for _ in range(num_sessions)]

    def run(self, num_rounds: int, num_sessions: int | None = None) -> Totals:
        """So many rounds of every session; the policy is told of `num_sessions`."""
        totals = Totals()
        for _ in range(num_rounds):
            self._round(totals, len(self._histories) if num_sessions is None else num_sessions)
        return totals

    def _round(self, totals: Totals, told: int) -> None:
        world, batch = self.world, len(self._histories)
        plans = self._plans or [self._plan(each, told) for each in self._histories]
        self.last_shapes, self._plans = plans, []
        trees = [grow(world.acceptance, shape) for shape in plans]
        num_drafted, pace = sum(len(tree) > 1 for tree in trees), world.pace(self._num_rounds)
        self._num_rounds += 1
        slower = pace * (1.0 + world.draft_crowding * max(0, num_drafted - 1))
        drafts = [slower * self._draft_seconds(tree) for tree in trees]
        draft = max(drafts) if world.gathers else sum(drafts) / batch
        num_rows = sum(map(len, trees))
        verify = pace * world.costs.at(num_rows, world.context_len)
        verify *= 1.0 + (world.contention - 1.0) * num_drafted / batch
        for history, tree, seconds in zip(self._histories, trees, drafts, strict=True):
            totals.num_tokens += 1 + self._learn(history, tree, num_rows, seconds, verify)
            totals.num_nodes += tree.num_draft_tokens
            if self._in_turn:
                self._plans.append(self._plan(history, told))
        totals.num_rounds += 1
        totals.seconds += draft + verify

    def _plan(self, history: RoundHistory, told: int) -> ShapeQuery:
        return self._policy.plan(SpeculationOptions(), history, told)

    def _draft_seconds(self, tree: TokenTree) -> float:
        world = self.world
        depth = tree.max_depth
        return world.draft_fixed + depth * world.draft_level if depth else 0.0

    def _learn(
        self, history: RoundHistory, tree: TokenTree, num_rows: int, draft: float, seconds: float
    ) -> int:
        accepted = self._walk(tree)
        guess = Guess(
            tree,
            "" if tree.num_draft_tokens else "budget",
            draft,
            num_draft_nodes=len(tree),
            draft_depth=tree.max_depth,
            drafter="simulated" if tree.num_draft_tokens else "",
        )
        tokens = tuple(range(len(accepted) + 1))
        result = VerifyResult(1, accepted, tokens, num_rows=num_rows, compute_seconds=seconds)
        history.observe(guess, Checked(result, seconds), context_len=self.world.context_len)
        return len(accepted)

    def _walk(self, tree: TokenTree) -> tuple[int, ...]:
        accepted: list[int] = []
        while True:
            node = accepted[-1] if accepted else 0
            row = self.world.acceptance[min(len(accepted), len(self.world.acceptance) - 1)]
            (rank,) = self._random.choices(range(len(row) + 1), (*row, 1.0 - sum(row)))
            children = list(tree.children[node].values())
            if rank >= len(children):
                return tuple(accepted)
            accepted.append(children[rank])


def grow(acceptance: Acceptance, shape: ShapeQuery) -> TokenTree:
    """The best-first tree within the shape; tokens are ranks, for siblings have to differ."""
    token_ids, parents = [0], [-1]
    heap = [(-acceptance[0][0], 0, 0, 1)]
    while heap and len(token_ids) <= shape.max_nodes and shape.max_depth:
        worth, parent, rank, depth = heappop(heap)
        row = acceptance[min(depth - 1, len(acceptance) - 1)]
        token_ids.append(1 + rank)
        parents.append(parent)
        if rank + 1 < len(row):
            heappush(heap, (worth / row[rank] * row[rank + 1], parent, rank + 1, depth))
        if depth < shape.max_depth:
            deeper = acceptance[min(depth, len(acceptance) - 1)]
            heappush(heap, (worth * deeper[0], len(token_ids) - 1, 0, depth + 1))
    return TokenTree(tuple(token_ids), tuple(parents))
