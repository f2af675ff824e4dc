"""Rows of several sequences become the tensors that one pass needs."""

import random

import pytest
import torch

from specinfer.tree import TokenTree
from specinfer_engine.batch import ForwardBatch, SequenceRows, build_batch
from tests.kit.passes import random_tree

TREE = TokenTree(token_ids=(7, 8, 9, 5), parents=(-1, 0, 0, 2))


def seen(batch: ForwardBatch, row: int) -> set[int]:
    """Scratch nodes that a row of the pass sees."""
    words = batch.layout.ancestors[row].tolist()
    return {
        64 * word + bit for word, bits in enumerate(words) for bit in range(64) if bits >> bit & 1
    }


def test_a_chunk_and_a_tree_share_a_pass() -> None:
    chunk = SequenceRows.chain((1, 2, 3), 3, (4, 0), (2,))
    tree = SequenceRows.tree(TREE, 1, (2, 1), (0, 3))
    batch = build_batch([chunk, tree], block_size=4)

    assert batch.num_rows == 7
    assert batch.token_ids.tolist() == [1, 2, 3, 7, 8, 9, 5]
    assert batch.positions.tolist() == [3, 4, 5, 1, 2, 2, 3]
    assert batch.slot_mapping.tolist() == [19, 0, 1, 9, 10, 11, 4]
    assert batch.layout.row_offsets.tolist() == [0, 3, 7]
    assert batch.layout.context_lens.tolist() == [3, 1]
    assert batch.layout.block_tables.tolist() == [[4, 0], [2, 1]]
    assert [seen(batch, row) for row in range(7)] == [
        {0},
        {0, 1},
        {0, 1, 2},
        {0},
        {0, 1},
        {0, 2},
        {0, 2, 3},
    ]
    assert batch.logit_index.tolist() == [2, 3, 6]
    assert batch.logit_counts == (1, 2)
    kinds = (batch.layout.row_offsets, batch.layout.context_lens, batch.layout.block_tables)
    assert all(tensor.dtype == torch.int32 for tensor in kinds)
    assert batch.layout.ancestors.dtype == batch.slot_mapping.dtype == torch.int64
    # Where kernels read whole vectors, also behind an odd number of others.
    pieces = (batch.token_ids, batch.positions, batch.slot_mapping, batch.logit_index, *kinds)
    first = min(tensor.data_ptr() for tensor in pieces[:4])
    assert all((tensor.data_ptr() - first) % 16 == 0 for tensor in pieces[:4])
    assert all((tensor.data_ptr() - kinds[0].data_ptr()) % 16 == 0 for tensor in kinds)


def test_a_tree_asks_for_all_logits_unless_told() -> None:
    assert SequenceRows.tree(TREE, 0, (0,)).logit_rows == (0, 1, 2, 3)
    assert SequenceRows.tree(TREE, 0, (0,), ()).logit_rows == ()
    assert SequenceRows.chain((1, 2), 0, (0,)).logit_rows == ()


def test_a_drafter_grows_level_by_level() -> None:
    """Rows of a later pass see scratch nodes of earlier ones and lie behind them."""
    level = SequenceRows(
        token_ids=(5, 6),
        context_len=6,
        first_node=3,
        depths=(2, 2),
        ancestors=(0b01011, 0b10101),
        block_table=(3, 1, 2),
        logit_rows=(1, 0),
    )
    batch = build_batch([level], block_size=4)
    assert batch.positions.tolist() == [8, 8]
    assert batch.slot_mapping.tolist() == [9, 10]
    assert [seen(batch, 0), seen(batch, 1)] == [{0, 1, 3}, {0, 2, 4}]
    assert batch.logit_index.tolist() == [1, 0]


@pytest.mark.parametrize("count", [1, 63, 64, 65, 128, 512])
def test_long_chains_are_triangles_of_words(count: int) -> None:
    chunk = SequenceRows.chain((0,) * count, 0, range(count), ())
    batch = build_batch([chunk], block_size=1)
    assert batch.layout.ancestors.shape == (count, -(-count // 64))
    for row in {0, count // 2, count - 1}:
        assert seen(batch, row) == set(range(row + 1))


def test_wide_trees_and_chains_agree_on_the_number_of_words() -> None:
    tree = random_tree(random.Random(3), 150, 1000)
    short = SequenceRows.chain((1, 2), 0, (1, 2, 3), ())
    batch = build_batch([short, SequenceRows.tree(tree, 0, range(150), ())], block_size=1)
    assert batch.layout.ancestors.shape == (152, 3)
    assert seen(batch, 1) == {0, 1}
    for node in (0, 64, 149):
        assert seen(batch, 2 + node) == set(tree.path(node))


def test_a_chain_of_a_tree_is_a_chunk() -> None:
    tokens = tuple(range(70))
    as_tree = SequenceRows.tree(TokenTree.chain(tokens), 5, range(75), (69,))
    as_chunk = SequenceRows.chain(tokens, 5, range(75), (69,))
    left, right = (build_batch([rows], block_size=1) for rows in (as_tree, as_chunk))
    assert torch.equal(left.layout.ancestors, right.layout.ancestors)
    assert torch.equal(left.positions, right.positions)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [SequenceRows.chain((), 0, (0,))],
        [SequenceRows.chain((1, 2), 3, (0,))],
        [SequenceRows.chain((1,), 0, (0, 1)), SequenceRows.chain((1,), 4, (2,))],
    ],
    ids=["no sequence", "no row", "a slot past the table", "a slot in another's table"],
)
def test_rows_without_a_place_are_refused(rows: list[SequenceRows]) -> None:
    with pytest.raises(ValueError, match=r"row|table"):
        build_batch(rows, block_size=4)
