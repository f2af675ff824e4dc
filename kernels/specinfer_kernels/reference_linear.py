"""Linear layers in plain torch: the definition that packed layers are tested against.

Sums are taken in float64 and rounded once, so they say what is right and not which bits a product
has: those depend on its order of summation. Knows tensors only.
"""

import torch
from torch import Tensor

INT8_LARGEST = 127


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows [n, in] and weight [out, in] to float64 [n, out]."""
    result = rows.double() @ weight.double().T
    return result if bias is None else result + bias.double()


def int8_linear(rows: Tensor, whole: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows [n, in], int8 whole [out, in] and its scale [out] to float64 [n, out]."""
    result = rows.double() @ whole.double().T * scale.double()
    return result if bias is None else result + bias.double()


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round to nearest, ties to even, on a grid of the row's largest magnitude over 127.

    weight: floating and finite [out, in]. Returns int8 [out, in] and the scale [out]; the scale of
    a row of zeros is 1.
    """
    wide = weight if weight.dtype == torch.float64 else weight.float()
    largest = wide.abs().amax(1)
    scale = torch.where(largest > 0, largest / INT8_LARGEST, 1.0)
    whole = torch.round(wide / scale.unsqueeze(1)).clamp(-INT8_LARGEST, INT8_LARGEST)
    return whole.to(torch.int8), scale
