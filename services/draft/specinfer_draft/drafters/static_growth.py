"""Trees of stated widths grown in one run of the device, which is recorded once and replayed.

    level 0        logits of the roots, from the pass over the committed tokens
    level d        draws of level d - 1  ->  input tokens of level d  ->  pass  ->  logits

Of such a tree (SpecInfer, ASPLOS'24, section 3.1) all but the tokens is known before: whose child a
row is, what it sees, where it stands, which slot it writes. So the host is not asked between two
levels, and one copy brings back what all of them found. The sessions of a run are padded to one of
a few numbers with sessions that belong to nobody, whose keys and values go to blocks that nobody
else has. Plain torch over fixed tensors, which runs on any device. Knows no session, no committed
token, no pool and no clock.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, repeat
from operator import mul

import torch
from torch import Tensor

from specinfer.sampling import SamplingParams
from specinfer_draft.drafters.forecast import Cuts, cut_by_best, read_candidates
from specinfer_draft.grow import Candidates
from specinfer_engine.batch import ForwardBatch, SequenceRows, build_batch
from specinfer_engine.graphs import (
    ROW_BUCKETS,
    CaptureFailed,
    ScratchBlocks,
    StepGraphs,
    table_width,
)
from specinfer_kernels import AttentionLayout, gumbel_noise, rank_tokens

log = logging.getLogger(__name__)

SESSION_BUCKETS = (1, 2, 4, 8, 16)
# Each holds the launches of all its levels.
MOST_GROWTHS = 32
# Trees refused between two evictions: where more laws are alive than are kept, they would else take
# each other's place, a recording for every tree.
EVICT_AFTER = 64
# Where top-p needs more, the tree grows level by level: sorting the vocabulary takes longer.
TOP_P_TOKENS = 1024
# Of float64 noise made at once; making it takes a dozen times as much.
NOISE_BYTES = 16 << 20
_SEED, _TEMPERATURE, _CONTEXT, _TABLE = range(4)

Levels = list[list[Candidates]]
"""What was found at every node of every level that was looked at, the root's first."""


