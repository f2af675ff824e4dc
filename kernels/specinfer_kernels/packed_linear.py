"""Linear layers whose row bits do not depend on the number of rows.

On a CPU a float32 or bfloat16 weight is packed once: for the C++ product where the processor has
what it needs, which gives a row the same bits for every number of rows; else for oneDNN, which
does so from two rows on, but not in bfloat16 beside a matrix unit (AMX), and gets its rows padded
to one of a few numbers. On a GPU Triton
multiplies, in tiles that no number of rows changes. Everything else runs `F.linear` in row blocks
of one fixed size with both feature counts padded with zeros to whole vectors: a library takes
another kernel for another number of rows, and for odd sizes sums in another order at some offsets.
A weight may be rounded to int8 with one scale for each output (weight-only quantisation): half the
memory to read, and sums as exact as before. Knows no model: a layer is a weight and a bias.
"""

from types import ModuleType
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from specinfer_kernels import reference_linear
from specinfer_kernels.errors import BackendUnavailableError, KernelInputError
from specinfer_kernels.native_linear import (
    NativeWeight,
    multiply_native,
    native_linear_serves,
    pack_native,
)
from specinfer_kernels.triton.runtime import DTYPES as TRITON_DTYPES
from specinfer_kernels.triton.runtime import triton_failure

if TYPE_CHECKING:
    from specinfer_kernels.triton.linear import TritonWeight

Layout = Literal["native", "onednn", "triton", "plain"]

_PACKED_DTYPES = (torch.float32, torch.bfloat16)
# Numbers of rows grow in these steps up to these numbers, see `padded_rows`.
_ROW_STEPS = ((16, 4), (64, 8), (256, 32))
_LAST_ROW_STEP = 128
_BLOCK_ROWS = {"cpu": 16, "cuda": 64}
# The number of rows oneDNN lays the weight out for: a small tree. It was at or near the best of
# 1, 4, 8, 16, 64, 256 and none for every number of rows measured, and it changes no promise.
_ROWS_HINT = 8
_FEATURE_MULTIPLE = 16


class PackedLinear(nn.Module):
    """y = x W^T + b, or y = (x W^T) scale + b. Made by `pack_linear`; inference only.

    in_features, out_features: int. dtype: of input and output. layout: how the weight is kept.
    int8: whether W is whole numbers up to 127, in memory as int8 where the layout is native or
    triton.
    row_invariant: whether a row's bits are promised not to depend on the other rows.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, layout: Layout, scale: Tensor | None = None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self.layout = layout
        self.row_invariant = weight.device.type in _BLOCK_ROWS
        self.int8 = scale is not None
        self._native: NativeWeight | None = None
        self._triton: TritonWeight | None = None
        stored = weight.to(torch.int8) if self.int8 and layout in ("native", "triton") else weight
        if layout == "native":
            self._native = pack_native(stored, bias, self.dtype, scale)
            return
        if layout == "triton":
            self._triton = _triton().pack_triton(stored, bias, self.dtype, scale)
            return
        self._scale, self._outer_bias = scale, None
        if scale is not None and bias is not None:
            self._outer_bias, bias = bias.detach().to(scale.dtype), None
        # Plain attributes: an opaque oneDNN tensor cannot be a buffer of a state dict.
        self._bias = None if bias is None else bias.detach().clone()
        self._weight = weight.detach()
        if layout == "onednn":
            self._weight = _reorder(self._weight)
        elif self.row_invariant:
            self._pad_features()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] of the weight's dtype to [..., out_features]."""
        if self._native is not None:
            return multiply_native(self._native, x)
        if x.dtype != self.dtype or x.shape[-1] != self.in_features:
            raise KernelInputError(
                f"linear takes {self.dtype} [..., {self.in_features}], "
                f"got {x.dtype} {list(x.shape)}"
            )
        rows = x.reshape(-1, self.in_features)
        if self._triton is not None:
            product: Tensor = _triton().multiply_triton(self._triton, rows)
            return product.view(*x.shape[:-1], self.out_features)
        if rows.shape[0] == 0:
            result = rows.new_empty(0, self.out_features)
        elif self.layout == "onednn":
            result = self._stepped(rows)
        elif self.row_invariant:
            result = self._blocked(rows)
        else:
            result = functional.linear(rows, self._weight, self._bias)
        if self._scale is not None:
            result = result.to(self._scale.dtype) * self._scale
            result = (result if self._outer_bias is None else result + self._outer_bias).to(x.dtype)
        return result.view(*x.shape[:-1], self.out_features)

    @property
    def native_weight(self) -> NativeWeight | None:
        """What the native library is told of the weight; None in any other layout."""
        return self._native

    @property
    def stored_bytes(self) -> int:
        """Bytes of the weight, its scale and its bias in memory."""
        if self._native is not None:
            tensors = self._native.tensors
        elif self._triton is not None:
            tensors = self._triton.tensors
        else:
            tensors = (self._weight, self._bias, self._scale, self._outer_bias)
        return sum(item.numel() * item.element_size() for item in tensors if item is not None)

    def extra_repr(self) -> str:
        kind = f"{self.dtype}, int8" if self.int8 else f"{self.dtype}"
        return f"{self.in_features}, {self.out_features}, {kind}, {self.layout}"

    def _pad_features(self) -> None:
        columns, rows = (
            -self.in_features % _FEATURE_MULTIPLE,
            -self.out_features % _FEATURE_MULTIPLE,
        )
        if columns or rows:
            self._weight = functional.pad(self._weight, (0, columns, 0, rows))
        if rows and self._bias is not None:
            self._bias = functional.pad(self._bias, (0, rows))
        self._weight = self._weight.contiguous()

    def _stepped(self, rows: Tensor) -> Tensor:
        count = rows.shape[0]
        padding = _stepped_rows(count) - count
        result: Tensor = torch.ops.mkldnn._linear_pointwise(
            functional.pad(rows, (0, 0, 0, padding)) if padding else rows,
            self._weight,
            self._bias,
            "none",
            [],
            "",
        )
        return result[:count]

    def _blocked(self, rows: Tensor) -> Tensor:
        count = rows.shape[0]
        columns = self._weight.shape[1] - self.in_features
        block_rows = _BLOCK_ROWS[rows.device.type]
        padded = functional.pad(rows, (0, columns, 0, -count % block_rows)).contiguous()
        blocks = [
            functional.linear(block, self._weight, self._bias)
            for block in torch.split(padded, block_rows)
        ]
        return torch.cat(blocks)[:count, : self.out_features].contiguous()


