"""Cuts chats of similar length into padded batches. Refuses to know where chats come from."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from .tokenizer import Chat

_POOL_BATCHES = 12


@dataclass(frozen=True)
class Batch:
    """Right-padded rows.

    ``input_ids`` [rows, length] int64; ``positions`` [num_answers] int64 are flat indices into
    rows * length whose next token is ``labels`` [num_answers] int64; ``rows`` are the indices of
    the chats in the sequence they were drawn from.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    rows: tuple[int, ...]


def collate(chats: Sequence[Chat], rows: Sequence[int], pad_id: int) -> Batch:
    """One batch of the chats at ``rows``. Padding sits on the right, so causal attention
    needs no mask."""
    length = max(len(chats[row].ids) for row in rows)
    input_ids = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    positions: list[int] = []
    labels: list[int] = []
    for line, row in enumerate(rows):
        chat = chats[row]
        input_ids[line, : len(chat.ids)] = torch.tensor(chat.ids)
        for place in range(1, len(chat.ids)):
            if chat.is_answer[place]:
                positions.append(line * length + place - 1)
                labels.append(chat.ids[place])
    return Batch(input_ids, torch.tensor(positions), torch.tensor(labels), tuple(rows))


def iter_batches(
    chats: Sequence[Chat], max_tokens: int, pad_id: int, rng: random.Random
) -> Iterator[Batch]:
    """One pass over ``chats`` in random order, in batches of at most ``max_tokens`` with padding.

    Chats are sorted by length inside pools of a few batches only, so that batches stay mixed.
    """
    order = list(range(len(chats)))
    rng.shuffle(order)
    pool_rows: list[int] = []
    pool_tokens = 0
    for row in order:
        pool_rows.append(row)
        pool_tokens += len(chats[row].ids)
        if pool_tokens >= max_tokens * _POOL_BATCHES:
            yield from _cut(chats, pool_rows, max_tokens, pad_id, rng)
            pool_rows, pool_tokens = [], 0
    yield from _cut(chats, pool_rows, max_tokens, pad_id, rng)


def _cut(
    chats: Sequence[Chat], rows: list[int], max_tokens: int, pad_id: int, rng: random.Random
) -> Iterator[Batch]:
    rows.sort(key=lambda row: len(chats[row].ids))
    groups: list[list[int]] = [[]]
    for row in rows:
        if groups[-1] and (len(groups[-1]) + 1) * len(chats[row].ids) > max_tokens:
            groups.append([])
        groups[-1].append(row)
    rng.shuffle(groups)
    for group in groups:
        if group:
            yield collate(chats, group, pad_id)
