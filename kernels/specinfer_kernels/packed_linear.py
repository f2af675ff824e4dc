"""Linear layers whose row bits do not depend on the number of rows.

On a CPU a float32 or bfloat16 weight is prepacked once for oneDNN, which reads it faster at few
rows than `F.linear` does and gives a row the same bits for every number of rows from two on; rows
are padded to one of a few numbers. Everything else runs `F.linear`, on a CPU in row blocks of one
fixed size with both feature counts padded with zeros to whole vectors: the library's edge code for
odd sizes sums in another order at some row offsets. Knows no model: a layer is a weight and a bias.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from specinfer_kernels.errors import KernelInputError

_PACKED_DTYPES = (torch.float32, torch.bfloat16)
# Numbers of rows grow in these steps up to these numbers, see `padded_rows`.
_ROW_STEPS = ((16, 4), (64, 8), (256, 32))
_LAST_ROW_STEP = 128
_BLOCK_ROWS = 16
# The number of rows oneDNN lays the weight out for: a small tree. It was at or near the best of
# 1, 4, 8, 16, 64, 256 and none for every number of rows measured, and it changes no promise.
_ROWS_HINT = 8
_FEATURE_MULTIPLE = 16


class PackedLinear(nn.Module):
    """y = x W^T + b. Made by `pack_linear`; inference only.

    in_features, out_features: int. dtype: of weight and input. packed: oneDNN layout or plain.
    row_invariant: whether a row's bits are promised not to depend on the other rows.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, packed: bool) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self.packed = packed
        self.row_invariant = weight.device.type == "cpu"
        # Plain attributes: an opaque oneDNN tensor cannot be a buffer of a state dict.
        self._bias = None if bias is None else bias.detach().clone()
        self._weight = weight.detach()
        if packed:
            self._weight = _reorder(self._weight)
        elif self.row_invariant:
            self._pad_features()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] of the weight's dtype to [..., out_features]."""
        if x.dtype != self.dtype or x.shape[-1] != self.in_features:
            raise KernelInputError(
                f"linear takes {self.dtype} [..., {self.in_features}], "
                f"got {x.dtype} {list(x.shape)}"
            )
        num_rows = x.numel() // self.in_features
        padding = padded_rows(num_rows) - num_rows
        if self.packed and not padding:
            return self._packed(x)
        rows = x.reshape(-1, self.in_features)
        if self.packed:
            result = self._packed(functional.pad(rows, (0, 0, 0, padding)))[:num_rows]
        elif num_rows == 0:
            result = rows.new_empty(0, self.out_features)
        elif self.row_invariant:
            result = self._blocked(rows)
        else:
            result = functional.linear(rows, self._weight, self._bias)
        return result.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        kind = "packed" if self.packed else "plain"
        return f"{self.in_features}, {self.out_features}, {self.dtype}, {kind}"

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

    def _packed(self, rows: Tensor) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(
            rows, self._weight, self._bias, "none", [], ""
        )
        return result

    def _blocked(self, rows: Tensor) -> Tensor:
        count = rows.shape[0]
        columns = self._weight.shape[1] - self.in_features
        padded = functional.pad(rows, (0, columns, 0, -count % _BLOCK_ROWS)).contiguous()
        blocks = [
            functional.linear(block, self._weight, self._bias)
            for block in torch.split(padded, _BLOCK_ROWS)
        ]
        return torch.cat(blocks)[:count, : self.out_features].contiguous()


def padded_rows(num_rows: int) -> int:
    """Rows that a packed layer computes for `num_rows`; a caller that pads once saves it in each.

    Never one or two: oneDNN sums a single row in another order, and of a large weight four rows are
    read faster than fewer (measured: by a third). Beyond that the numbers are few, because oneDNN
    compiles and keeps a kernel for each number of rows of each layer.
    """
    step = next((step for most, step in _ROW_STEPS if num_rows <= most), _LAST_ROW_STEP)
    return -(-num_rows // step) * step


def pack_linear(weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    """The row-invariant form of a linear layer; keep it instead of the weight.

    weight: [out_features, in_features]; bias: [out_features] of the same dtype, or None. A packed
    layer holds a copy in oneDNN's layout and no reference to `weight`. Raises KernelInputError on
    a wrong shape or dtype.
    """
    if weight.dim() != 2 or 0 in weight.shape or not weight.is_floating_point():
        raise KernelInputError(
            f"weight must be a floating [out, in], got {weight.dtype} {list(weight.shape)}"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise KernelInputError(
            f"bias must be {weight.dtype} [{weight.shape[0]}], got {bias.dtype} {list(bias.shape)}"
        )
    return PackedLinear(weight, bias, can_pack(weight))


def _reorder(weight: Tensor) -> Tensor:
    with torch.no_grad():
        reordered: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS_HINT)
    return reordered


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN's prepacked linear serves this weight here."""
    if weight.device.type != "cpu" or weight.dtype not in _PACKED_DTYPES:
        return False
    if not (torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")):
        return False
    # Without AVX-512 or its like oneDNN refuses to lay bfloat16 weights out.
    return weight.dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
