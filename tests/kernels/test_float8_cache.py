"""Keys and values in one byte: what is written, what attention reads, and that bits stay a row's
own. On a CPU plain torch writes them and the native kernel attends over a widened copy; Triton runs
through its interpreter where it is there."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from specinfer_kernels import (
    AttentionLayout,
    Backend,
    BackendUnavailableError,
    HeadNorms,
    KernelInputError,
    RotaryPlaces,
    available_backends,
    compact_kv,
    copy_blocks,
    rotate_and_write_kv,
    tree_attention,
    write_kv,
)
from specinfer_kernels.reference import FLOAT8, to_float8
from specinfer_kernels.triton.runtime import is_interpreting
from tests.kernels.cases import Geometry, Session, chain, differing_forms, lay_out, random_nodes

# Powers of two, so that a value on the grid stays there.
KEY_SCALE, VALUE_SCALE = 2**-5, 0.5
SCALES: dict[str, Any] = {"key_scale": KEY_SCALE, "value_scale": VALUE_SCALE}
HAS_TRITON = importlib.util.find_spec("triton") is not None and is_interpreting()
BACKENDS: list[Backend] = ["reference", *(["triton"] if HAS_TRITON else [])]  # type: ignore[list-item]
ATTENTION: list[Backend] = [*BACKENDS, *(["native"] if "native" in available_backends() else [])]  # type: ignore[list-item]
NARROW = Geometry(num_heads=2, num_kv_heads=1, head_dim=16, dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def quick_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if HAS_TRITON:
        from tests.kit.triton_interpreter import patch_once

        patch_once(monkeypatch)


def on_grid(shape: tuple[int, ...], scale: float, seed: int) -> Tensor:
    """float32 values that a cache of this scale holds exactly: the interpreter rounds no other."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator).to(FLOAT8).float()
    return values * scale


