"""Who holds which block of the KV pool: prefix sharing, copy-on-write and eviction.

A block is an index into the pool; `block_size` tokens' keys and values live in it. A block that is
full and committed may be registered under the hash of everything up to its end, and then any
sequence with the same beginning shares it. This module knows nothing of tensors, models or
sessions: it hands out numbers, and its callers copy and write what the numbers stand for.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence

from specinfer.errors import ResourceExhausted
from specinfer.prefixes import PrefixChanges, hash_block, hash_key


class BlockManager:
    """Counts references to blocks, shares full prefixes and evicts the least recently used.

    A block is in exactly one of three states: free, referenced, or cached (registered, referenced
    by nobody, reusable by its hash and evicted from the oldest on). `changes` is told which blocks
    are registered and which no longer.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        model_hash: str = "",
        changes: PrefixChanges | None = None,
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs blocks, got {num_blocks} of {block_size} tokens")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_tokens_sought = 0
        self.num_tokens_found = 0
        self._key = hash_key(model_hash)
        self._changes = changes
        self._free: deque[int] = deque(range(num_blocks))
        self._references = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free_blocks(self) -> int:
        """Blocks that `allocate` can hand out, evicting cached prefixes where it must."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached_blocks(self) -> int:
        """Blocks that hold a prefix nobody uses at the moment."""
        return len(self._cached)

    def count_lookup(self, num_tokens: int, num_found: int) -> None:
        """Note a look for `num_tokens` tokens that found `num_found` of them."""
        self.num_tokens_sought += num_tokens
        self.num_tokens_found += num_found

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens take."""
        return -(-num_tokens // self.block_size)

    def next_hash(self, previous: bytes, token_ids: Sequence[int]) -> bytes:
        """Hash of the full block `token_ids` that follows a block hashed to `previous`."""
        return hash_block(previous, token_ids, self._key)

    def find_prefix(self, token_ids: Sequence[int]) -> tuple[list[int], list[bytes]]:
        """Take a reference to every registered block at the beginning of `token_ids`.

        Returns:
            The blocks in order and their hashes; only full blocks are ever found.
        """
        blocks: list[int] = []
        hashes: list[bytes] = []
        previous = b""
        for end in range(self.block_size, len(token_ids) + 1, self.block_size):
            previous = self.next_hash(previous, token_ids[end - self.block_size : end])
            block = self._by_hash.get(previous)
            if block is None:
                break
            self._references[block] += 1
            self._cached.pop(block, None)
            blocks.append(block)
            hashes.append(previous)
        return blocks, hashes

    def allocate(self, num_blocks: int) -> list[int]:
        """Hand out `num_blocks` blocks with one reference each, all or none.

        Raises:
            ResourceExhausted: when fewer blocks are free or evictable.
        """
        if num_blocks > self.num_free_blocks:
            raise ResourceExhausted(
                f"{num_blocks} KV blocks needed and {self.num_free_blocks} free of "
                f"{self.num_blocks}"
            )
        return [self._take() for _ in range(num_blocks)]

    def is_shared(self, block: int) -> bool:
        """Whether somebody else refers to the block, so that it must be copied before a write."""
        return self._references[block] > 1

    def make_writable(self, block: int) -> None:
        """Forget the hash of a block that its only owner is about to change."""
        if self._references[block] != 1:
            raise ValueError(f"block {block} has {self._references[block]} references, not one")
        self._unregister(block)

    def register(self, block: int, block_hash: bytes) -> None:
        """Offer a full, written block to every sequence with the same beginning.

        The first block with a hash keeps it; a second one with the same content stays private.
        """
        if self._hashes[block] is None and block_hash not in self._by_hash:
            self._hashes[block] = block_hash
            self._by_hash[block_hash] = block
            if self._changes is not None:
                self._changes.add(block_hash)

    def release(self, blocks: Sequence[int]) -> None:
        """Give back one reference to each block, the last block first.

        The end of a sequence is thus older than its beginning and is evicted before it.
        """
        for block in reversed(blocks):
            if self._references[block] < 1:
                raise ValueError(f"block {block} is released and has no reference")
            self._references[block] -= 1
            if self._references[block]:
                continue
            if self._hashes[block] is None:
                self._free.append(block)
            else:
                self._cached[block] = None

    def drop_cache(self) -> None:
        """Evict every prefix that nobody uses."""
        while self._cached:
            self._free.append(self._evict())

    def _take(self) -> int:
        block = self._free.popleft() if self._free else self._evict()
        self._references[block] = 1
        return block

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        self._unregister(block)
        return block

    def _unregister(self, block: int) -> None:
        block_hash = self._hashes[block]
        if block_hash is not None:
            self._hashes[block] = None
            del self._by_hash[block_hash]
            if self._changes is not None:
                self._changes.remove(block_hash)
