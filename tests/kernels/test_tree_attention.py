"""Tree attention: what it computes, that a row's bits depend on the row alone, what it refuses."""

import dataclasses
import math
from functools import partial
from typing import cast

import pytest
import torch
from torch import Tensor

from specinfer_kernels import (
    AttentionLayout,
    Backend,
    KernelInputError,
    available_backends,
    tree_attention,
)
from tests.kernels.cases import (
    Attention,
    Batch,
    Geometry,
    Session,
    ancestor_masks,
    attend,
    chain,
    differing_forms,
    lay_out,
    random_nodes,
    random_tree,
    same_bits,
)

BACKENDS = available_backends()
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float64: 2e-14}
WIDE = Geometry(num_heads=8, num_kv_heads=1, head_dim=64, block_size=16)


def with_backend(backend: Backend) -> Attention:
    return cast(Attention, partial(tree_attention, backend=backend))


def dense(session: Session, window: int | None, softcap: float | None) -> Tensor:
    """Naive float64 softmax over each row's own path."""
    masks = ancestor_masks(session.parents)
    group = session.rows.query.shape[1] // session.rows.key.shape[1]
    outputs = []
    for row, mask in enumerate(masks):
        seen = [index for index in range(len(masks)) if mask >> index & 1]
        keys = torch.cat((session.context.key, session.rows.key[seen])).double()
        values = torch.cat((session.context.value, session.rows.value[seen])).double()
        query = session.rows.query[row].double()
        scores = torch.einsum("hd,khd->hk", query, keys.repeat_interleave(group, 1))
        scores = scores * query.shape[-1] ** -0.5
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if window is not None:
            behind = keys.shape[0] - 1 - torch.arange(keys.shape[0])
            scores = scores.masked_fill(behind >= window, -math.inf)
        weights = scores.softmax(-1)
        outputs.append(torch.einsum("hk,khd->hd", weights, values.repeat_interleave(group, 1)))
    return torch.stack(outputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (20, None), (None, 2.0), (1, 0.5)])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"), [(4, 2, 24), (8, 1, 64), (3, 3, 5), (66, 1, 16)]
)
def test_equals_dense_softmax(
    backend: Backend,
    dtype: torch.dtype,
    window: int | None,
    softcap: float | None,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> None:
    geometry = Geometry(num_heads, num_kv_heads, head_dim, dtype=dtype)
    nodes = random_nodes(190, geometry, seed=0)
    sessions = [
        Session(nodes[:100], nodes[100:112], random_tree(12, seed=1)),
        Session(nodes[:0], nodes[:70], chain(70)),
        Session(nodes[:63], nodes[63:64], [-1]),
        Session(nodes[:9], nodes[90:], random_tree(100, seed=2)),
    ]
    got = attend(sessions, geometry, with_backend(backend), sliding_window=window, softcap=softcap)
    for session, output in zip(sessions, got, strict=True):
        assert output.dtype == dtype
        expected = dense(session, window, softcap)
        torch.testing.assert_close(
            output.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (40, 3.0)])
def test_bits_of_a_row_are_its_own(
    backend: Backend, dtype: torch.dtype, window: int | None, softcap: float | None
) -> None:
    geometry = Geometry(dtype=dtype)
    failed = differing_forms(
        with_backend(backend), geometry, length=90, sliding_window=window, softcap=softcap
    )
    assert failed == []


@pytest.mark.parametrize("geometry", [WIDE, Geometry(num_heads=3, num_kv_heads=3, head_dim=5)])
def test_bits_of_a_row_are_its_own_in_other_shapes(geometry: Geometry) -> None:
    assert differing_forms(tree_attention, geometry, length=150) == []


