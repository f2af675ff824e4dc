"""Rows of many sequences laid out as one ragged pass.

A prefill chunk, a root-only row and a tree are one thing here: rows, each with the bit set of the
scratch nodes it sees. Turns plain numbers into tensors; knows no model, pool or session.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from specinfer.tree import WORD_BITS, TokenTree
from specinfer_kernels import AttentionLayout

_WORD_BYTES = WORD_BITS // 8

Integers = npt.NDArray[np.int64]


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
        input_ids: int64 [1, num_rows].
        position_ids: int64 [1, num_rows].
        slot_mapping: int64 [num_rows], place in the pool of each row's key and value.
        layout: what the attention kernel reads.
        logit_index: int64 [num_logits], rows of the pass whose logits are wanted.
        logit_counts: how many of them belong to each sequence.
    """

    input_ids: Tensor
    position_ids: Tensor
    slot_mapping: Tensor
    layout: AttentionLayout
    logit_index: Tensor
    logit_counts: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        """Rows in the pass."""
        return self.input_ids.shape[1]


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
    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum(counts, out=offsets[1:])
    contexts = np.array([part.context_len for part in rows], np.int32)
    tables = np.zeros((len(rows), max(len(part.block_table) for part in rows)), np.int32)
    for index, part in enumerate(rows):
        tables[index, : len(part.block_table)] = part.block_table
    depths = np.array([depth for part in rows for depth in part.depths], np.int64)
    nodes = np.concatenate(
        [
            np.arange(part.first_node, part.first_node + count)
            for part, count in zip(rows, counts, strict=True)
        ]
    )
    owner = np.repeat(np.arange(len(rows)), counts)
    context_of_row = contexts[owner].astype(np.int64)
    wanted = [
        int(start) + row
        for start, part in zip(offsets[:-1], rows, strict=True)
        for row in part.logit_rows
    ]
    tokens = np.array([token for part in rows for token in part.token_ids], np.int64)
    slots = _slots(rows, tables, owner, context_of_row + nodes, block_size)
    layout = AttentionLayout(
        row_offsets=_tensor(offsets, device),
        context_lens=_tensor(contexts, device),
        block_tables=_tensor(tables, device),
        ancestors=_tensor(_ancestor_words(rows, counts), device),
    )
    return ForwardBatch(
        input_ids=_tensor(tokens, device).unsqueeze(0),
        position_ids=_tensor(context_of_row + depths, device).unsqueeze(0),
        slot_mapping=_tensor(slots, device),
        layout=layout,
        logit_index=_tensor(np.array(wanted, np.int64), device),
        logit_counts=tuple(len(part.logit_rows) for part in rows),
    )


def _slots(
    rows: Sequence[SequenceRows],
    tables: npt.NDArray[np.int32],
    owner: Integers,
    logical: Integers,
    block_size: int,
) -> Integers:
    """Place in the pool of every row's logical slot."""
    blocks = logical // block_size
    lengths = np.array([len(part.block_table) for part in rows])
    if bool((blocks >= lengths[owner]).any()):
        raise ValueError("a block table does not reach the last slot of its rows")
    physical: Integers = tables[owner, blocks].astype(np.int64) * block_size
    return physical + logical % block_size


def _ancestor_words(rows: Sequence[SequenceRows], counts: Sequence[int]) -> Integers:
    """Ancestor sets of all rows in 64-bit words, [num_rows, num_words]."""
    reach = max(part.first_node + count for part, count in zip(rows, counts, strict=True))
    num_words = -(-reach // WORD_BITS)
    if num_words == 1 and all(part.ancestors for part in rows):
        single = np.array([bits for part in rows for bits in part.ancestors], np.uint64)
        return single.view(np.int64)[:, None]
    width = num_words * _WORD_BYTES
    parts = []
    for part, count in zip(rows, counts, strict=True):
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


def _tensor(array: npt.NDArray[np.generic], device: torch.device | str) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor if device == "cpu" else tensor.to(device, non_blocking=True)
