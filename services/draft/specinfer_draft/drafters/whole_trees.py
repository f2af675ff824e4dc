"""Which proposals' trees grow whole, in one run of the device, instead of level by level.

Those of stated widths that fit into what was asked for, from the root on, where a row's law depends
on nothing but its logits and position, and where there is time for all of it. Everything else, and
everything where this fails, goes on level by level, with the same trees. This module knows nothing
of models, kernels or the order in which proposals are served.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from specinfer_draft.drafters.forecast import Cuts
from specinfer_draft.drafters.passes import Share
from specinfer_draft.drafters.session import DraftSession, Growth
from specinfer_draft.drafters.static_growth import GrowthStart, StaticGrowths, TreePlan
from specinfer_engine.blocks import BlockManager

# Believed of a recording before the first one.
RECORD_SECONDS = 0.5

CopyBlocks = Callable[[Sequence[int], Sequence[int]], None]
Member = tuple[DraftSession, Growth, Tensor]


class WholeTrees:
    """Grows trees whole where that can be.

    Args:
        growths: what grows them.
        blocks: the pool's bookkeeping.
        copy_blocks: copies blocks of the pool; all sources are read first.
        clock: seconds, the clock of the queries' deadlines.
    """

    def __init__(
        self,
        growths: StaticGrowths,
        blocks: BlockManager,
        copy_blocks: CopyBlocks,
        clock: Callable[[], float],
    ) -> None:
        self._growths = growths
        self._blocks = blocks
        self._copy_blocks = copy_blocks
        self._clock = clock
        self._level_seconds = 0.0
        self._record_seconds = RECORD_SECONDS

    def grow(self, shares: Sequence[Share], logits: Sequence[Tensor]) -> int:
        """Grow the trees whose roots are in this pass and that can grow whole; their searches end.

        Args:
            shares: of the pass; what they commit is committed.
            logits: of the rows wanted, [num_wanted, vocab_size] a share.

        Returns:
            How many rows were computed.
        """
        groups: dict[tuple[TreePlan, Cuts | None], list[Member]] = {}
        nearest = math.inf
        for share, rows in zip(shares, logits, strict=True):
            growth = share.session.growth
            if growth is None:
                continue
            nearest = min(nearest, growth.query.deadline)
            plan = self._plan(share.session, growth)
            if plan is not None and len(rows):
                members = groups.setdefault((plan, share.session.forecast.cuts), [])
                members.append((share.session, growth, rows[-1]))
        num_rows = 0
        for (plan, cuts), members in groups.items():
            most = self._growths.most_sessions(plan)
            for first in range(0, len(members), most):
                num_rows += self._grow(plan, cuts, members[first : first + most], nearest)
        return num_rows

    def _plan(self, session: DraftSession, growth: Growth) -> TreePlan | None:
        """The plan of a tree that can grow whole."""
        shape = growth.search.shape
        if not growth.search.at_root or not shape.widths or session.forecast.looks_back:
            return None
        plan = TreePlan(shape.widths[: shape.max_depth])
        fits = plan.num_nodes <= shape.max_nodes and self._growths.serves(plan)
        return plan if fits else None

    def _grow(
        self, plan: TreePlan, cuts: Cuts | None, members: Sequence[Member], nearest: float
    ) -> int:
        """Grow trees of one plan and one law in one run, as far as time and the pool allow."""
        start = self._clock()
        held = self._choose(plan, members, start)
        if not held:
            return 0
        samplings = [session.forecast.sampling for session, _, _ in held]
        num_blocks = max(self._num_blocks(session, plan) for session, _, _ in held)
        sizes = self._growths.sizes_of(plan, cuts, samplings, num_blocks)
        is_replay = self._growths.is_recorded(sizes)
        if not self._growths.admits(sizes) or not (is_replay or self._may_record(start, nearest)):
            return 0
        self._reserve(plan, held)
        found = self._growths.grow(sizes, [_start_of(*member) for member in held])
        if found is None:
            for session, _, _ in held:
                session.state.release_scratch()
            return 0
        for (_, growth, _), levels in zip(held, found, strict=True):
            if levels is not None:
                growth.search.take_tree(levels)
        self._learn(self._clock() - start, plan, is_replay=is_replay)
        return len(held) * plan.num_scratch

    def _choose(self, plan: TreePlan, members: Sequence[Member], now: float) -> list[Member]:
        """Those with time for a whole tree and free blocks for it, without taking anybody's."""
        held, num_free = list[Member](), self._blocks.num_free_blocks
        end = now + len(plan.widths) * self._level_seconds
        for member in members:
            session, growth, _ = member
            if end >= growth.query.deadline:
                # Otherwise one slow growth would keep trees with deadlines from it for ever.
                self._level_seconds *= 0.75
                continue
            needed = session.state.blocks_needed(plan.num_scratch)
            if needed <= num_free:
                num_free -= needed
                held.append(member)
        return held

    def _may_record(self, now: float, nearest: float) -> bool:
        """Whether a recording is believed to end before every deadline of the pass."""
        if now + self._record_seconds < nearest:
            return True
        # Otherwise deadlines shorter than a recording would keep all trees from it for ever.
        self._record_seconds *= 0.75
        return False

    def _learn(self, seconds: float, plan: TreePlan, *, is_replay: bool) -> None:
        """Book what a growth took, or its recording."""
        if is_replay:
            # Half new, half old: follows a changing load within a few growths.
            self._level_seconds += 0.5 * (seconds / len(plan.widths) - self._level_seconds)
        else:
            self._record_seconds = seconds

    def _num_blocks(self, session: DraftSession, plan: TreePlan) -> int:
        """Columns of a session's block table once a whole tree has its slots."""
        state = session.state
        total = self._blocks.blocks_for(state.num_cached + plan.num_scratch)
        return max(len(state.block_table), total)

    def _reserve(self, plan: TreePlan, held: Sequence[Member]) -> None:
        """Take scratch slots for a whole tree each; there is room."""
        sources, targets = list[int](), list[int]()
        for session, _, _ in held:
            copies = session.state.reserve(plan.num_scratch)
            sources += copies.sources
            targets += copies.targets
        if sources:
            self._copy_blocks(sources, targets)


def _start_of(session: DraftSession, _: Growth, logits: Tensor) -> GrowthStart:
    state = session.state
    return GrowthStart(
        logits, state.num_cached, tuple(state.block_table), session.forecast.sampling
    )
