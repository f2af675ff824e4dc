"""Row-invariant linear layers: a row's bits are the same among 1 to 1,024 rows at any offset.

Every layout that serves a dtype here is held to it.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from specinfer_kernels import (
    BackendUnavailableError,
    KernelInputError,
    PackedLinear,
    pack_linear,
    padded_rows,
)
from specinfer_kernels.native_linear import native_linear_serves
from specinfer_kernels.packed_linear import Layout, _stepped_rows, layouts
from tests.kernels.cases import same_bits

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
SHAPES = [
    (64, 192),
    (256, 1000),
    (704, 256),
    (100, 37),
    (33, 65),
    (2048, 1031),
    (7, 5),
    (1, 3),
    (500, 1),
]
CASES: list[tuple[torch.dtype, Layout]] = [
    (dtype, layout) for dtype in DTYPES for layout in layouts(torch.zeros(1, 1, dtype=dtype))
]
ROWS = (1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 64, 100, 127, 256, 513, 1000, 1024)
OFFSETS = (1, 2, 3, 5, 8, 13, 16, 30)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}


def make(
    in_features: int, out_features: int, dtype: torch.dtype, layout: Layout | None = None
) -> tuple[Tensor, Tensor, Tensor, PackedLinear]:
    """weight, bias, 1,024 rows and the layer."""
    generator = torch.Generator().manual_seed(in_features * 7919 + out_features)
    weight = torch.randn(out_features, in_features, generator=generator) * in_features**-0.5
    bias = torch.randn(out_features, generator=generator)
    rows = torch.randn(1024, in_features, generator=generator)
    weight, bias, rows = weight.to(dtype), bias.to(dtype), rows.to(dtype)
    return weight, bias, rows, pack_linear(weight, bias, layout=layout)


def differing(layer: Callable[[Tensor], Tensor], rows: Tensor) -> list[tuple[int, int]]:
    """(offset, count) of the parts of `rows` whose outputs are not those of the whole."""
    whole = layer(rows)
    parts = [(0, count) for count in ROWS]
    parts += [(offset, count) for offset in OFFSETS for count in (1, 2, 7, 16, 40)]
    return [
        (offset, count)
        for offset, count in parts
        if not same_bits(layer(rows[offset : offset + count]), whole[offset : offset + count])
    ]


@pytest.mark.parametrize(("dtype", "layout"), CASES)
@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
def test_bits_of_a_row_are_its_own(
    dtype: torch.dtype, layout: Layout, in_features: int, out_features: int
) -> None:
    weight, bias, rows, layer = make(in_features, out_features, dtype, layout)
    assert layer.row_invariant
    assert layer.layout == layout
    assert differing(layer, rows) == []
    expected = functional.linear(rows[:9].double(), weight.double(), bias.double())
    torch.testing.assert_close(
        layer(rows[:9]).double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )


def test_the_native_product_is_right_for_every_number_of_rows() -> None:
    """Sums of 2,816 products in float32, from values that bfloat16 holds."""
    dtype = torch.float32
    if not native_linear_serves(torch.bfloat16):
        pytest.skip("no native product of bfloat16 here")
    weight, _, rows, _ = make(2816, 96, torch.bfloat16)
    layer = pack_linear(weight)
    expected = rows[:40].double() @ weight.double().T
    whole = layer(rows[:40])
    assert all(same_bits(layer(rows[:count]), whole[:count]) for count in range(1, 41))
    # Half a unit in the last place of bfloat16, and what the sum itself may be off by.
    error = (whole.double() - expected).abs() - expected.abs() * 2**-8
    assert error.max() <= 1e-5
    wide = pack_linear(weight.to(dtype))(rows[:40].to(dtype)).double()
    assert (wide - expected).norm() / expected.norm() < 3e-6


def test_other_rows_do_not_matter() -> None:
    for dtype in DTYPES:
        _, _, rows, layer = make(100, 37, dtype)
        others = rows.flip(0).clone()
        others[500] = rows[20]
        assert same_bits(layer(rows)[20], layer(others)[500])


def test_negative_control_a_sum_that_follows_the_row_count_is_detected() -> None:
    weight, _, rows, _ = make(256, 1000, torch.float32)

    def split_by_rows(part: Tensor) -> Tensor:
        """What a library does that sums in halves when there are few rows."""
        if part.shape[0] >= 16:
            return functional.linear(part, weight)
        low, high = (functional.linear(part[:, i::2], weight[:, i::2]) for i in (0, 1))
        return low + high

    failed = differing(split_by_rows, rows)
    assert {(0, count) for count in (1, 2, 3, 5, 8, 15)} <= set(failed)


@pytest.mark.parametrize("width", [100, 96])
@pytest.mark.parametrize(("dtype", "layout"), CASES)
def test_shapes_and_strides(dtype: torch.dtype, layout: Layout, width: int) -> None:
    _, _, rows, layer = make(width, 37, dtype, layout)
    whole = layer(rows[:12])
    assert layer(rows[0]).shape == (37,)
    assert same_bits(layer(rows[:12].view(3, 4, width)), whole.view(3, 4, 37))
    assert layer(rows[:0]).shape == (0, 37)
    assert whole.is_contiguous()
    inner = torch.cat((rows, rows), 1)[:5, 50 : 50 + width]
    for strided in (rows[:24:2], rows[:width, :24].T, inner, rows[:1].expand(14, -1)):
        assert same_bits(layer(strided), layer(strided.contiguous()))
    without = pack_linear(torch.randn(37, width).to(dtype), layout=layout)
    assert without(rows[:3]).shape == (3, 37)


def test_packing_keeps_no_second_copy() -> None:
    weight = torch.randn(64, 64)
    layout = layouts(weight)[0]
    if layout == "plain":
        pytest.skip("no packed layout here")
    layer = pack_linear(weight, layout=layout)
    assert layer.layout == layout
    assert list(layer.parameters()) == []
    assert "64, 64" in repr(layer)
    expected = layer(torch.ones(2, 64))
    weight.zero_()
    assert same_bits(layer(torch.ones(2, 64)), expected)


def test_refuses_bad_input() -> None:
    weight = torch.randn(5, 7)
    for bad, bias in (
        (weight[0], None),
        (weight[:0], None),
        (weight.int(), None),
        (weight, torch.randn(4)),
        (weight, torch.randn(5).double()),
    ):
        with pytest.raises(KernelInputError):
            pack_linear(bad, bias)
    layer = pack_linear(weight)
    for rows in (torch.randn(3, 6), torch.randn(3, 7).double()):
        with pytest.raises(KernelInputError, match="linear takes"):
            layer(rows)
    with pytest.raises(BackendUnavailableError, match="onednn"):
        pack_linear(weight.double(), layout="onednn")
    with pytest.raises(BackendUnavailableError, match="native"):
        pack_linear(weight.double(), layout="native")


def test_special_values_stay_what_they_are() -> None:
    """Infinities and NaN pass through, and a NaN is not rounded into an infinity."""
    for dtype, layout in CASES:
        layer = pack_linear(torch.eye(48, dtype=dtype), layout=layout)
        rows = torch.ones(3, 48, dtype=dtype)
        rows[1, 5], rows[2, 7] = float("inf"), float("nan")
        result = layer(rows)
        assert torch.equal(result[0], rows[0])
        assert result[1, 5] == float("inf")
        assert result[2].isnan().all()


def test_numbers_of_rows_for_onednn_are_few_and_never_one() -> None:
    padded = {_stepped_rows(count) for count in range(1, 1025)}
    assert all(_stepped_rows(count) >= count for count in range(1025))
    assert _stepped_rows(0) == 0
    assert min(padded) == 4
    assert len(padded) <= 24


def test_the_native_product_needs_no_padding() -> None:
    native = native_linear_serves(torch.bfloat16)
    assert padded_rows(0) == 0
    assert padded_rows(5) == (5 if native else 8)


@pytest.mark.skipif("native" not in layouts(torch.ones(1, 1)), reason="no native product here")
@pytest.mark.parametrize("shape", [(1024, 1024), (1536, 512), (1040, 1032)])
def test_large_weights_start_where_large_pages_do(shape: tuple[int, int]) -> None:
    """And hold what small ones hold: the product is right to the last output."""
    weight, rows = torch.randn(shape), torch.randn(3, shape[1])
    layer = pack_linear(weight)
    assert layer.native_weight is not None
    panels = layer.native_weight.tensors[0]
    assert panels is not None
    assert panels.data_ptr() % (2 << 20) == 0
    torch.testing.assert_close(layer(rows), functional.linear(rows, weight), rtol=2e-4, atol=2e-4)