def padded_rows(num_rows: int) -> int:
    """Rows that a packed layer computes for `num_rows`; a caller that pads once saves it in each.

    The native product takes any number of rows as it is.
    """
    return num_rows if native_linear_serves(torch.bfloat16) else _stepped_rows(num_rows)


def _stepped_rows(num_rows: int) -> int:
    """Rows that oneDNN is given.

    Never one or two: it sums a single row in another order, and of a large weight four rows are
    read faster than fewer (measured: by a third). Beyond that the numbers are few, because it
    compiles and keeps a kernel for each number of rows of each layer.
    """
    step = next((step for most, step in _ROW_STEPS if num_rows <= most), _LAST_ROW_STEP)
    return -(-num_rows // step) * step


def pack_linear(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    layout: Layout | None = None,
    int8: bool = False,
) -> PackedLinear:
    """The row-invariant form of a linear layer; keep it instead of the weight.

    weight: [out_features, in_features]; bias: [out_features] of the same dtype, or None. A native
    or onednn layer holds a copy and no reference to `weight`, any other reads it where it lies.
    layout: the fastest by default. int8: round the weight to int8 by `quantize_rows`. Raises
    KernelInputError on a wrong shape or dtype, BackendUnavailableError when a layout that is asked
    for does not serve this weight here.
    """
    if weight.dim() != 2 or 0 in weight.shape or not weight.is_floating_point():
        raise KernelInputError(
            f"weight must be a floating [out, in], got {weight.dtype} {list(weight.shape)}"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise KernelInputError(
            f"bias must be {weight.dtype} [{weight.shape[0]}], got {bias.dtype} {list(bias.shape)}"
        )
    served = layouts(weight, int8=int8)
    if layout is not None and layout not in served and not _interprets(layout, weight):
        raise BackendUnavailableError(
            f"the layout {layout} does not serve {weight.dtype} on {weight.device} here"
        )
    if not int8:
        return PackedLinear(weight, bias, layout or served[0])
    whole, scale = quantize_rows(weight.detach())
    return PackedLinear(whole.to(weight.dtype), bias, layout or served[0], scale)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest int8 weight with one symmetric scale for each output; see the reference.

    weight: floating [out, in]. Returns int8 [out, in] and its scale [out], float64 for a float64
    weight and else float32. Raises KernelInputError when a weight is not finite.
    """
    if not bool(weight.isfinite().all()):
        raise KernelInputError("a weight that is not finite cannot be rounded to int8")
    return reference_linear.quantize_rows(weight)


def round_to_int8(weight: Tensor) -> Tensor:
    """The weight that int8 stands for, in its own dtype; rounding that again gives the same int8.

    The largest of a row is kept exactly, and so the scale; every other is off by less than a half
    of it after rounding to bfloat16 (at most 127 / 512).
    """
    whole, scale = quantize_rows(weight)
    return (whole.to(scale.dtype) * scale.unsqueeze(1)).to(weight.dtype)


def layouts(weight: Tensor, int8: bool = False) -> tuple[Layout, ...]:
    """The layouts that serve this weight here, fastest first."""
    found: list[Layout] = []
    if weight.device.type == "cpu" and weight.dtype in _PACKED_DTYPES:
        if native_linear_serves(weight.dtype, int8):
            found.append("native")
        if _onednn_serves(weight.dtype):
            found.append("onednn")
    if weight.device.type == "cuda" and _triton_serves(weight):
        found.append("triton")
    return (*found, "plain")


def _triton_serves(weight: Tensor) -> bool:
    return weight.dtype in TRITON_DTYPES and triton_failure(weight.device) is None


def _interprets(layout: Layout, weight: Tensor) -> bool:
    """Whether Triton's interpreter is asked for by name, the only way that a CPU runs it."""
    return layout == "triton" and weight.device.type == "cpu" and _triton_serves(weight)


def _triton() -> ModuleType:
    """The launcher; Triton is imported when it is first needed, which takes a second."""
    from specinfer_kernels.triton import linear

    return linear


def _reorder(weight: Tensor) -> Tensor:
    with torch.no_grad():
        reordered: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS_HINT)
    return reordered


def _onednn_serves(dtype: torch.dtype) -> bool:
    if not (torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")):
        return False
    if dtype != torch.bfloat16:
        return True
    # With a matrix unit a row's bits would follow the number of rows and of threads; without
    # AVX-512 or its like oneDNN refuses to lay bfloat16 weights out.
    if torch.cpu._is_amx_tile_supported():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
