"""Norms, gates, rotary positions, moves, draws and walks in Triton, against their definitions.

Through Triton's interpreter on a CPU, which cuts to bfloat16 instead of rounding: there only values
are compared. Each is compared alone and among other rows as well, to the bit.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from specinfer_kernels import KernelInputError, compact_kv
from specinfer_kernels.decoder_rows import (
    HeadNorms,
    RotaryPlaces,
    add_rms_norm,
    rms_norm,
    rotate_and_write_kv,
    silu_multiply,
)
from specinfer_kernels.law_sampling import Laws, sample_law
from specinfer_kernels.tree_walk import walk_trees
from tests.kit.triton_interpreter import patch_once

pytest.importorskip("triton")

from specinfer_kernels.triton.runtime import is_interpreting

pytestmark = pytest.mark.skipif(not is_interpreting(), reason="Triton compiles in this process")

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


@pytest.fixture(autouse=True)
def quick_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_once(monkeypatch)


def close(ours: Tensor, right: Tensor) -> None:
    tolerance = TOLERANCE[ours.dtype]
    torch.testing.assert_close(ours, right, atol=tolerance, rtol=tolerance)


@DTYPES
@pytest.mark.parametrize("width", [64, 100])
def test_norms_and_gates_are_the_references(dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(width)
    rows, update = torch.randn(2, 3, width).to(dtype)
    weight = torch.randn(width).to(dtype)
    close(
        rms_norm(rows, weight, 1e-5, backend="triton"),
        rms_norm(rows, weight, 1e-5, backend="reference"),
    )
    ours, right = rows.clone(), rows.clone()
    close(
        add_rms_norm(ours, update, weight, 1e-5, backend="triton"),
        add_rms_norm(right, update, weight, 1e-5, backend="reference"),
    )
    close(ours, right)
    gate_up = 4 * torch.randn(3, 2 * width).to(dtype)
    together = silu_multiply(gate_up, backend="triton")
    close(together, silu_multiply(gate_up, backend="reference"))
    assert torch.equal(together[1:2], silu_multiply(gate_up[1:2], backend="triton"))
    norms = rms_norm(rows, weight, 1e-5, backend="triton")
    assert torch.equal(norms[1:2], rms_norm(rows[1:2], weight, 1e-5, backend="triton"))


@DTYPES
@pytest.mark.parametrize("normed", [False, True])
def test_heads_are_turned_into_their_slots(dtype: torch.dtype, normed: bool) -> None:
    torch.manual_seed(1)
    heads, kv_heads, head_dim = 3, 1, 24
    mixed = torch.randn(5, (heads + 2 * kv_heads) * head_dim).to(dtype)
    tables = torch.randn(2, 10, head_dim).to(dtype)
    places = RotaryPlaces(
        torch.tensor([0, 3, 9, 9, 2]), torch.tensor([3, 15, 1, 0, 8]), tables[0], tables[1]
    )
    weights = torch.randn(2, head_dim).to(dtype)
    norms = HeadNorms(weights[0], weights[1], 1e-6) if normed else None
    ours, right = torch.zeros(2, 2, 4, 4, kv_heads, head_dim, dtype=dtype)
    query = rotate_and_write_kv(mixed, places, ours[0], ours[1], norms, backend="triton")
    close(query, rotate_and_write_kv(mixed, places, right[0], right[1], norms, backend="reference"))
    close(ours, right)
    assert torch.equal(ours[1], right[1])


@DTYPES
def test_moves_may_overlap(dtype: torch.dtype) -> None:
    rng = random.Random(2)
    pool = torch.randn(2, 2, 5, 4, 2, 12).to(dtype)
    for count in (0, 1, 9, 20):
        sources, targets = (torch.tensor(rng.sample(range(20), count)) for _ in range(2))
        sources, targets = sources.long(), targets.long()
        ours, right = pool.clone(), pool.clone()
        compact_kv(ours, sources, targets, backend="triton")
        compact_kv(right, sources, targets, backend="reference")
        assert torch.equal(ours, right)


def laws_of(*rows: tuple[float, int, float, float]) -> Laws:
    temperature, top_k, top_p, min_p = zip(*rows, strict=True)
    return Laws(
        torch.tensor(temperature),
        torch.tensor(top_k, dtype=torch.int32),
        torch.tensor(top_p, dtype=torch.float64),
        torch.tensor(min_p, dtype=torch.float64),
    )


@pytest.mark.parametrize("vocab_size", [1, 7, 1500])
@pytest.mark.parametrize("ties", [False, True])
def test_draws_follow_each_rows_law(vocab_size: int, ties: bool) -> None:
    torch.manual_seed(vocab_size)
    laws = laws_of((0.0, 3, 0.5, 0.0), (0.7, 5, 1.0, 0.0), (1.0, 0, 0.6, 0.0), (1.3, 40, 0.8, 0.05))
    seeds, positions = torch.tensor([5, -7, 9, 2**40]), torch.tensor([0, 1, 2**40, 17])
    logits = 3 * torch.randn(4, vocab_size)
    if ties:
        logits = logits.round()
        logits[1, vocab_size // 2] = torch.nan if vocab_size > 1 else 1.0
        logits[2, vocab_size // 3 :] -= torch.inf
        logits[2, 0] = 0.5
    ours = sample_law(logits, laws, seeds, positions, backend="triton")
    assert torch.equal(ours, sample_law(logits, laws, seeds, positions, backend="reference"))


def test_a_draw_without_its_cuts_is_another_one() -> None:
    """The control: were top-k ignored, the comparison above would see it."""
    torch.manual_seed(3)
    logits, seeds = torch.randn(64, 50), torch.arange(64)
    cut = laws_of(*[(1.0, 2, 1.0, 0.0)] * 64)
    whole = laws_of(*[(1.0, 0, 1.0, 0.0)] * 64)
    drawn = sample_law(logits, cut, seeds, seeds, backend="reference")
    assert not torch.equal(drawn, sample_law(logits, whole, seeds, seeds, backend="reference"))


def test_walks_are_the_references() -> None:
    rng = random.Random(4)
    sizes = [1, 2, 5, 40, 300]
    parents = [[-1, *(rng.randint(max(0, at - 3), at - 1) for at in range(1, n))] for n in sizes]
    flat = [parent for tree in parents for parent in tree]
    offsets = torch.tensor([sum(sizes[:at]) for at in range(len(sizes) + 1)], dtype=torch.int32)
    draws, tokens = (torch.tensor([rng.randint(0, 2) for _ in flat]) for _ in range(2))
    above = torch.tensor(flat, dtype=torch.int32)
    for max_depth in (0, 3, 20):
        ours = walk_trees(draws, tokens, above, offsets, max_depth, backend="triton")
        right = walk_trees(draws, tokens, above, offsets, max_depth, backend="reference")
        assert torch.equal(ours, right)
    assert int(right[:, 0].max()) > 1


def test_what_does_not_fit_is_refused() -> None:
    laws = laws_of((1.0, 0, 1.0, 0.0))
    one = torch.tensor([1])
    with pytest.raises(KernelInputError, match="float32"):
        sample_law(torch.zeros(1, 5, dtype=torch.float64), laws, one, one)
    with pytest.raises(KernelInputError, match="laws"):
        sample_law(torch.zeros(2, 5), laws, one.expand(2).contiguous(), one.expand(2).contiguous())
    with pytest.raises(KernelInputError, match="parents"):
        walk_trees(one, one, one, torch.tensor([0, 1], dtype=torch.int32), 1)