@dataclass(frozen=True)
class TreePlan:
    """What is known of a tree of stated widths before it grows.

    Attributes:
        widths: children of each node of a level, <k1, ..., km>.
    """

    widths: tuple[int, ...]

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Nodes of each level that is looked at: the root, then all levels but the leaves."""
        return tuple(accumulate(self.widths[:-1], mul, initial=1))

    @property
    def num_nodes(self) -> int:
        """Nodes below the root."""
        return sum(accumulate(self.widths, mul))

    @property
    def num_scratch(self) -> int:
        """Nodes that get keys and values: all but root and leaves, level after level."""
        return sum(self.counts[1:])

    def level_rows(self, depth: int) -> SequenceRows:
        """Rows of a level below the root as those of one session of no context, without tokens."""
        count, first = self.counts[depth], sum(self.counts[1:depth])
        seen = [0]
        node = 0
        for level in range(1, depth + 1):
            width = self.widths[level - 1]
            above, seen = seen, []
            for place in range(len(above) * width):
                seen.append(above[place // width] | (1 << node))
                node += 1
        return SequenceRows(
            token_ids=(0,) * count,
            context_len=0,
            first_node=first,
            depths=(depth - 1,) * count,
            ancestors=tuple(seen),
            # One block that holds every slot: only the layout of these rows is used.
            block_table=(0,),
            logit_rows=tuple(range(count)),
        )


@dataclass(frozen=True)
class GrowthStart:
    """Where one session's tree begins.

    Attributes:
        logits: raw logits of the root, float [vocab_size].
        context_len: keys in the cache, the root's among them.
        block_table: blocks that hold them and `TreePlan.num_scratch` slots more.
        sampling: how the target draws.
    """

    logits: Tensor
    context_len: int
    block_table: tuple[int, ...]
    sampling: SamplingParams


@dataclass(frozen=True)
class GrowthSizes:
    """What a recorded growth is made for: tree, cuts of the law, whether any session's temperature
    is above 0, room for sessions and columns of their block tables."""

    plan: TreePlan
    cuts: Cuts | None
    drawn: bool
    sessions: int
    blocks: int


class Growth:
    """One growth over fixed tensors of the device.

    Args:
        sizes: what it has room for.
        run: one pass over a batch of the device: logits [num_logits, vocab_size].
        roots: raw logits of the roots, [at least sizes.sessions, vocab_size]; they are read.
        block_size: slots of a block.
        spread: as for `rank`.

    Attributes:
        numbers: int64 [sessions, 3 + blocks]: seed, bits of the temperature, context length and
            block table of each session.
        found: float64 [2, nodes of all sessions and a column for each session]: tokens and log
            scores, level after level; then whose law needs more tokens than were looked at.
    """

    def __init__(
        self,
        sizes: GrowthSizes,
        run: Callable[[ForwardBatch], Tensor],
        roots: Tensor,
        block_size: int,
        spread: float,
    ) -> None:
        self._sizes = sizes
        self._run = run
        self._block_size = block_size
        self._spread = spread
        self._roots = roots[: sizes.sessions]
        plan, device = sizes.plan, roots.device
        self.numbers = torch.zeros(
            sizes.sessions, _TABLE + sizes.blocks, dtype=torch.int64, device=device
        )
        self.found = torch.zeros(
            2, sizes.sessions * (plan.num_nodes + 1), dtype=torch.float64, device=device
        )
        self._shapes = [
            build_batch([plan.level_rows(depth)] * sizes.sessions, plan.num_scratch, device)
            for depth in range(1, len(plan.counts))
        ]

    def __call__(self) -> None:
        """Grow the trees of `numbers` below the roots and leave them in `found`."""
        plan, pieces = self._sizes.plan, list[Tensor]()
        logits, cuts = self._roots, self._sizes.cuts
        short = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        for depth, (width, noise) in enumerate(zip(plan.widths, self._noise(), strict=False)):
            if depth:
                logits = self._run(self._batch(depth, pieces[-1][0]))
            logits = logits.float()
            if cuts is not None:
                logits, too_far = cut_by_best(logits, cuts, TOP_P_TOKENS)
                short = short if too_far is None else short | too_far.view(len(short), -1).any(1)
            z = logits if noise is None else _add_noise(logits, noise)
            pieces.append(rank_tokens(z, width, self._spread).reshape(2, -1))
        self.found.copy_(torch.cat((*pieces, short.expand(2, -1)), 1))

    def _noise(self) -> Iterator[Tensor | None]:
        """T * g of each level, float32 [sessions, vocab_size]; None for ever where all T are 0."""
        if not self._sizes.drawn:
            yield from repeat(None)
        seeds = self.numbers[:, _SEED]
        temperatures = self.numbers[:, _TEMPERATURE : _TEMPERATURE + 1].view(torch.float64)
        num_sessions, vocab_size = self._roots.shape
        depth = len(self._sizes.plan.widths)
        # Many levels at once, because it takes dozens of launches.
        most = max(1, NOISE_BYTES // (8 * num_sessions * vocab_size))
        for first in range(0, depth, most):
            levels = torch.arange(first, min(first + most, depth), device=seeds.device)
            # A node at depth d below the root, the last of the context, decides position L + d.
            positions = (self.numbers[:, _CONTEXT] + levels.unsqueeze(1)).flatten()
            noise = gumbel_noise(seeds.repeat(len(levels)), positions, vocab_size)
            yield from (noise.view(len(levels), num_sessions, -1) * temperatures).float()

    def _batch(self, depth: int, tokens: Tensor) -> ForwardBatch:
        """The pass over a level whose tokens, float64 [num_rows], were just drawn."""
        plan, shape = self._sizes.plan, self._shapes[depth - 1]
        contexts, tables = self.numbers[:, _CONTEXT:_TABLE], self.numbers[:, _TABLE:]
        nodes = torch.arange(plan.counts[depth], device=tokens.device)
        places = contexts + nodes + sum(plan.counts[1:depth])
        blocks = tables.gather(1, places // self._block_size)
        layout = AttentionLayout(
            row_offsets=shape.layout.row_offsets,
            context_lens=contexts.flatten().int(),
            block_tables=tables.int().contiguous(),
            ancestors=shape.layout.ancestors,
        )
        return ForwardBatch(
            token_ids=tokens.long(),
            positions=(contexts + depth - 1).expand_as(places).contiguous().flatten(),
            slot_mapping=(blocks * self._block_size + places % self._block_size).flatten(),
            layout=layout,
            logit_index=shape.logit_index,
            logit_counts=(),
        )


def _add_noise(logits: Tensor, noise: Tensor) -> Tensor:
    """z of the nodes of a level; siblings and cousins share their noise, [sessions, vocab_size]."""
    by_session = logits.view(len(noise), -1, noise.shape[1])
    return (by_session + noise.unsqueeze(1)).flatten(0, 1)


class StaticGrowths:
    """The recorded growths of one runner, made at first use and at most `most_growths` of them;
    the least recently used gives way, once in `EVICT_AFTER` growths that were refused.

    Args:
        graphs: recorded passes of the runner, whose recorder and spare blocks serve here too.
        vocab_size: tokens of the model.
        device: where its logits lie.
        spread: as for `rank`.
        most_rows: most rows of a pass.
        most_growths: bound, at least 1.
    """

    def __init__(
        self,
        graphs: StepGraphs,
        vocab_size: int,
        device: torch.device | str,
        *,
        spread: float = 1.0,
        most_rows: int = ROW_BUCKETS[-1],
        most_growths: int = MOST_GROWTHS,
    ) -> None:
        self._graphs = graphs
        self._spread = spread
        self._most_rows = min(most_rows, ROW_BUCKETS[-1])
        self._most_growths = most_growths
        self._records = True
        self._recorded: OrderedDict[GrowthSizes, tuple[Growth, Callable[[], None]]] = OrderedDict()
        self._refused = EVICT_AFTER
        shape = (SESSION_BUCKETS[-1], vocab_size)
        self._roots = torch.zeros(shape, dtype=torch.float32, device=device)

    @property
    def num_recorded(self) -> int:
        """Growths recorded."""
        return len(self._recorded)

    def serves(self, plan: TreePlan) -> bool:
        """Whether trees of this plan can grow here: they have inner nodes, and levels that fit."""
        return (
            len(plan.widths) > 1
            and max(plan.widths) <= self._roots.shape[1]
            and max(plan.counts) <= self._most_rows
        )

    def most_sessions(self, plan: TreePlan) -> int:
        """Sessions whose trees of this plan grow in one run at most."""
        widest = max(plan.counts)
        fits = (size for size in SESSION_BUCKETS if size == 1 or size * widest <= self._most_rows)
        return max(fits)

    def sizes_of(
        self,
        plan: TreePlan,
        cuts: Cuts | None,
        samplings: Sequence[SamplingParams],
        num_blocks: int,
    ) -> GrowthSizes:
        """What grows trees of these sessions, at most `most_sessions`, whose block tables have up
        to `num_blocks` columns."""
        return GrowthSizes(
            plan,
            cuts,
            drawn=not all(sampling.greedy for sampling in samplings),
            sessions=next(size for size in SESSION_BUCKETS if len(samplings) <= size),
            blocks=table_width(num_blocks),
        )

    def is_recorded(self, sizes: GrowthSizes) -> bool:
        """Whether a growth of these sizes is replayed."""
        return sizes in self._recorded

    def admits(self, sizes: GrowthSizes) -> bool:
        """Whether a growth of these sizes is recorded or may be; the refusals are counted."""
        if self.is_recorded(sizes):
            return True
        if not self._records or self._graphs.capture is None:
            return False
        if self.num_recorded < self._most_growths or self._refused >= EVICT_AFTER:
            return True
        self._refused += 1
        return False

    @torch.inference_mode()
    def grow(self, sizes: GrowthSizes, starts: Sequence[GrowthStart]) -> list[Levels | None] | None:
        """What the levels of one tree for each start found; `sizes` are theirs and admitted.

        None for a tree that has to grow level by level, and for all when this cannot be recorded;
        then keys and values of scratch slots may have changed.
        """
        torch.stack([start.logits for start in starts], out=self._roots[: len(starts)])
        numbers = lay_out(sizes, starts, self._graphs.scratch)
        growth, replay = self._recorded.get(sizes) or self._record(sizes, numbers) or (None, None)
        if growth is None or replay is None:
            return None
        self._recorded.move_to_end(sizes)
        growth.numbers.copy_(numbers)
        replay()
        return read_levels(sizes, growth.found.cpu())[: len(starts)]

    def _record(
        self, sizes: GrowthSizes, numbers: Tensor
    ) -> tuple[Growth, Callable[[], None]] | None:
        """Record a growth of these sizes while it grows these trees; None when it is not to be."""
        graphs = self._graphs
        if graphs.capture is None:
            return None
        if self.num_recorded >= self._most_growths:
            self._recorded.popitem(last=False)
            self._refused = 0
        block_size = graphs.scratch.block_size
        growth = Growth(sizes, graphs.run, self._roots, block_size, self._spread)
        growth.numbers.copy_(numbers)
        try:
            self._recorded[sizes] = (growth, graphs.capture(growth))
        except CaptureFailed as error:
            log.warning("whole trees are not recorded any more: %s", error)
            self._records = False
            return None
        return self._recorded[sizes]


def lay_out(sizes: GrowthSizes, starts: Sequence[GrowthStart], scratch: ScratchBlocks) -> Tensor:
    """`Growth.numbers` of the host for these starts, padding included.

    Sessions that are padding have no context and share the spare blocks, over and over: what they
    write there nobody else reads.
    """
    numbers = torch.zeros(sizes.sessions, _TABLE + sizes.blocks, dtype=torch.int64)
    spare = ScratchBlocks.count(scratch.block_size)
    numbers[len(starts) :, _TABLE:] = scratch.first + torch.arange(sizes.blocks) % spare
    temperatures = [start.sampling.temperature for start in starts]
    numbers[: len(starts), _TEMPERATURE] = torch.tensor(temperatures, dtype=torch.float64).view(
        torch.int64
    )
    for row, start in zip(numbers, starts, strict=False):
        row[_SEED], row[_CONTEXT] = start.sampling.seed, start.context_len
        row[_TABLE : _TABLE + len(start.block_table)] = torch.tensor(start.block_table)
    return numbers


def read_levels(sizes: GrowthSizes, found: Tensor) -> list[Levels | None]:
    """What `Growth.found`, brought to the host, says of each session; None where a cut failed."""
    plan, sessions = sizes.plan, sizes.sessions
    columns = [
        sessions * count * width for count, width in zip(plan.counts, plan.widths, strict=True)
    ]
    *pieces, short = found.split([*columns, sessions], 1)
    levels = [
        read_candidates(piece.view(2, -1, width))
        for piece, width in zip(pieces, plan.widths, strict=True)
    ]
    return [
        None
        if failed
        else [
            level[session * count : (session + 1) * count]
            for level, count in zip(levels, plan.counts, strict=True)
        ]
        for session, failed in enumerate(short[0].tolist())
    ]
