"""Walks on a GPU: what to launch. `walk_device` computes; one program a tree."""

import torch
from torch import Tensor

from specinfer_kernels.triton import walk_device as device
from specinfer_kernels.triton.runtime import device_of

BLOCK = 256


def walk_trees(
    draws: Tensor, token_ids: Tensor, parents: Tensor, row_offsets: Tensor, max_depth: int
) -> Tensor:
    """As the op."""
    num_trees = row_offsets.numel() - 1
    walks = torch.empty((num_trees, 2 + max_depth), dtype=torch.int64, device=draws.device)
    if num_trees:
        with device_of(draws):
            device.walk_kernel[(num_trees,)](
                draws,
                token_ids,
                parents,
                row_offsets,
                walks,
                max_depth,
                BLOCK=BLOCK,
                num_warps=1,
                enable_fp_fusion=False,
            )
    return walks
