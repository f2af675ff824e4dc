"""Passes of small sequences on scattered pages, and what stock `transformers` says of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from specinfer.tree import TokenTree
from specinfer_engine.batch import SequenceRows
from specinfer_engine.runner import Runner


class Pages:
    """Hands out blocks of a pool in random order, so no sequence lies in one piece."""

    def __init__(self, num_blocks: int, block_size: int, seed: int = 0) -> None:
        self.block_size = block_size
        self._free = random.Random(seed).sample(range(num_blocks), num_blocks)

    def table(self, num_slots: int) -> tuple[int, ...]:
        """Blocks for a new sequence of at most `num_slots` tokens and scratch nodes."""
        count = -(-num_slots // self.block_size)
        taken, self._free = self._free[:count], self._free[count:]
        assert len(taken) == count, "the test's pool is too small"
        return tuple(taken)


def slot(table: Sequence[int], index: int, block_size: int) -> int:
    """Place in the pool of logical slot `index`."""
    return table[index // block_size] * block_size + index % block_size


def random_tree(generator: random.Random, num_nodes: int, vocab_size: int) -> TokenTree:
    """A tree of any shape: each node below a random earlier one, siblings with other tokens."""
    token_ids, parents = [generator.randrange(vocab_size)], [-1]
    taken: set[tuple[int, int]] = set()
    while len(token_ids) < num_nodes:
        edge = (generator.randrange(len(token_ids)), generator.randrange(vocab_size))
        if edge not in taken:
            taken.add(edge)
            parents.append(edge[0])
            token_ids.append(edge[1])
    return TokenTree(tuple(token_ids), tuple(parents))


def stock_model(folder: Path, dtype: torch.dtype, attention: str = "sdpa") -> Any:
    """The checkpoint as `transformers` alone runs it."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation=attention,
        experts_implementation="eager",
        local_files_only=True,
    )
    return model.eval()


@torch.inference_mode()
def stock_logits(model: Any, token_ids: Sequence[int]) -> Tensor:
    """Logits of all positions of one sequence, [num_tokens, vocab_size]."""
    logits: Tensor = model(torch.tensor([list(token_ids)]), use_cache=False).logits[0]
    return logits


def stock_tree_logits(model: Any, context: Sequence[int], tree: TokenTree) -> Tensor:
    """For each node the last row of a plain pass over context + path, [num_nodes, vocab_size]."""
    return torch.stack(
        [
            stock_logits(model, [*context, *tree.path_token_ids(node)])[-1]
            for node in range(len(tree))
        ]
    )


def prefill(runner: Runner, token_ids: Sequence[int], table: Sequence[int], *cuts: int) -> Tensor:
    """Feed tokens alone, cut into chunks at `cuts`; logits of every token."""
    edges = [0, *cuts, len(token_ids)]
    logits = []
    for start, end in pairwise(edges):
        chunk = token_ids[start:end]
        rows = SequenceRows.chain(chunk, start, table, range(len(chunk)))
        logits.append(runner.forward([rows])[0])
    return torch.cat(logits)
