"""Blocks: prefix sharing, reference counts, eviction order."""

from __future__ import annotations

import random

import pytest

from specinfer.errors import ResourceExhausted
from specinfer_engine.blocks import BlockManager


def fill(blocks: BlockManager, token_ids: list[int]) -> list[int]:
    """Allocate and register full blocks for `token_ids`, as a sequence would."""
    size = blocks.block_size
    taken = blocks.allocate(len(token_ids) // size)
    previous = b""
    for index, block in enumerate(taken):
        previous = blocks.next_hash(previous, token_ids[index * size : (index + 1) * size])
        blocks.register(block, previous)
    return taken


def test_allocate_is_all_or_nothing() -> None:
    blocks = BlockManager(4, 2)
    first = blocks.allocate(3)
    with pytest.raises(ResourceExhausted):
        blocks.allocate(2)
    assert blocks.num_free_blocks == 1
    blocks.release(first)
    assert blocks.num_free_blocks == 4
    assert len(set(blocks.allocate(4))) == 4


def test_a_registered_prefix_is_found_after_its_owner_left() -> None:
    blocks = BlockManager(4, 2)
    tokens = [1, 2, 3, 4]
    taken = fill(blocks, tokens)
    blocks.release(taken)
    assert blocks.num_free_blocks == 4
    assert blocks.num_cached_blocks == 2
    found, hashes = blocks.find_prefix([1, 2, 3, 4, 5])
    assert found == taken
    assert len(set(hashes)) == 2
    assert blocks.num_free_blocks == 2


def test_the_chain_breaks_at_the_first_other_token() -> None:
    blocks = BlockManager(4, 2)
    taken = fill(blocks, [1, 2, 3, 4])
    assert blocks.find_prefix([1, 2, 9, 4])[0] == taken[:1]
    assert blocks.find_prefix([9, 2, 3, 4])[0] == []


def test_the_same_block_after_another_beginning_is_another_block() -> None:
    blocks = BlockManager(4, 2)
    fill(blocks, [1, 2, 7, 8])
    assert blocks.find_prefix([7, 8])[0] == []


def test_hashes_of_two_models_differ() -> None:
    first, second = BlockManager(1, 2, model_hash="a"), BlockManager(1, 2, model_hash="b")
    assert first.next_hash(b"", [1, 2]) != second.next_hash(b"", [1, 2])


def test_eviction_takes_the_oldest_and_the_end_before_the_beginning() -> None:
    blocks = BlockManager(4, 1)
    older, newer = fill(blocks, [1, 2]), fill(blocks, [5, 6])
    blocks.release(older)
    blocks.release(newer)
    blocks.allocate(1)
    assert blocks.find_prefix([1, 2])[0] == older[:1]
    blocks.release(older[:1])
    blocks.allocate(2)
    assert blocks.find_prefix([5, 6])[0] == []
    assert blocks.find_prefix([1, 2])[0] == older[:1]


def test_a_block_in_use_is_never_evicted() -> None:
    blocks = BlockManager(2, 1)
    taken = fill(blocks, [1, 2])
    with pytest.raises(ResourceExhausted):
        blocks.allocate(1)
    assert blocks.find_prefix([1, 2])[0] == taken
    blocks.release(taken)
    assert blocks.num_free_blocks == 0


def test_the_first_of_two_equal_blocks_keeps_the_hash() -> None:
    blocks = BlockManager(2, 2)
    first, second = fill(blocks, [1, 2]), fill(blocks, [1, 2])
    blocks.release(second)
    assert blocks.num_cached_blocks == 0
    assert blocks.find_prefix([1, 2])[0] == first


def test_a_written_block_is_forgotten_and_a_shared_one_refuses() -> None:
    blocks = BlockManager(2, 2)
    (block,) = fill(blocks, [1, 2])
    blocks.find_prefix([1, 2])
    assert blocks.is_shared(block)
    with pytest.raises(ValueError, match="references"):
        blocks.make_writable(block)
    blocks.release([block])
    blocks.make_writable(block)
    assert blocks.find_prefix([1, 2])[0] == []


def test_a_double_release_is_an_error() -> None:
    blocks = BlockManager(2, 2)
    taken = blocks.allocate(1)
    blocks.release(taken)
    with pytest.raises(ValueError, match="no reference"):
        blocks.release(taken)


def test_no_block_is_lost_in_random_use() -> None:
    rng = random.Random(7)
    blocks = BlockManager(12, 2)
    held: list[list[int]] = []
    for _ in range(5000):
        if held and rng.random() < 0.5:
            blocks.release(held.pop(rng.randrange(len(held))))
            continue
        tokens = [rng.randrange(3) for _ in range(rng.randrange(9))]
        found, _ = blocks.find_prefix(tokens)
        missing = len(tokens) // 2 - len(found)
        if missing <= blocks.num_free_blocks:
            fresh = blocks.allocate(missing)
            previous = b""
            for index, block in enumerate(found + fresh):
                previous = blocks.next_hash(previous, tokens[2 * index : 2 * index + 2])
                blocks.register(block, previous)
            found += fresh
        held.append(found)
        in_use = {block for taken in held for block in taken}
        assert blocks.num_free_blocks == 12 - len(in_use)
    for taken in held:
        blocks.release(taken)
    assert blocks.num_free_blocks == 12
    blocks.drop_cache()
    assert blocks.num_cached_blocks == 0
    assert sorted(blocks.allocate(12)) == list(range(12))
