"""Language models made of tables, and a runner whose KV pool holds tokens.

A row's logits are a function of the tokens it can see through its block table and ancestor set, so
a block shared wrongly, a slot moved wrongly or a node seen wrongly changes the output, and a pass
costs microseconds. Knows the rows of a pass, no real model.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from specinfer.tree import TokenTree
from specinfer_engine.batch import SequenceRows

Place = tuple[int, int] | None
"""What a slot holds: a token and the position it was written for."""

Draft = Callable[[Sequence[int]], TokenTree]
"""All tokens so far -> a tree below the last one."""


class TableModel:
    """Logits that depend on the last `order` tokens of the context and on nothing else."""

    def __init__(self, vocab_size: int, *, order: int = 4, seed: int = 0) -> None:
        self.vocab_size = vocab_size
        self._order = order
        self._seed = seed
        self._known: dict[tuple[object, ...], Tensor] = {}

    def logits(self, context: Sequence[object]) -> Tensor:
        """float32 [vocab_size] after a context."""
        key = tuple(context[-self._order :])
        if key not in self._known:
            digest = hashlib.sha256(repr((self._seed, key)).encode()).digest()
            rng = random.Random(digest)
            self._known[key] = torch.tensor([rng.gauss(0.0, 2.0) for _ in range(self.vocab_size)])
        return self._known[key]


class TableRunner:
    """Runs a table model over a pool of slots that hold tokens and positions."""

    def __init__(self, model: TableModel, num_blocks: int, block_size: int) -> None:
        self.model = model
        self.block_size = block_size
        self.slots: list[Place] = [None] * (num_blocks * block_size)
        self.num_passes = 0
        self.num_rows: list[int] = []

    def forward(self, rows: Sequence[SequenceRows]) -> list[Tensor]:
        """Write every row's token into its slot, then read each wanted row's context back."""
        self.num_passes += 1
        self.num_rows.append(sum(len(part.token_ids) for part in rows))
        for part in rows:
            for row, token_id in enumerate(part.token_ids):
                slot = self._slot(part, part.context_len + part.first_node + row)
                self.slots[slot] = (token_id, part.context_len + part.depths[row])
        return [self._logits(part) for part in rows]

    def compact(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """All sources are read before any target is written."""
        content = [self.slots[source] for source in sources]
        for target, place in zip(targets, content, strict=True):
            self.slots[target] = place

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """All sources are read before any target is written."""
        size = self.block_size
        content = [self.slots[block * size : (block + 1) * size] for block in sources]
        for block, places in zip(targets, content, strict=True):
            self.slots[block * size : (block + 1) * size] = places

    def _slot(self, part: SequenceRows, index: int) -> int:
        return part.block_table[index // self.block_size] * self.block_size + (
            index % self.block_size
        )

    def _logits(self, part: SequenceRows) -> Tensor:
        if not part.logit_rows:
            return torch.zeros(0, self.model.vocab_size)
        return torch.stack([self.model.logits(self._context(part, r)) for r in part.logit_rows])

    def _context(self, part: SequenceRows, row: int) -> list[object]:
        """Tokens that a row sees; a place written for another position spoils the context."""
        node = part.first_node + row
        bits = part.ancestors[row] if part.ancestors else (1 << (node + 1)) - 1
        indices = [*range(part.context_len)]
        indices += [part.context_len + j for j in range(bits.bit_length()) if bits >> j & 1]
        places = [self.slots[self._slot(part, index)] for index in indices]
        return [
            place[0] if place is not None and place[1] == position else (position, place)
            for position, place in enumerate(places)
        ]


def tree_laws(
    model: TableModel, token_ids: Sequence[int], tree: TokenTree
) -> Callable[[int], Tensor]:
    """The model's logits at each node of a tree below the last of `token_ids`."""
    before = tuple(token_ids[:-1])
    return lambda node: model.logits([*before, *tree.path_token_ids(node)])


def greedy_output(prompt: Sequence[int], num_tokens: int, vocab_size: int) -> tuple[int, ...]:
    """What the table model says greedily after a prompt."""
    tokens, model = list(prompt), TableModel(vocab_size)
    for _ in range(num_tokens):
        tokens.append(int(model.logits(tokens).argmax()))
    return tuple(tokens[len(prompt) :])


def draft_nothing(token_ids: Sequence[int]) -> TokenTree:
    """Plain decoding."""
    return TokenTree.root_only(token_ids[-1])


def random_drafter(
    rng: random.Random,
    vocab_size: int,
    *,
    max_nodes: int = 12,
    known: Sequence[int] = (),
    hit_rate: float = 0.8,
) -> Draft:
    """A drafter of random trees in random topological order.

    `known` is the whole right sequence when there is one: nodes on the right path are then guessed
    right with probability `hit_rate`, wherever in the order they come.
    """

    def draft(token_ids: Sequence[int]) -> TokenTree:
        tokens, parents = [token_ids[-1]], [-1]
        right_depth = {0: 0}  # node on the right path -> depth
        taken: set[tuple[int, int]] = set()
        for _ in range(rng.randrange(max_nodes)):
            parent = rng.randrange(len(tokens))
            if right_depth and rng.random() < hit_rate:
                parent = max(right_depth)
            token_id = rng.randrange(vocab_size)
            place = len(token_ids) + right_depth.get(parent, 0)
            on_path = parent in right_depth and place < len(known)
            if on_path and rng.random() < hit_rate:
                token_id = known[place]
            if (parent, token_id) in taken:
                continue
            taken.add((parent, token_id))
            if on_path and token_id == known[place]:
                right_depth[len(tokens)] = right_depth[parent] + 1
            tokens.append(token_id)
            parents.append(parent)
        return TokenTree(tuple(tokens), tuple(parents))

    return draft
