"""Linear layers in Triton through its interpreter: values, and that a row's bits are its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor

from specinfer_kernels import BackendUnavailableError, pack_linear, quantize_rows, reference_linear
from specinfer_kernels.packed_linear import layouts
from tests.kernels.cases import same_bits
from tests.kit.triton_interpreter import patch_once

pytest.importorskip("triton")

from specinfer_kernels.triton import linear as launcher
from specinfer_kernels.triton.runtime import is_interpreting

pytestmark = pytest.mark.skipif(not is_interpreting(), reason="Triton compiles in this process")

# The interpreter cuts to bfloat16 instead of rounding.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
# Few and many rows, several tiles of each feature and, at 96 inputs, three splits.
SIZES = launcher.TileSizes(
    few_outputs=16, many_outputs=32, block_rows=16, block_inputs=16, few_rows=32
)
SPLIT = 32
Linear = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def quick_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_once(monkeypatch)


def draw(in_features: int, out_features: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """weight, bias and 130 rows."""
    generator = torch.Generator().manual_seed(in_features * 7919 + out_features)
    weight = torch.randn(out_features, in_features, generator=generator) * in_features**-0.5
    bias = torch.randn(out_features, generator=generator)
    rows = torch.randn(130, in_features, generator=generator)
    return weight.to(dtype), bias.to(dtype), rows.to(dtype)


def packed(
    weight: Tensor, bias: Tensor | None, *, int8: bool = False, sizes: launcher.TileSizes = SIZES
) -> launcher.TritonWeight:
    whole, scale = quantize_rows(weight) if int8 else (weight, None)
    return launcher.pack_triton(whole, bias, weight.dtype, scale, sizes=sizes, split_inputs=SPLIT)


def layer_of(weight: Tensor, bias: Tensor | None, *, int8: bool = False) -> Linear:
    ready = packed(weight, bias, int8=int8)
    return lambda rows: launcher.multiply_triton(ready, rows)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("int8", [False, True])
def test_the_product_is_the_references(dtype: torch.dtype, int8: bool) -> None:
    weight, bias, rows = draw(72, 41, dtype)
    layer = pack_linear(weight, bias, layout="triton", int8=int8)
    assert (layer.layout, layer.row_invariant, layer.int8) == ("triton", True, int8)
    right = reference_linear.linear(rows, weight, bias)
    if int8:
        right = reference_linear.int8_linear(rows, *quantize_rows(weight), bias)
        assert layer.stored_bytes == 72 * 41 + 41 * (4 + dtype.itemsize)
    for count in (1, 130):
        error = (layer(rows[:count]).double() - right[:count]).abs().max()
        assert error < TOLERANCE[dtype] * right.abs().max()
    assert layer(rows[:0]).shape == (0, 41)
    assert same_bits(layer(rows[:6].view(2, 3, 72)), layer(rows[:6]).view(2, 3, 41))
    assert same_bits(layer(rows[:6:2]), layer(rows[:6])[::2])


def differing(linear: Linear, rows: Tensor) -> list[tuple[int, int]]:
    """(offset, count) of the parts of `rows` whose outputs are not those of the whole."""
    whole = linear(rows)
    parts = [(0, 1), (0, 2), (0, 15), (7, 17), (98, 32), (50, 33), (129, 1)]
    return [
        (offset, count)
        for offset, count in parts
        if not same_bits(linear(rows[offset : offset + count]), whole[offset : offset + count])
    ]


@pytest.mark.parametrize(
    ("dtype", "in_features", "out_features", "int8"),
    [
        (torch.float32, 96, 40, False),
        (torch.float16, 32, 17, False),
        (torch.bfloat16, 75, 17, False),
        (torch.bfloat16, 96, 20, True),
    ],
)
def test_bits_of_a_row_are_its_own(
    dtype: torch.dtype, in_features: int, out_features: int, int8: bool
) -> None:
    weight, bias, rows = draw(in_features, out_features, dtype)
    assert differing(layer_of(weight, bias, int8=int8), rows) == []
    others = rows.flip(0).clone()
    others[3] = rows[20]
    layer = layer_of(weight, None, int8=int8)
    assert same_bits(layer(others[:30])[3], layer(rows)[20])


def test_negative_controls_are_detected() -> None:
    """Blocks of inputs, and splits of them, chosen by the number of rows."""
    weight, bias, rows = draw(96, 40, torch.float32)
    ready = packed(weight, bias)

    def blocks_by_rows(part: Tensor) -> Tensor:
        block_inputs = 32 if part.shape[0] < 16 else 16
        sizes = replace(SIZES, block_inputs=block_inputs)
        return launcher.multiply_triton(replace(ready, sizes=sizes), part)

    def splits_by_rows(part: Tensor) -> Tensor:
        split_inputs = 48 if part.shape[0] < 16 else SPLIT
        return launcher.multiply_triton(replace(ready, split_inputs=split_inputs), part)

    for planted in (blocks_by_rows, splits_by_rows):
        assert {(0, 1), (0, 2), (0, 15), (129, 1)} <= set(differing(planted, rows))


def test_splits_follow_from_the_weight_alone() -> None:
    """Enough programs for few rows, blocks whole, no split below its least size."""
    for in_features, out_features, splits in (
        (4096, 4096, 4),
        (11008, 4096, 4),
        (4096, 22016, 1),
        (512, 64, 1),
        (1030, 64, 2),
    ):
        weight = torch.empty(out_features, in_features, dtype=torch.bfloat16, device="meta")
        ready = launcher.pack_triton(weight, None, torch.bfloat16)
        shapes = [launcher.compiled_shape(ready, count) for count in (1, 64, 129, 4096)]
        assert {shape.num_splits for shape in shapes} == {splits}
        assert {shape.split_inputs % shape.block_inputs for shape in shapes} == {0}
        assert [shape.serial for shape in shapes] == [splits == 1] * 2 + [True] * 2


def test_a_gpu_takes_triton_and_a_cpu_only_by_name() -> None:
    def on_cuda(dtype: torch.dtype) -> Tensor:
        return cast(Tensor, SimpleNamespace(device=torch.device("cuda"), dtype=dtype))

    assert layouts(on_cuda(torch.bfloat16)) == ("triton", "plain")
    assert layouts(on_cuda(torch.float64)) == ("plain",)
    assert "triton" not in layouts(torch.zeros(1, 1))
    with pytest.raises(BackendUnavailableError, match="triton"):
        pack_linear(torch.zeros(2, 2, dtype=torch.float64), layout="triton")
