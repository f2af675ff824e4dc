"""Which proposals' trees grow whole, in one run of the device, instead of level by level.

Those of stated widths that fit into what was asked for, from the root on, where a row's law depends
on nothing but its logits and position, and where there is time for all of it. Everything else, and
everything where this fails, goes on level by level, with the same trees. This module knows nothing
of models, kernels or the order in which proposals are served.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from specinfer_draft.drafters.forecast import Cuts
from specinfer_draft.drafters.passes import Share
from specinfer_draft.drafters.session import DraftSession, Growth
from specinfer_draft.drafters.static_growth import GrowthStart, StaticGrowths, TreePlan
from specinfer_engine.blocks import BlockManager

CopyBlocks = Callable[[Sequence[int], Sequence[int]], None]
Group = list[tuple[DraftSession, Growth, Tensor]]


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

    def grow(self, shares: Sequence[Share], logits: Sequence[Tensor], start: float) -> int:
        """Grow the trees whose roots are in this pass and that can grow whole; their searches end.

        Args:
            shares: of the pass; what they commit is committed.
            logits: of the rows wanted, [num_wanted, vocab_size] a share.
            start: when the pass began.

        Returns:
            How many rows were computed.
        """
        groups: dict[tuple[TreePlan, Cuts | None], Group] = {}
        for share, rows in zip(shares, logits, strict=True):
            growth = share.session.growth
            if growth is None or not len(rows) or not growth.search.at_root:
                continue
            plan = self._plan(share.session, growth, start)
            if plan is not None:
                members = groups.setdefault((plan, share.session.forecast.cuts), [])
                members.append((share.session, growth, rows[-1]))
        return sum(self._grow(plan, cuts, group) for (plan, cuts), group in groups.items())

    def _plan(self, session: DraftSession, growth: Growth, now: float) -> TreePlan | None:
        """The plan of a tree that can grow whole."""
        shape = growth.search.shape
        if not shape.widths or session.forecast.looks_back:
            return None
        plan = TreePlan(shape.widths[: shape.max_depth])
        if plan.num_nodes > shape.max_nodes or not self._growths.serves(plan):
            return None
        if now + len(plan.widths) * self._level_seconds >= growth.query.deadline:
            # Otherwise one slow growth would keep trees with deadlines from it for ever.
            self._level_seconds *= 0.75
            return None
        return plan

    def _grow(self, plan: TreePlan, cuts: Cuts | None, group: Group) -> int:
        """Grow the trees of one plan and one law, as far as the pool holds them."""
        start, num_recorded = self._clock(), self._growths.num_recorded
        held = self._reserve(plan, group)
        starts = [
            GrowthStart(
                logits,
                session.state.num_cached,
                tuple(session.state.block_table),
                session.forecast.sampling,
            )
            for session, _, logits in held
        ]
        found = self._growths.grow(plan, cuts, starts)
        if found is None:
            return 0
        for (_, growth, _), levels in zip(held, found, strict=True):
            if levels is not None:
                growth.search.take_tree(levels)
        if held and num_recorded == self._growths.num_recorded:
            seconds = (self._clock() - start) / len(plan.widths)
            # Half new, half old: follows a changing load within a few growths.
            self._level_seconds += 0.5 * (seconds - self._level_seconds)
        return len(held) * plan.num_scratch

    def _reserve(self, plan: TreePlan, group: Group) -> Group:
        """Take scratch slots for a whole tree each, without taking blocks from anybody."""
        held, sources, targets = (
            list[tuple[DraftSession, Growth, Tensor]](),
            list[int](),
            list[int](),
        )
        for session, growth, logits in group:
            if session.state.blocks_needed(plan.num_scratch) <= self._blocks.num_free_blocks:
                copies = session.state.reserve(plan.num_scratch)
                sources += copies.sources
                targets += copies.targets
                held.append((session, growth, logits))
        if sources:
            self._copy_blocks(sources, targets)
        return held
