"""Rows of a later pass: a drafter's second level sees nodes whose keys an earlier pass wrote."""

import pytest
import torch

from specinfer_kernels import (
    AttentionLayout,
    Backend,
    KernelInputError,
    available_backends,
    tree_attention,
)

ANCESTORS = (0b1, 0b11, 0b101, 0b1011, 0b10101)
CONTEXT_LEN = 6


def attend(rows: list[int], backend: Backend, num_table_blocks: int = 4) -> torch.Tensor:
    """Attention of some nodes of one tree, all of whose keys are in the cache."""
    generator = torch.Generator().manual_seed(0)
    key_cache = torch.randn(8, 4, 2, 16, generator=generator)
    value_cache = torch.randn(8, 4, 2, 16, generator=generator)
    query = torch.randn(len(ANCESTORS), 4, 16, generator=generator)
    layout = AttentionLayout(
        row_offsets=torch.tensor([0, len(rows)], dtype=torch.int32),
        context_lens=torch.tensor([CONTEXT_LEN], dtype=torch.int32),
        block_tables=torch.tensor([[3, 1, 5, 2][:num_table_blocks]], dtype=torch.int32),
        ancestors=torch.tensor([[ANCESTORS[row]] for row in rows], dtype=torch.int64),
    )
    return tree_attention(query[rows], key_cache, value_cache, layout, scale=0.25, backend=backend)


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("first", [0, 1, 2, 3, 4])
def test_a_level_alone_has_the_bits_it_has_in_the_whole_tree(backend: Backend, first: int) -> None:
    whole = attend([0, 1, 2, 3, 4], backend)
    level = attend(list(range(first, 5)), backend)
    assert torch.equal(whole[first:], level)


@pytest.mark.parametrize("backend", available_backends())
def test_the_table_has_to_reach_the_earlier_nodes_too(backend: Backend) -> None:
    with pytest.raises(KernelInputError, match="room"):
        attend([3, 4], backend, num_table_blocks=2)


@pytest.mark.parametrize("backend", available_backends())
def test_rows_of_one_pass_are_neighbours(backend: Backend) -> None:
    with pytest.raises(KernelInputError, match="own bit"):
        attend([1, 3], backend)


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize(("num_heads", "head_dim"), [(0, 16), (4, 0)])
def test_heads_and_their_size_are_not_zero(backend: Backend, num_heads: int, head_dim: int) -> None:
    layout = AttentionLayout(
        row_offsets=torch.tensor([0, 1], dtype=torch.int32),
        context_lens=torch.tensor([0], dtype=torch.int32),
        block_tables=torch.tensor([[0]], dtype=torch.int32),
        ancestors=torch.tensor([[1]], dtype=torch.int64),
    )
    cache = torch.zeros(1, 4, 1, head_dim)
    with pytest.raises(KernelInputError, match="at least 1"):
        tree_attention(
            torch.zeros(1, num_heads, head_dim), cache, cache, layout, scale=1.0, backend=backend
        )
