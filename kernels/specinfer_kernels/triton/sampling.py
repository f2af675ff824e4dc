"""Draws on a GPU: what to launch. `sampling_device` computes; one program a row."""

import torch
from torch import Tensor

from specinfer_kernels.law_sampling import Laws
from specinfer_kernels.triton import sampling_device as device
from specinfer_kernels.triton.runtime import device_of

BLOCK = 1024


def sample_law(logits: Tensor, laws: Laws, seeds: Tensor, positions: Tensor) -> Tensor:
    """As the op."""
    num_rows, vocab_size = logits.shape
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows:
        pointers = device.Laws(laws.temperature, laws.top_k, laws.top_p, laws.min_p)
        with device_of(logits):
            device.sample_kernel[(num_rows,)](
                logits,
                pointers,
                seeds,
                positions,
                tokens,
                logits.stride(0),
                vocab_size,
                BLOCK=BLOCK,
                num_warps=8,
                enable_fp_fusion=False,
            )
    return tokens