def slot_order_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    layout: AttentionLayout,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The planted bug: right in value, but sums run over slots in fixed blocks of 8, masked."""
    assert sliding_window is None
    assert softcap is None
    size, group = key_cache.shape[1], query.shape[1] // key_cache.shape[2]
    output = torch.empty_like(query)
    offsets = layout.row_offsets.tolist()
    for sequence, context in enumerate(layout.context_lens.tolist()):
        num_rows = offsets[sequence + 1] - offsets[sequence]
        slots = torch.arange(context + num_rows)
        physical = layout.block_tables[sequence].long()[slots // size] * size + slots % size
        keys = key_cache.flatten(0, 1)[physical].repeat_interleave(group, 1)
        values = value_cache.flatten(0, 1)[physical].repeat_interleave(group, 1)
        for row in range(offsets[sequence], offsets[sequence + 1]):
            bits = layout.ancestors[row][:, None] >> torch.arange(64) & 1
            seen = torch.cat((torch.ones(context), bits.flatten()[:num_rows])).bool()
            scores = (query[row] * keys).sum(-1) * scale
            scores = scores.masked_fill(~seen[:, None], -math.inf)
            weights = torch.exp(scores - scores.amax(0))[..., None]
            blocks = zip(weights.split(8), (weights * values).split(8), strict=True)
            total, result = torch.zeros(query.shape[1], 1), torch.zeros_like(query[row])
            for weight, product in blocks:
                total = total + weight.sum(0)
                result = result + product.sum(0)
            output[row] = result / total
    return output


def test_negative_control_slot_order_is_detected() -> None:
    geometry = Geometry()
    nodes = random_nodes(40, geometry, seed=0)
    session = Session(nodes[:20], nodes[20:], random_tree(20, seed=1))
    right = attend([session], geometry)[0]
    wrong = attend([session], geometry, slot_order_attention)[0]
    torch.testing.assert_close(wrong, right, atol=1e-5, rtol=1e-5)
    failed = differing_forms(slot_order_attention, geometry, length=90)
    assert any(name.startswith("tree") for name in failed)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_threads(backend: Backend, dtype: torch.dtype) -> None:
    geometry = dataclasses.replace(WIDE, num_heads=16, num_kv_heads=2, dtype=dtype)
    nodes = random_nodes(140, geometry, seed=0)
    session = Session(nodes[:100], nodes[100:], random_tree(40, seed=1))
    outputs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        outputs.append(attend([session], geometry, with_backend(backend))[0])
    assert same_bits(outputs[0], outputs[1])
    assert same_bits(outputs[0], outputs[2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("context", [5, 6, 62, 63])
def test_what_a_row_does_not_see_cannot_reach_it(
    backend: Backend, dtype: torch.dtype, context: int
) -> None:
    """A key computed beside another is not a number: only who sees it may notice."""
    geometry = Geometry(dtype=dtype)
    nodes = random_nodes(context + 6, geometry, seed=0)
    session = Session(nodes[:context], nodes[context:], [-1, 0, 0, 2, 1, 4])
    expected = attend([session], geometry, with_backend(backend))[0]
    for tensor in (session.rows.key, session.rows.value):
        tensor[1] = math.nan
    got = attend([session], geometry, with_backend(backend))[0]
    assert same_bits(got[[0, 2, 3]], expected[[0, 2, 3]])
    assert got[[1, 4, 5]].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [9, 10, 33, 34], ids=lambda window: f"window {window}")
def test_what_lies_right_behind_a_window_cannot_reach_a_row(
    backend: Backend, dtype: torch.dtype, window: int
) -> None:
    """Windows begin at odd places and at even ones; the row above still sees the key."""
    geometry, context, rows = Geometry(dtype=dtype), 40, 4
    nodes = random_nodes(context + rows, geometry, seed=0)
    session = Session(nodes[:context], nodes[context:], chain(rows))
    attention = with_backend(backend)
    expected = attend([session], geometry, attention, sliding_window=window)[0]
    for tensor in (session.context.key, session.context.value):
        tensor[context + 1 - window] = math.nan
    got = attend([session], geometry, attention, sliding_window=window)[0]
    assert same_bits(got[1:], expected[1:])
    assert got[0].isnan().all()


def test_strided_query_and_no_rows() -> None:
    geometry = Geometry()
    nodes = random_nodes(10, geometry, seed=0)
    batch = lay_out([Session(nodes[:6], nodes[6:], chain(4))], geometry, seed=0)
    heads_first = batch.query.transpose(0, 1).contiguous().transpose(0, 1)
    assert not heads_first.is_contiguous()
    assert same_bits(_call(dataclasses.replace(batch, query=heads_first)), _call(batch))
    none = lay_out([Session(nodes[:6], nodes[:0], [])], geometry, seed=0)
    assert _call(none).shape == (0, 4, 24)


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_behind_the_window_may_be_gone(backend: Backend) -> None:
    geometry = Geometry()
    nodes = random_nodes(60, geometry, seed=0)
    batch = lay_out([Session(nodes[:50], nodes[50:], chain(10))], geometry, seed=0)
    expected = _call(batch, backend=backend, sliding_window=12)
    batch.layout.block_tables[0, : (50 + 1 - 12) // geometry.block_size] = -1
    assert same_bits(_call(batch, backend=backend, sliding_window=12), expected)
    with pytest.raises(KernelInputError, match="block_tables names a block"):
        _call(batch, backend=backend)


def _call(
    batch: Batch,
    backend: Backend | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    return tree_attention(
        batch.query,
        batch.key_cache,
        batch.value_cache,
        batch.layout,
        scale=0.2,
        backend=backend,
        sliding_window=sliding_window,
        softcap=softcap,
    )


def _valid() -> Batch:
    geometry = Geometry()
    nodes = random_nodes(20, geometry, seed=0)
    return lay_out([Session(nodes[:9], nodes[9:], random_tree(11, seed=0))], geometry, seed=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("row_offsets", torch.tensor([0, 10], dtype=torch.int32), "row_offsets"),
        ("row_offsets", torch.tensor([0, 11]), "row_offsets must be a contiguous torch.int32"),
        ("context_lens", torch.tensor([-1], dtype=torch.int32), "negative"),
        ("context_lens", torch.tensor([900], dtype=torch.int32), "room"),
        ("context_lens", torch.tensor([9, 9], dtype=torch.int32), "row_offsets must be"),
        ("block_tables", torch.full((1, 3), 77, dtype=torch.int32), "outside the cache"),
        ("block_tables", torch.full((1, 3), -1, dtype=torch.int32), "outside the cache"),
        ("block_tables", torch.zeros(3, dtype=torch.int32), "block_tables must be"),
        ("ancestors", torch.zeros(11, 1, dtype=torch.int64), "own bit"),
        ("ancestors", torch.full((11, 1), -1, dtype=torch.int64), "own bit"),
        ("ancestors", torch.zeros(11, 0, dtype=torch.int64), "at least one word"),
        ("ancestors", torch.zeros(10, 1, dtype=torch.int64), "ancestors are of 10 rows"),
    ],
)
def test_refuses_a_bad_layout(backend: Backend, field: str, value: Tensor, message: str) -> None:
    def attend_with_bad_layout() -> None:
        batch = _valid()
        layout = dataclasses.replace(batch.layout, **{field: value})
        _call(dataclasses.replace(batch, layout=layout), backend=backend)

    with pytest.raises(KernelInputError, match=message):
        attend_with_bad_layout()


def test_refuses_bad_tensors_and_numbers() -> None:
    batch = _valid()
    bad = [
        dataclasses.replace(batch, query=batch.query.double()),
        dataclasses.replace(batch, query=batch.query[:, :3]),
        dataclasses.replace(batch, query=batch.query[0]),
        dataclasses.replace(batch, query=batch.query.repeat(1, 1, 2)[:, :, ::2]),
        dataclasses.replace(batch, key_cache=batch.key_cache[:-1]),
        dataclasses.replace(batch, value_cache=batch.value_cache.bfloat16()),
    ]
    strided = batch.key_cache.transpose(0, 1)
    bad.append(dataclasses.replace(batch, key_cache=strided, value_cache=strided))
    for wrong in bad:
        with pytest.raises(KernelInputError):
            _call(wrong)
    with pytest.raises(KernelInputError, match="sliding_window"):
        _call(batch, sliding_window=0)
    with pytest.raises(KernelInputError, match="softcap"):
        _call(batch, softcap=-1.0)
