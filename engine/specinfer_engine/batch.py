"""Rows of many sequences laid out as one ragged pass.

A prefill chunk, a root-only row and a tree are one thing here: rows, each with the bit set of the
scratch nodes it sees. Turns plain numbers into tensors; knows no model, pool or session.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from specinfer.tree import WORD_BITS, TokenTree
from specinfer_kernels import AttentionLayout

_WORD_BYTES = WORD_BITS // 8
_ALIGNMENT = 16

Integers = npt.NDArray[np.int64]
_Buffer = TypeVar("_Buffer", Tensor, npt.NDArray[np.integer[Any]])


@dataclass(frozen=True)
class SequenceRows:
    """The rows that one sequence brings to a pass.

    Attributes:
        token_ids: token of each row; row r is scratch node first_node + r.
        context_len: keys committed in the cache before the scratch nodes (L).
        first_node: scratch index of the first row; nodes below it are in the cache already.
        depths: row r stands at position context_len + depths[r].
        ancestors: bit j of entry r is set when row r sees scratch node j, itself included; empty
            when each row sees every node up to itself (a chain).
        block_table: blocks that hold every logical slot up to context_len + first_node + rows.
        logit_rows: rows whose logits are wanted, in any order.
    """

    token_ids: tuple[int, ...]
    context_len: int
    first_node: int
    depths: tuple[int, ...]
    ancestors: tuple[int, ...]
    block_table: tuple[int, ...]
    logit_rows: tuple[int, ...]

    @classmethod
    def chain(
        cls,
        token_ids: Sequence[int],
        context_len: int,
        block_table: Sequence[int],
        logit_rows: Sequence[int] = (),
    ) -> SequenceRows:
        """Tokens that follow each other: a prefill chunk, or a root alone."""
        depths = tuple(range(len(token_ids)))
        table, wanted = tuple(block_table), tuple(logit_rows)
        return cls(tuple(token_ids), context_len, 0, depths, (), table, wanted)

    @classmethod
    def tree(
        cls,
        tree: TokenTree,
        context_len: int,
        block_table: Sequence[int],
        logit_rows: Sequence[int] | None = None,
    ) -> SequenceRows:
        """A whole tree below `context_len` committed tokens; logits of all nodes unless said."""
        wanted = tuple(range(len(tree)) if logit_rows is None else logit_rows)
        table = tuple(block_table)
        return cls(tree.token_ids, context_len, 0, tree.depths, tree.ancestors, table, wanted)


@dataclass(frozen=True)
class ForwardBatch:
    """One pass as tensors, all on one device.

    Attributes:
        token_ids: int64 [num_rows].
        positions: int64 [num_rows].
        slot_mapping: int64 [num_rows], place in the pool of each row's key and value.
        layout: what the attention kernel reads.
        logit_index: int64 [num_logits], rows of the pass whose logits are wanted.
        logit_counts: how many of them belong to each sequence.
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    layout: AttentionLayout
    logit_index: Tensor
    logit_counts: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        """Rows in the pass."""
        return self.token_ids.shape[0]


