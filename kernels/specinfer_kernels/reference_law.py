"""How raw logits become a law: temperature, top-k, top-p and min-p, row by row in plain torch.

The one definition of a law. It makes the draws of `sample_law` where there is no kernel for them,
and the engine's pipeline ends with it; the kernels find the same sets without a sort. Knows tensors
only.
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
        law_of(row.masked_fill(row.isnan(), -math.inf), heat, most, mass, least)
        for row, heat, most, mass, least in zip(
            logits,
            temperature.tolist(),
            top_k.tolist(),
            top_p.tolist(),
            min_p.tolist(),
            strict=True,
        )
    ]
    if not laws:
        return seeds.new_empty(0)
    noise = reference.gumbel_noise(seeds, positions, logits.shape[1], _TARGET)
    return reference.sample_gumbel(torch.stack(laws), noise, temperature == 0)


def law_of(row: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Logits of a row's law, -inf where a token is not kept.

    Args:
        row: float32 or float64 [vocab_size] without NaN, which the cuts would hide; not changed.
        temperature, top_k, top_p, min_p: as in `law_sampling.Laws`, which says what turns them off.
    """
    if temperature == 0.0:
        return row
    if temperature != 1.0:
        # A tensor, for a GPU divides by a number by multiplying with its reciprocal.
        row = row / torch.tensor(temperature, dtype=row.dtype, device=row.device)
    if 0 < top_k < row.shape[0]:
        row = keep_top_k(row, top_k)
    if top_p < 1.0:
        row = keep_top_p(row, top_p)
    if min_p > 0.0:
        row = keep_min_p(row, min_p)
    return row


def keep_top_k(row: Tensor, top_k: int) -> Tensor:
    """Keep the `top_k` largest logits; of equal ones the lower token ids."""
    smallest_kept = torch.topk(row, top_k).values[-1]
    kept = row > smallest_kept
    ties = torch.nonzero(row == smallest_kept).flatten()  # ascending token ids
    kept[ties[: top_k - int(kept.sum())]] = True
    return row.masked_fill(~kept, -math.inf)


def keep_top_p(row: Tensor, top_p: float) -> Tensor:
    """Keep the smallest prefix of the descending sort whose mass reaches `top_p`, one at least.

    Equal logits stand in the order of their token ids; the mass is summed in float64, as shares of
    the best token's, which add up exactly for tokens that tie with it. Only tokens that can matter
    are sorted: all tokens below a probability of (1 - top_p) / V together have less than 1 - top_p,
    so none of them is needed; half of that leaves room for rounding.
    """
    probabilities = row.double().softmax(0)
    smallest = (1.0 - top_p) / (2 * row.shape[0])
    candidates = torch.nonzero(probabilities >= smallest).flatten()  # ascending token ids
    mass, order = torch.sort(probabilities[candidates], descending=True, stable=True)
    best = mass[:1]  # nothing where no token can be drawn
    shares = mass / best
    num_kept = max(1, int((shares.cumsum(0) - shares < top_p / best).sum()))
    kept = candidates[order[:num_kept]]
    return torch.full_like(row, -math.inf).index_copy_(0, kept, row[kept])


def keep_min_p(row: Tensor, min_p: float) -> Tensor:
    """Keep tokens whose probability is at least `min_p` times that of the best one."""
    least = row.max().double() + math.log(min_p)
    return row.masked_fill(row.double() < least, -math.inf)
