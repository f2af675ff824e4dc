"""The likeliest tokens of every row and how likely each is: what a drafter asks of its logits.

Knows no noise, no law and no tree: a row is a row.
"""

import torch
from torch import Tensor

from specinfer_kernels import native, reference
from specinfer_kernels.backends import Backend, choose_backend
from specinfer_kernels.errors import KernelInputError


def rank_tokens(
    z: Tensor, count: int, spread: float = 1.0, *, backend: Backend | None = None
) -> Tensor:
    """The `count` largest of every row with the logarithm of softmax(z / spread).

    z: float32 [n, vocab_size], -inf allowed. Returns float64 [2, n, min(count, vocab_size)], tokens
    (which it holds exactly) and log scores, rounded to float32, the best first, so that one copy
    takes both from a device; equal ones come in any order. What cannot be drawn has the score -inf
    or NaN. Raises KernelInputError on a wrong shape, dtype or range, BackendUnavailableError when
    `backend` is named and cannot serve.
    """
    if z.dim() != 2 or z.dtype != torch.float32 or z.shape[1] < 1:
        raise KernelInputError(f"z must be float32 [n, vocab_size], got {z.dtype} {list(z.shape)}")
    if count < 1 or not spread > 0:
        raise KernelInputError(f"count and spread must be positive, got {count} and {spread}")
    count = min(count, z.shape[1])
    if choose_backend(z.device, backend, z.dtype, (torch.float32,)) == "native":
        return native.rank_tokens(z if z.stride(1) == 1 else z.contiguous(), count, spread)
    return reference.rank_tokens(z, count, spread)