def aligned(count: int) -> int:
    """Elements to leave for `count` of a buffer: some kernels read whole vectors."""
    return -(-count // _ALIGNMENT) * _ALIGNMENT


def cut(buffer: _Buffer, counts: Sequence[int]) -> list[_Buffer]:
    """Views of so many elements each of a flat buffer that has room for them, aligned."""
    starts = accumulate(map(aligned, counts), initial=0)
    return [buffer[start : start + count] for start, count in zip(starts, counts, strict=False)]


def build_batch(
    rows: Sequence[SequenceRows], block_size: int, device: torch.device | str = "cpu"
) -> ForwardBatch:
    """Lay the rows of all sequences end to end.

    Raises:
        ValueError: when there is no row, or a block table does not reach the last slot.
    """
    counts = [len(part.token_ids) for part in rows]
    if not counts or 0 in counts:
        raise ValueError("every sequence of a pass brings at least one row")
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    wanted: list[int] = []
    offsets = [0]
    for part, count in zip(rows, counts, strict=True):
        start, context = offsets[-1], part.context_len
        token_ids += part.token_ids
        positions += [context + depth for depth in part.depths]
        slots += _slots(part.block_table, context + part.first_node, count, block_size)
        wanted += [start + row for row in part.logit_rows]
        offsets.append(start + count)
    # Few large arrays in place of many small tensors: a pass of a small model is mostly overhead.
    pieces = _pieces(np.int64, (token_ids, positions, slots, wanted), device)
    return ForwardBatch(
        token_ids=pieces[0],
        positions=pieces[1],
        slot_mapping=pieces[2],
        layout=_layout(rows, offsets, device),
        logit_index=pieces[3],
        logit_counts=tuple(len(part.logit_rows) for part in rows),
    )


def _layout(
    rows: Sequence[SequenceRows], offsets: list[int], device: torch.device | str
) -> AttentionLayout:
    tables = np.zeros((len(rows), max(len(part.block_table) for part in rows)), np.int32)
    for table, part in zip(tables, rows, strict=True):
        table[: len(part.block_table)] = part.block_table
    numbers = (offsets, [part.context_len for part in rows], tables.reshape(-1))
    row_offsets, context_lens, block_tables = _pieces(np.int32, numbers, device)
    return AttentionLayout(
        row_offsets=row_offsets,
        context_lens=context_lens,
        block_tables=block_tables.view(tables.shape),
        ancestors=torch.from_numpy(_ancestor_words(rows)).to(device),
    )


def _pieces(
    dtype: type[np.integer[Any]],
    lists: Sequence[Sequence[int] | npt.NDArray[np.int32]],
    device: torch.device | str,
) -> list[Tensor]:
    """Lists of numbers as tensors of one buffer, which takes one copy to a device."""
    counts = [len(numbers) for numbers in lists]
    buffer = np.zeros(sum(map(aligned, counts)), dtype)
    for piece, numbers in zip(cut(buffer, counts), lists, strict=True):
        piece[:] = numbers
    return cut(torch.from_numpy(buffer).to(device), counts)


def _slots(table: tuple[int, ...], start: int, count: int, block_size: int) -> list[int]:
    """Place in the pool of each of `count` logical slots from `start` on."""
    if (start + count - 1) // block_size >= len(table):
        raise ValueError("a block table does not reach the last slot of its rows")
    return [
        table[index // block_size] * block_size + index % block_size
        for index in range(start, start + count)
    ]


def _ancestor_words(rows: Sequence[SequenceRows]) -> Integers:
    """Ancestor sets of all rows in 64-bit words, [num_rows, num_words]."""
    reach = max(part.first_node + len(part.token_ids) for part in rows)
    num_words = -(-reach // WORD_BITS)
    if reach < WORD_BITS:  # the sign bit stays free
        sets: list[int] = []
        for part in rows:
            first = part.first_node + 1
            last = first + len(part.token_ids)
            sets += part.ancestors or [(1 << seen) - 1 for seen in range(first, last)]
        return np.array(sets, np.int64).reshape(-1, 1)
    width = num_words * _WORD_BYTES
    parts = []
    for part in rows:
        count = len(part.token_ids)
        if part.ancestors:
            raw = b"".join(bits.to_bytes(width, "little") for bits in part.ancestors)
            parts.append(np.frombuffer(raw, np.int64).reshape(count, num_words))
        else:
            parts.append(_chain_words(part.first_node, count, num_words))
    return np.concatenate(parts)


def _chain_words(first_node: int, count: int, num_words: int) -> Integers:
    """Ancestor words of rows that see every scratch node up to themselves."""
    seen = np.arange(first_node + 1, first_node + count + 1, dtype=np.int64)[:, None]
    starts = np.arange(num_words, dtype=np.int64)[None, :] * WORD_BITS
    bits = np.clip(seen - starts, 0, WORD_BITS)
    # Shifting by 64 is undefined, so full words are set apart.
    partial = (np.uint64(1) << (bits % WORD_BITS).astype(np.uint64)) - np.uint64(1)
    words = np.where(bits == WORD_BITS, ~np.uint64(0), partial)
    return words.view(np.int64)
