"""Names of KV prefixes, and the directory that says which verify worker holds which of them.

A full block of tokens is named by a hash of its tokens and of the block before it, so that equal
names mean equal beginnings. Routers and workers compute the same names and no tokens are told. This
module knows nothing of pools, tensors or where the directory is.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

HASH_BYTES = 16
KEY_BYTES = 32
# Longest beginning that is looked for, in blocks; what lies further on changes no decision.
MAX_CHAIN_BLOCKS = 1024
# Most blocks that a worker says it holds, and most changes that it tells at once.
MAX_PUBLISHED_BLOCKS = 32_768
MAX_CHANGES = 2048
# How long a worker's part of the directory outlives its last word.
PREFIX_SECONDS = 10.0


def hash_key(model_hash: str) -> bytes:
    """The key of a model's block hashes, [KEY_BYTES]."""
    return hashlib.sha256(model_hash.encode()).digest()[:KEY_BYTES]


def hash_block(previous: bytes, token_ids: Sequence[int], key: bytes) -> bytes:
    """Hash of a full block and of all before it, [HASH_BYTES].

    Keyed 128-bit BLAKE2b, so neither a crafted prompt nor another model's tokens meet a block that
    is not theirs.
    """
    return _hash(previous, array("q", token_ids), key)


def hash_chain(token_ids: Sequence[int], block_size: int, key: bytes) -> list[bytes]:
    """Hashes of the full blocks at the beginning of `token_ids`, at most MAX_CHAIN_BLOCKS."""
    num_blocks = min(len(token_ids) // block_size, MAX_CHAIN_BLOCKS)
    tokens = memoryview(array("q", token_ids[: num_blocks * block_size]))
    chain: list[bytes] = []
    previous = b""
    for start in range(0, len(tokens), block_size):
        previous = _hash(previous, tokens[start : start + block_size], key)
        chain.append(previous)
    return chain


def _hash(previous: bytes, tokens: array[int] | memoryview[int], key: bytes) -> bytes:
    digest = hashlib.blake2b(previous, digest_size=HASH_BYTES, key=key)
    digest.update(tokens)
    return digest.digest()


@dataclass(frozen=True)
class HeldPrefix:
    """What a worker holds of a chain.

    Attributes:
        num_blocks: full blocks from the beginning on.
        since: when the last of them was published, in seconds of the directory's clock; 0 if none.
    """

    num_blocks: int = 0
    since: float = 0.0


class PrefixDirectory(Protocol):
    """Who holds what; every method may raise Unavailable."""

    async def publish(
        self,
        worker_id: str,
        version: int,
        added: Sequence[bytes],
        removed: Sequence[bytes],
    ) -> bool:
        """Bring a worker's part from `version` to the next one, and keep it for PREFIX_SECONDS.

        Version 0 begins anew. At most MAX_CHANGES hashes.

        Returns:
            Whether the directory was at that version; if not, nothing was changed.
        """
        ...

    async def forget(self, worker_id: str) -> None:
        """Drop a worker's part."""
        ...

    async def find(self, worker_ids: Sequence[str], chain: Sequence[bytes]) -> Sequence[HeldPrefix]:
        """What each worker holds of a chain, in one call."""
        ...


class PrefixChanges:
    """Blocks that came to a pool and left it since they were last asked for.

    Written by an engine's thread, read by another. A block that came and left in between is no
    change, so there are never more than a pool has blocks, twice.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._added: dict[bytes, None] = {}
        self._removed: dict[bytes, None] = {}

    def add(self, block_hash: bytes) -> None:
        """Note a block that can be found from now on."""
        with self._lock:
            if block_hash in self._removed:
                del self._removed[block_hash]
            else:
                self._added[block_hash] = None

    def remove(self, block_hash: bytes) -> None:
        """Note a block that cannot be found any more."""
        with self._lock:
            if block_hash in self._added:
                del self._added[block_hash]
            else:
                self._removed[block_hash] = None

    def take(self) -> tuple[list[bytes], list[bytes]]:
        """What came and what left, in order; they are told once."""
        with self._lock:
            added, self._added = self._added, {}
            removed, self._removed = self._removed, {}
        return list(added), list(removed)


class PrefixPublisher:
    """Tells a directory what a worker's pool holds, a bounded piece at each call.

    A pool with more than MAX_PUBLISHED_BLOCKS tells of those that came first; the pool evicts what
    is not used, which makes room. A directory that lost what it knew is told everything again.
    """

    def __init__(self, directory: PrefixDirectory, worker_id: str, changes: PrefixChanges) -> None:
        self._directory = directory
        self._worker_id = worker_id
        self._changes = changes
        self._held: dict[bytes, None] = {}
        # What is not told yet, by whether the block is held.
        self._untold: dict[bytes, bool] = {}
        self._version = 0

    async def publish(self) -> None:
        """Tell the next piece, or only that the worker is still there.

        Raises:
            Unavailable: the directory is away; what was to be told is told later.
        """
        self._note()
        piece = list(itertools.islice(self._untold.items(), MAX_CHANGES))
        known = await self._directory.publish(
            self._worker_id,
            self._version,
            [block_hash for block_hash, held in piece if held],
            [block_hash for block_hash, held in piece if not held],
        )
        if not known:
            self._begin_anew()
            return
        self._version += 1
        for block_hash, _ in piece:
            del self._untold[block_hash]

    async def withdraw(self) -> None:
        """Take everything back; raises Unavailable."""
        await self._directory.forget(self._worker_id)

    def _note(self) -> None:
        added, removed = self._changes.take()
        for block_hash in removed:
            if block_hash in self._held:
                del self._held[block_hash]
                self._untold[block_hash] = False
        for block_hash in added:
            if len(self._held) < MAX_PUBLISHED_BLOCKS:
                self._held[block_hash] = None
                self._untold[block_hash] = True
        if len(self._untold) > 2 * MAX_PUBLISHED_BLOCKS:
            self._begin_anew()

    def _begin_anew(self) -> None:
        self._version = 0
        self._untold = dict.fromkeys(self._held, True)
