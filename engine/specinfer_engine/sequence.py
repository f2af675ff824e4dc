"""One sequence's tokens and where their keys and values lie: reserve, commit, truncate, free.

    slot      0 ............ num_cached | num_cached + 0, + 1, ...
    holds     committed tokens          | scratch nodes of the pass at hand
    tokens    token_ids[:num_cached]    | token_ids[num_cached:] wait for a pass

Draft and verify keep their sequences in it alike (algorithms.md 1.4). This module knows nothing of
tensors, models or acceptance: it returns which blocks to copy and which slots to move.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from specinfer_engine.blocks import BlockManager


@dataclass(frozen=True)
class Moves:
    """Pairs of places in the KV pool: copy the content of `sources[i]` to `targets[i]`."""

    sources: tuple[int, ...] = ()
    targets: tuple[int, ...] = ()


class SequenceState:
    """Tokens of one sequence and its blocks in the pool.

    Attributes:
        token_ids: all tokens known, with or without keys and values.
        num_cached: how many of them have their keys and values in the pool.
        block_table: blocks that hold the committed tokens and the reserved scratch slots.
    """

    def __init__(self, blocks: BlockManager, token_ids: Iterable[int] = ()) -> None:
        self._blocks = blocks
        self.token_ids: list[int] = list(token_ids)
        self.num_cached = 0
        self.block_table: list[int] = []
        self._hashes: list[bytes] = []

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_missing(self) -> int:
        """Tokens that still wait for their keys and values."""
        return len(self.token_ids) - self.num_cached

    def slot(self, index: int) -> int:
        """Place in the pool of logical slot `index`: block * block_size + offset."""
        block_size = self._blocks.block_size
        return self.block_table[index // block_size] * block_size + index % block_size

    def append(self, token_ids: Iterable[int]) -> None:
        """Add tokens whose keys and values do not exist yet."""
        self.token_ids.extend(token_ids)

    def share_prefix(self) -> int:
        """Take every block of the prefix cache that fits; call it on a sequence without blocks.

        The last token never counts as cached, since a pass over it makes the next token's logits;
        a block that ends on it is shared up to the token before and copied when it is written.

        Returns:
            num_cached afterwards.
        """
        if self.block_table:
            raise ValueError("only a sequence without blocks can take a cached prefix")
        self.block_table, self._hashes = self._blocks.find_prefix(self.token_ids)
        found = len(self.block_table) * self._blocks.block_size
        self.num_cached = max(min(found, len(self.token_ids) - 1), 0)
        self._blocks.count_lookup(len(self.token_ids), self.num_cached)
        self._drop_unused()
        return self.num_cached

    def blocks_needed(self, num_slots: int) -> int:
        """Blocks that `reserve(num_slots)` would take from the pool."""
        total = self._blocks.blocks_for(self.num_cached + num_slots)
        return max(total - len(self.block_table), 0) + len(self._shared_tail(num_slots))

    def reserve(self, num_slots: int) -> Moves:
        """Make scratch slots num_cached .. num_cached + num_slots - 1 ours to write.

        Returns:
            Blocks to copy before the pass; sources may not be written until it has been done.

        Raises:
            ResourceExhausted: when the pool has too few blocks; nothing has changed then.
        """
        if not num_slots:
            return Moves()
        shared = self._shared_tail(num_slots)
        fresh = self._blocks.allocate(self.blocks_needed(num_slots))
        sources, targets = [], []
        for index in shared:
            sources.append(self.block_table[index])
            targets.append(fresh.pop())
            self.block_table[index] = targets[-1]
        self._blocks.release(sources)
        self.block_table.extend(fresh)
        for block in self.block_table[self._first_written :]:
            self._blocks.make_writable(block)
        del self._hashes[self._first_written :]
        return Moves(tuple(sources), tuple(targets))

    def commit(self, nodes: Sequence[int]) -> Moves:
        """Make scratch nodes the keys and values of the next `len(nodes)` tokens of `token_ids`.

        Append the tokens first. Afterwards full blocks are in the prefix cache and blocks past the
        committed tokens are given back.

        Args:
            nodes: indices of scratch nodes, strictly ascending, in the tokens' order.

        Returns:
            Slots to move, ascending, so that moving one by one never overwrites a later source.
            Move them before the next pass.
        """
        if any(later <= earlier for earlier, later in itertools.pairwise(nodes)):
            raise ValueError(f"nodes to commit are strictly ascending, got {list(nodes)}")
        if len(nodes) > self.num_missing:
            raise ValueError(f"{len(nodes)} nodes to commit and {self.num_missing} tokens waiting")
        pairs = [
            (self.slot(self.num_cached + node), self.slot(self.num_cached + index))
            for index, node in enumerate(nodes)
            if node != index
        ]
        self.num_cached += len(nodes)
        self._register_full()
        self._drop_unused()
        return Moves(tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs))

    def truncate(self, length: int) -> None:
        """Forget all tokens from index `length` on; scratch slots go when committed ones go."""
        if length < 0:
            raise ValueError(f"a length is not negative, got {length}")
        del self.token_ids[length:]
        if length < self.num_cached:
            self.num_cached = length
            self._drop_unused()

    def release_scratch(self) -> None:
        """Give the blocks past the committed tokens back."""
        self._drop_unused()

    def free(self) -> None:
        """Give every block back; the tokens stay, so that the sequence can be computed again."""
        self._blocks.release(self.block_table)
        self.block_table = []
        self._hashes = []
        self.num_cached = 0

    @property
    def _first_written(self) -> int:
        """Index of the block that the first scratch slot lies in."""
        return self.num_cached // self._blocks.block_size

    def _shared_tail(self, num_slots: int) -> list[int]:
        """Indices of our blocks that a write would change under somebody else's eyes."""
        if not num_slots:
            return []
        written = range(self._first_written, len(self.block_table))
        return [index for index in written if self._blocks.is_shared(self.block_table[index])]

    def _register_full(self) -> None:
        size = self._blocks.block_size
        while (len(self._hashes) + 1) * size <= self.num_cached:
            start = len(self._hashes) * size
            previous = self._hashes[-1] if self._hashes else b""
            block_hash = self._blocks.next_hash(previous, self.token_ids[start : start + size])
            self._blocks.register(self.block_table[len(self._hashes)], block_hash)
            self._hashes.append(block_hash)

    def _drop_unused(self) -> None:
        used = self._blocks.blocks_for(self.num_cached)
        self._blocks.release(self.block_table[used:])
        del self.block_table[used:]
        del self._hashes[used:]
