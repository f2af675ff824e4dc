"""The definition of `sample_law` in plain torch, row by row, by sorting.

Knows tensors only. The kernels find the same sets without a sort.
"""

import math

import torch
from torch import Tensor

from specinfer_kernels import reference

_TARGET = 1


def sample_law(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    """As the op."""
    laws = [
        law_of(row, float(heat), int(most), float(mass), float(least))
        for row, heat, most, mass, least in zip(
            logits, temperature, top_k, top_p, min_p, strict=True
        )
    ]
    if not laws:
        return seeds.new_empty(0)
    noise = reference.gumbel_noise(seeds, positions, logits.shape[1], _TARGET)
    return reference.sample_gumbel(torch.stack(laws), noise, temperature == 0)


def law_of(row: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """The processed logits of one row, float32 [vocab_size]; -inf where a token is not kept."""
    row = row.masked_fill(row.isnan(), -math.inf)
    if temperature == 0 or not bool((row > -math.inf).any()):
        return row
    row = row / torch.tensor(temperature, dtype=torch.float32, device=row.device)
    # A stable sort has the lower ids of equal logits first.
    values, order = torch.sort(row, descending=True, stable=True)
    kept = torch.ones_like(values, dtype=torch.bool)
    if top_k > 0:
        kept[top_k:] = False
    weights = torch.where(kept, torch.exp(values.double() - values[0].double()), 0.0)
    if top_p < 1.0:
        before = weights.cumsum(0) - weights
        kept &= before < top_p * weights.sum()
        kept[0] = True
    if min_p > 0.0:
        kept &= values >= values[0] + math.log(min_p)
    return torch.full_like(row, -math.inf).index_copy_(
        0, order, values.masked_fill(~kept, -math.inf)
    )
