"""What a pass asks of the model's runner: rows in, raw logits out, slots moved after the walks.

This module knows nothing of walks, results, threads or futures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from specinfer_engine.batch import SequenceRows
from specinfer_engine.sequence import Moves
from specinfer_verify.scheduler import ScheduledRows


class TargetRunner(Protocol):
    """What the engine needs of a model: passes over rows, and moves inside the KV pool."""

    def forward(self, rows: Sequence[SequenceRows]) -> list[Tensor]:
        """Raw logits of the rows asked for, float32 [len(logit_rows), vocab_size] a sequence."""
        ...

    def compact(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy slots to slots."""
        ...

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy blocks to blocks."""
        ...


def run_rows(runner: TargetRunner, plan: Sequence[ScheduledRows]) -> list[Tensor]:
    """Raw logits of every tree's nodes, [num_nodes, vocab_size] a session."""
    sources = [block for item in plan for block in item.copies.sources]
    targets = [block for item in plan for block in item.copies.targets]
    if sources:
        runner.copy_blocks(sources, targets)
    return runner.forward([sequence_rows(item) for item in plan])


def sequence_rows(item: ScheduledRows) -> SequenceRows:
    """What the runner is asked for: a chunk without logits, a tree with those of every node."""
    state = item.session.state
    rows = item.row_tree()
    if item.tree is None:
        return SequenceRows.chain(rows.token_ids, state.num_cached, state.block_table)
    wanted = range(item.num_chunk, item.num_rows)
    return SequenceRows.tree(rows, state.num_cached, state.block_table, wanted)


def move_slots(runner: TargetRunner, moves: Sequence[Moves]) -> None:
    """Move the keys and values that walks keep, those of all sessions at once."""
    sources = [slot for move in moves for slot in move.sources]
    targets = [slot for move in moves for slot in move.targets]
    if sources:
        runner.compact(sources, targets)
