"""int8 weights: the rounding, the product, and that a row's bits stay its own."""

import pytest
import torch
from torch import Tensor

from specinfer_kernels import (
    KernelInputError,
    PackedLinear,
    pack_linear,
    quantize_rows,
    round_to_int8,
)
from specinfer_kernels import reference_linear as reference
from specinfer_kernels.packed_linear import Layout, layouts
from tests.kernels.cases import same_bits

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
SHAPES = [(256, 160), (1030, 33), (33, 65), (7, 5), (1, 3)]
ROWS = (1, 2, 3, 7, 12, 13, 14, 15, 16, 17, 20, 29, 32, 64, 200, 300)
CASES: list[tuple[torch.dtype, Layout]] = [
    (dtype, layout)
    for dtype in DTYPES
    for layout in layouts(torch.zeros(1, 1, dtype=dtype), int8=True)
]
# Relative to the largest output; the fallback for bfloat16 rounds before and after it scales.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float64: 1e-13}


def make(
    in_features: int, out_features: int, dtype: torch.dtype, layout: Layout | None = None
) -> tuple[Tensor, Tensor, Tensor, PackedLinear]:
    """weight, bias, 300 rows and the layer."""
    generator = torch.Generator().manual_seed(in_features * 7919 + out_features)
    weight = torch.randn(out_features, in_features, generator=generator) * in_features**-0.5
    weight[out_features // 2] *= 50  # each output has a scale of its own
    bias = torch.randn(out_features, generator=generator)
    rows = torch.randn(300, in_features, generator=generator)
    weight, bias, rows = weight.to(dtype), bias.to(dtype), rows.to(dtype)
    return weight, bias, rows, pack_linear(weight, bias, layout=layout, int8=True)


@pytest.mark.parametrize(("dtype", "layout"), CASES)
@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
def test_the_product_is_that_of_the_int8_weight(
    dtype: torch.dtype, layout: Layout, in_features: int, out_features: int
) -> None:
    weight, bias, rows, layer = make(in_features, out_features, dtype, layout)
    whole = layer(rows)
    expected = reference.int8_linear(rows, *quantize_rows(weight), bias)
    error = (whole.double() - expected).abs().amax(0) / expected.abs().amax(0)
    assert error.max() < TOLERANCE[dtype]
    parts = [(0, count) for count in ROWS] + [(offset, 9) for offset in (1, 5, 14, 100)]
    for start, count in parts:
        assert same_bits(layer(rows[start : start + count]), whole[start : start + count])


def test_every_int8_is_widened_exactly() -> None:
    for dtype, layout in CASES:
        every = torch.arange(-127, 128).to(dtype)
        layer = pack_linear(every.repeat(3, 1), layout=layout, int8=True)
        outputs = layer(torch.eye(255, dtype=dtype))
        assert torch.equal(outputs, every.unsqueeze(1).expand(-1, 3))


def test_rounding_is_to_the_nearest_and_keeps_the_largest() -> None:
    weight = torch.tensor([[127.0, -1.5, 0.5, 2.5], [0.0, 0.0, 0.0, 0.0], [-2.0, 1.0, 0.0, 2.0]])
    whole, scale = quantize_rows(weight)
    assert whole.tolist() == [[127, -2, 0, 2], [0, 0, 0, 0], [-127, 64, 0, 127]]
    assert scale.tolist() == pytest.approx([1.0, 1.0, 2 / 127])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_twice_changes_nothing(dtype: torch.dtype) -> None:
    """The loader rounds a stock model and packs what it has rounded: that must be one model."""
    weight = torch.randn(200, 900, generator=torch.Generator().manual_seed(3)).to(dtype)
    weight *= torch.logspace(-8, 8, 200).to(dtype).unsqueeze(1)
    once = quantize_rows(weight)
    again = quantize_rows(round_to_int8(weight))
    assert torch.equal(once[0], again[0])
    assert torch.equal(once[1], again[1])


def test_negative_control_a_scale_that_does_not_keep_the_largest_is_detected() -> None:
    weight = torch.randn(200, 900, generator=torch.Generator().manual_seed(3)).bfloat16()
    scale = weight.float().abs().amax(1, keepdim=True) / 127.5
    rounded = (torch.round(weight.float() / scale).clamp(-127, 127) * scale).bfloat16()
    assert not torch.equal(quantize_rows(rounded)[1], quantize_rows(weight)[1])


def test_refuses_what_has_no_scale() -> None:
    weight = torch.ones(3, 4)
    weight[1, 2] = float("inf")
    with pytest.raises(KernelInputError, match="not finite"):
        pack_linear(weight, int8=True)


def test_a_layer_says_what_it_is_and_holds_half_the_bytes() -> None:
    layer = pack_linear(torch.randn(64, 64).bfloat16(), int8=True)
    assert layer.int8
    assert "int8" in repr(layer)
    if layer.layout == "native":
        assert layer.stored_bytes < 64 * 64 + 64 * 8
        assert pack_linear(torch.randn(64, 64).bfloat16()).stored_bytes == 2 * 64 * 64