def test_what_is_stored_is_the_nearest_within_the_range() -> None:
    values = torch.tensor([0.0, -0.0, 1.0, 1.0625, 1.1875, 449.0, -1e9, torch.inf, torch.nan])
    stored = to_float8(values, 1.0).float()
    expected = torch.tensor([0.0, -0.0, 1.0, 1.0, 1.25, 448.0, -448.0, 448.0, torch.nan])
    torch.testing.assert_close(stored, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(to_float8(values[:6], 0.25).float()[2:5], torch.tensor([4.0, 4.0, 5.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_key_has_the_bits_of_its_own_whichever_pass_writes_it(dtype: torch.dtype) -> None:
    key, value = torch.randn(2, 9, 2, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    slots = torch.tensor([3, 19, 0, 7, 8, 12, 1, 2, 5])
    pool = torch.zeros(2, 2, 4, 5, 2, 4, dtype=FLOAT8)
    write_kv(key, value, pool[0, 0], pool[0, 1], slots, **SCALES)
    for row, slot in enumerate(slots):
        part = slice(row, row + 1)
        write_kv(key[part], value[part], pool[1, 0], pool[1, 1], slot[None], **SCALES)
    pool = pool.view(torch.uint8)
    assert torch.equal(pool[0], pool[1])
    written = pool[0, 0].flatten(0, 1)[slots].view(FLOAT8)
    torch.testing.assert_close(
        written.float() * KEY_SCALE, key.float(), rtol=2**-4, atol=KEY_SCALE * 2**-10
    )
    # The control: a scale found from the rows of a pass is another one in another pass.
    found = float(key.abs().max()), float(key[:1].abs().max())
    together, alone = (to_float8(key[:1], largest / 448).view(torch.uint8) for largest in found)
    assert not torch.equal(together, alone)


@pytest.mark.parametrize("backend", BACKENDS)
def test_turned_heads_go_into_their_slots(backend: Backend) -> None:
    """A turn by nothing and norms of one, so that every backend has values on the grid."""
    heads, head_dim, rows = 3, 24, 5
    query = torch.randn(rows, heads, head_dim)
    key = on_grid((rows, 1, head_dim), KEY_SCALE, 2)
    value = on_grid((rows, 1, head_dim), VALUE_SCALE, 3)
    value[0, 0, :3] = torch.tensor([1e6, -1e6, torch.inf])
    mixed = torch.cat((query, key, value), 1).flatten(1)
    places = RotaryPlaces(
        torch.arange(rows),
        torch.tensor([3, 15, 1, 0, 8]),
        torch.ones(rows, head_dim),
        torch.zeros(rows, head_dim),
    )
    ours, right = torch.zeros(2, 2, 4, 4, 1, head_dim, dtype=FLOAT8)
    turned = rotate_and_write_kv(mixed, places, ours[0], ours[1], backend=backend, **SCALES)
    write_kv(key, value, right[0], right[1], places.slot_mapping, **SCALES)
    assert torch.equal(turned, query)
    assert torch.equal(ours.view(torch.uint8), right.view(torch.uint8))
    assert float(ours[1].view(-1, head_dim)[3, 0]) == 448.0
    norms = HeadNorms(torch.ones(head_dim), torch.ones(head_dim), 1e-6)
    alone = torch.zeros_like(ours)
    rotate_and_write_kv(mixed, places, ours[0], ours[1], norms, backend=backend, **SCALES)
    for row in range(rows):
        part = slice(row, row + 1)
        place = dataclasses.replace(
            places, positions=places.positions[part], slot_mapping=places.slot_mapping[part]
        )
        rotate_and_write_kv(
            mixed[part], place, alone[0], alone[1], norms, backend=backend, **SCALES
        )
    assert torch.equal(ours.view(torch.uint8), alone.view(torch.uint8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_slots_and_blocks_are_moved_as_bytes(backend: Backend) -> None:
    pool = torch.arange(2 * 2 * 4 * 5 * 2 * 8).to(torch.uint8).view(2, 2, 4, 5, 2, 8)
    sources, targets = torch.tensor([3, 4, 9, 19]), torch.tensor([2, 3, 4, 0])
    ours, right = pool.clone().view(FLOAT8), pool.clone()
    compact_kv(ours, sources, targets, backend=backend)
    right.view(2, 2, 20, 2, 8)[:, :, targets] = right.view(2, 2, 20, 2, 8)[:, :, sources]
    assert torch.equal(ours.view(torch.uint8), right)
    copy_blocks(ours, torch.tensor([1, 3]), torch.tensor([0, 1]))
    right[:, :, [0, 1]] = right[:, :, [1, 3]]
    assert torch.equal(ours.view(torch.uint8), right)


def attend_float8(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, layout: AttentionLayout, **numbers: Any
) -> Tensor:
    """Attention over caches in which the keys were put as `write_kv` puts them."""
    return tree_attention(
        query,
        to_float8(key_cache, KEY_SCALE),
        to_float8(value_cache, VALUE_SCALE),
        layout,
        **SCALES,
        **numbers,
    )


@pytest.mark.parametrize("backend", ATTENTION)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_reads_what_was_stored(backend: Backend, softcap: float | None) -> None:
    nodes = random_nodes(30, NARROW, seed=0)
    sessions = [Session(nodes[:20], nodes[20:25], [-1, 0, 0, 1, 2])]
    sessions.append(Session(nodes[:3], nodes[25:28], chain(3)))
    batch = lay_out(sessions, NARROW, seed=0)
    numbers: dict[str, Any] = {"scale": 0.25, "softcap": softcap}
    ours = attend_float8(
        batch.query, batch.key_cache, batch.value_cache, batch.layout, backend=backend, **numbers
    )
    key = to_float8(batch.key_cache, KEY_SCALE).double() * KEY_SCALE
    value = to_float8(batch.value_cache, VALUE_SCALE).double() * VALUE_SCALE
    right = tree_attention(
        batch.query.double(), key, value, batch.layout, backend="reference", **numbers
    )
    assert ours.dtype == NARROW.dtype
    torch.testing.assert_close(ours.double(), right, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("backend", [backend for backend in ATTENTION if backend != "triton"])
def test_bits_of_a_row_are_its_own(backend: Backend) -> None:
    """The Triton kernel is held to it in test_triton_attention."""
    attend = functools.partial(attend_float8, backend=backend)
    assert differing_forms(attend, NARROW, length=34) == []


@pytest.mark.skipif("native" not in ATTENTION, reason="no native kernels here")
def test_the_native_kernel_reads_only_blocks_that_a_row_sees() -> None:
    """A block behind the window is gone: its name may be anything, what lies there too."""
    nodes = random_nodes(24, NARROW, seed=0)
    batch = lay_out([Session(nodes[:22], nodes[22:], chain(2))], NARROW, seed=0)
    numbers: dict[str, Any] = {"scale": 0.25, "sliding_window": 6, "backend": "native"}
    caches = batch.key_cache, batch.value_cache
    ours = attend_float8(batch.query, *caches, batch.layout, **numbers)
    tables = batch.layout.block_tables.clone()
    tables[0, 0] = -7
    gone = dataclasses.replace(batch.layout, block_tables=tables)
    assert torch.equal(attend_float8(batch.query, *caches, gone, **numbers), ours)
    tables[0, -1] = 1 << 20
    with pytest.raises(KernelInputError, match="outside the cache"):
        attend_float8(batch.query, *caches, gone, **numbers)


def test_what_does_not_fit_is_refused() -> None:
    cache, rows, slots = torch.zeros(4, 5, 2, 3), torch.ones(2, 2, 3), torch.tensor([0, 1])
    small = cache.to(FLOAT8)
    with pytest.raises(KernelInputError, match="no scale"):
        write_kv(rows, rows, cache, cache, slots, key_scale=0.5)
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(KernelInputError, match="value_scale"):
            write_kv(rows, rows, small, small, slots, value_scale=scale)
    with pytest.raises(KernelInputError, match="do not take rows"):
        write_kv(rows.double(), rows.double(), small, small, slots)
    with pytest.raises(KernelInputError, match="differ"):
        write_kv(rows, rows, small, cache, slots)
    with pytest.raises(BackendUnavailableError, match="float8"):
        write_kv(rows, rows, small, small, slots, backend="native")
