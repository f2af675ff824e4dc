"""Kernels on a CUDA device say what their references say on the CPU, and rows are invariant."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from specinfer_kernels import (
    AttentionLayout,
    Laws,
    RotaryPlaces,
    add_rms_norm,
    compact_kv,
    pack_linear,
    rotate_and_write_kv,
    sample_law,
    silu_multiply,
    tree_attention,
    walk_trees,
)
from tests.kernels.cases import (
    Geometry,
    Nodes,
    Session,
    attend,
    chain,
    differing_forms,
    random_nodes,
    random_tree,
    same_bits,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda")
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
GEOMETRY = Geometry(num_heads=8, num_kv_heads=2, head_dim=64, block_size=16)


def attend_on_device(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    layout: AttentionLayout,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The op on the device, for tensors of the host."""
    moved = AttentionLayout(
        layout.row_offsets.to(DEVICE),
        layout.context_lens.to(DEVICE),
        layout.block_tables.to(DEVICE),
        layout.ancestors.to(DEVICE),
    )
    output = tree_attention(
        query.to(DEVICE),
        key_cache.to(DEVICE),
        value_cache.to(DEVICE),
        moved,
        scale=scale,
        sliding_window=sliding_window,
        softcap=softcap,
    )
    return output.cpu()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_attention_equals_its_reference(dtype: torch.dtype) -> None:
    geometry = replace(GEOMETRY, dtype=dtype)
    exact = replace(GEOMETRY, dtype=torch.float64)
    sessions = [
        Session(random_nodes(700, geometry, 1), random_nodes(9, geometry, 2), random_tree(9, 3)),
        Session(random_nodes(0, geometry, 4), random_nodes(150, geometry, 5), chain(150)),
        Session(random_nodes(33, geometry, 6), random_nodes(1, geometry, 7), [-1]),
    ]
    doubled = [
        Session(_widened(session.context), _widened(session.rows), session.parents)
        for session in sessions
    ]
    got = attend(sessions, geometry, attend_on_device)
    expected = attend(doubled, exact)
    for mine, its in zip(got, expected, strict=True):
        assert (mine.double() - its).abs().max() < TOLERANCE[dtype]


def _widened(nodes: Nodes) -> Nodes:
    return Nodes(nodes.query.double(), nodes.key.double(), nodes.value.double())


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rows_of_attention_are_invariant(dtype: torch.dtype) -> None:
    geometry = replace(GEOMETRY, dtype=dtype)
    # More than two splits of keys, and prefills that share most of them.
    assert differing_forms(attend_on_device, geometry, length=1100) == []


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("in_features", [520, 4099])  # one split of the inputs, and several
def test_rows_of_products_are_invariant(dtype: torch.dtype, int8: bool, in_features: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1000, in_features, generator=generator) * in_features**-0.5
    weight = weight.to(dtype).to(DEVICE)
    rows = torch.randn(300, in_features, generator=generator).to(dtype).to(DEVICE)
    layer = pack_linear(weight, int8=int8)
    assert layer.row_invariant
    together = layer(rows)
    for start, count in ((0, 1), (5, 1), (3, 2), (16, 17), (40, 64), (100, 130), (299, 1)):
        assert same_bits(layer(rows[start : start + count]), together[start : start + count])
    if not int8:
        exact = rows.double() @ weight.double().t()
        assert (together.double() - exact).abs().max() < 10 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_decoder_rows_equal_their_references(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)

    def both(*shape: int) -> tuple[Tensor, Tensor]:
        values = torch.randn(shape, generator=generator).to(dtype)
        return values, values.to(DEVICE, copy=True)

    hidden, update, weight, gate_up = both(7, 576), both(7, 576), both(576), both(7, 2 * 384)
    norms = [add_rms_norm(*group, 1e-5) for group in zip(hidden, update, weight, strict=True)]
    gates = [silu_multiply(values) for values in gate_up]
    for expected, got in (norms, gates, hidden):
        assert (expected.float() - got.cpu().float()).abs().max() < 2 * TOLERANCE[dtype]


def test_rotated_rows_and_moved_slots_equal_their_references() -> None:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(5, 6 * 32, generator=generator)
    tables = torch.randn(2, 100, 32, generator=generator)
    slots, positions = torch.tensor([3, 17, 8, 30, 0]), torch.tensor([0, 99, 7, 7, 50])
    found = []
    for device in (torch.device("cpu"), DEVICE):
        pool = torch.zeros(2, 2, 4, 8, 1, 32, device=device)
        cosines, sines = tables.to(device)
        places = RotaryPlaces(positions.to(device), slots.to(device), cosines, sines)
        query = rotate_and_write_kv(mixed.to(device), places, pool[1, 0], pool[1, 1])
        compact_kv(pool, slots[:3].to(device), torch.tensor([1, 3, 17], device=device))
        found.append((query.cpu(), pool.cpu()))
    for mine, its in zip(*found, strict=True):
        assert (mine - its).abs().max() < TOLERANCE[torch.float32]


def test_draws_and_walks_are_those_of_the_host() -> None:
    generator = torch.Generator().manual_seed(0)
    num_rows, vocab_size = 40, 3072
    logits = torch.randn(num_rows, vocab_size, generator=generator) * 4
    index = torch.arange(num_rows)
    laws = (
        torch.where(index % 5 == 0, 0.0, 0.8),
        torch.where(index % 3 == 0, 20, 0).int(),
        torch.where(index % 4 == 0, 0.9, 1.0).double(),
        torch.where(index % 7 == 0, 0.05, 0.0).double(),
    )
    host = sample_law(logits, Laws(*laws), index, index + 9, backend="reference")
    moved = Laws(*(law.to(DEVICE) for law in laws))
    seeds, positions = index.to(DEVICE), (index + 9).to(DEVICE)
    drawn = sample_law(logits.to(DEVICE), moved, seeds, positions)
    assert torch.equal(drawn.cpu(), host)
    parents = torch.tensor([-1, 0, 0, 1, 1, 3, 2, 5] * 5, dtype=torch.int32)
    offsets = torch.arange(6, dtype=torch.int32) * 8
    token_ids = torch.randint(0, 3, (num_rows,), generator=generator)
    draws = torch.randint(0, 3, (num_rows,), generator=generator)
    walked = walk_trees(draws, token_ids, parents, offsets, 8, backend="reference")
    given = [tensor.to(DEVICE) for tensor in (draws, token_ids, parents, offsets)]
    on_device = walk_trees(given[0], given[1], given[2], given[3], 8)
    assert torch.equal(on_device.cpu(), walked)
