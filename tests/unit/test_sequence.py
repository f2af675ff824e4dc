"""Sequences: reserving, committing accepted nodes, truncating, sharing and copying blocks."""

from __future__ import annotations

import random

import pytest

from specinfer.errors import ResourceExhausted
from specinfer_engine.blocks import BlockManager
from specinfer_engine.sequence import Moves, SequenceState


class Pool:
    """A pool of slots that hold tokens where a real one holds keys and values."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.size = block_size
        self.slots: list[int | None] = [None] * (num_blocks * block_size)

    def copy_blocks(self, moves: Moves) -> None:
        content = [self.slots[b * self.size : (b + 1) * self.size] for b in moves.sources]
        for block, tokens in zip(moves.targets, content, strict=True):
            self.slots[block * self.size : (block + 1) * self.size] = tokens

    def compact(self, moves: Moves) -> None:
        for source, target in zip(moves.sources, moves.targets, strict=True):
            self.slots[target] = self.slots[source]

    def write(self, state: SequenceState, first_node: int, token_ids: list[int]) -> None:
        for node, token_id in enumerate(token_ids, first_node):
            self.slots[state.slot(state.num_cached + node)] = token_id

    def read(self, state: SequenceState) -> list[int | None]:
        return [self.slots[state.slot(index)] for index in range(state.num_cached)]


def prefill(pool: Pool, state: SequenceState) -> None:
    missing = state.token_ids[state.num_cached :]
    pool.copy_blocks(state.reserve(len(missing)))
    pool.write(state, 0, missing)
    pool.compact(state.commit(range(len(missing))))


def test_commit_moves_the_accepted_nodes_down() -> None:
    blocks, pool = BlockManager(8, 4), Pool(8, 4)
    state = SequenceState(blocks, [10, 11, 12, 13, 14])
    prefill(pool, state)
    assert state.num_missing == 0
    state.append([20])
    pool.copy_blocks(state.reserve(6))
    pool.write(state, 0, [20, 21, 22, 23, 24, 25])
    state.append([22, 25, 30])
    moves = state.commit([0, 2, 5])
    pool.compact(moves)
    assert len(moves.sources) == 2
    assert pool.read(state) == [10, 11, 12, 13, 14, 20, 22, 25]
    assert state.token_ids[-1] == 30
    assert state.num_missing == 1
    assert len(state.block_table) == 2


def test_a_commit_without_gaps_moves_nothing() -> None:
    blocks = BlockManager(2, 4)
    state = SequenceState(blocks, [1, 2, 3])
    state.reserve(3)
    assert state.commit([0, 1, 2]) == Moves()


@pytest.mark.parametrize("nodes", [[1, 0], [0, 0]])
def test_nodes_out_of_order_are_refused(nodes: list[int]) -> None:
    state = SequenceState(BlockManager(2, 4), [1, 2, 3])
    state.reserve(3)
    with pytest.raises(ValueError, match="ascending"):
        state.commit(nodes)


def test_more_nodes_than_tokens_are_refused() -> None:
    state = SequenceState(BlockManager(2, 4), [1])
    state.reserve(3)
    with pytest.raises(ValueError, match="waiting"):
        state.commit([0, 1])


def test_reserve_fails_without_a_change() -> None:
    blocks = BlockManager(2, 4)
    state = SequenceState(blocks, [1, 2, 3])
    with pytest.raises(ResourceExhausted):
        state.reserve(9)
    assert blocks.num_free_blocks == 2
    assert state.block_table == []


def test_the_prefix_is_shared_and_the_last_token_is_not_cached() -> None:
    blocks, pool = BlockManager(8, 4), Pool(8, 4)
    first = SequenceState(blocks, list(range(9)))
    prefill(pool, first)
    second = SequenceState(blocks, list(range(9)))
    assert second.share_prefix() == 8
    assert second.block_table == first.block_table[:2]
    whole = SequenceState(blocks, list(range(8)))
    assert whole.share_prefix() == 7
    assert pool.read(whole) == list(range(7))


def test_a_shared_partial_tail_is_copied_before_it_is_written() -> None:
    blocks, pool = BlockManager(8, 4), Pool(8, 4)
    first = SequenceState(blocks, list(range(8)))
    prefill(pool, first)
    second = SequenceState(blocks, list(range(8)))
    second.share_prefix()
    moves = second.reserve(3)
    assert moves.sources == (first.block_table[1],)
    pool.copy_blocks(moves)
    pool.write(second, 0, [7, 90, 91])
    second.append([90])
    second.commit([0, 1])
    assert pool.read(first) == list(range(8))
    assert pool.read(second) == [*range(8), 90]


def test_truncate_rolls_back_and_another_continuation_leaves_no_stale_hash() -> None:
    blocks, pool = BlockManager(8, 4), Pool(8, 4)
    state = SequenceState(blocks, list(range(8)))
    prefill(pool, state)
    state.truncate(6)
    assert (len(state), state.num_cached, len(state.block_table)) == (6, 6, 2)
    state.append([50, 51])
    prefill(pool, state)
    assert blocks.find_prefix(list(range(8)))[0] == state.block_table[:1]
    assert blocks.find_prefix([0, 1, 2, 3, 4, 5, 50, 51])[0] == state.block_table


def test_truncate_of_waiting_tokens_keeps_the_scratch_slots() -> None:
    blocks, pool = BlockManager(8, 2), Pool(8, 2)
    state = SequenceState(blocks, [1, 2])
    prefill(pool, state)
    state.append([3])
    state.reserve(4)
    pool.write(state, 0, [3, 4, 5, 6])
    state.truncate(2)
    state.append([3, 4])
    pool.compact(state.commit([0, 1]))
    assert pool.read(state) == [1, 2, 3, 4]
    state.reserve(3)
    state.release_scratch()
    assert len(state.block_table) == 2


def test_free_keeps_the_tokens_and_the_cache_brings_the_blocks_back() -> None:
    blocks, pool = BlockManager(8, 4), Pool(8, 4)
    state = SequenceState(blocks, list(range(10)))
    prefill(pool, state)
    state.free()
    assert blocks.num_free_blocks == 8
    assert state.token_ids == list(range(10))
    assert state.share_prefix() == 8


def test_random_rounds_keep_content_and_lose_no_block() -> None:
    rng = random.Random(3)
    blocks, pool = BlockManager(40, 4), Pool(40, 4)
    states: list[SequenceState] = []
    for _ in range(4000):
        draw = rng.random()
        if len(states) < 4 or draw < 0.05:
            states.append(SequenceState(blocks, [rng.randrange(2) for _ in range(9)]))
            states[-1].share_prefix()
        state = rng.choice(states)
        if draw > 0.9 or len(state) > 30:
            state.free()
            states.remove(state)
        elif draw > 0.8:
            state.truncate(rng.randrange(1, len(state) + 1))
        elif state.blocks_needed(state.num_missing + 6) <= blocks.num_free_blocks:
            prefill(pool, state)
            nodes = sorted(rng.sample(range(6), rng.randrange(1, 6)))
            scratch = [rng.randrange(2) for _ in range(6)]
            pool.copy_blocks(state.reserve(6))
            pool.write(state, 0, scratch)
            state.append([scratch[node] for node in nodes])
            pool.compact(state.commit(nodes))
        for other in states:
            assert pool.read(other) == other.token_ids[: other.num_cached]
    for state in states:
        state.free()
    assert blocks.num_free_blocks == 40
