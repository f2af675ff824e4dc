"""The MATCH walk over many trees at once, where the draws of all nodes are already made.

For a GPU: one small tensor leaves the device instead of one question for each visited node. Knows
no law and no noise: a draw is a token id.
"""

import torch
from torch import Tensor

from specinfer_kernels import reference
from specinfer_kernels.backends import Backend, choose_backend
from specinfer_kernels.errors import KernelInputError


def walk_trees(
    draws: Tensor,
    token_ids: Tensor,
    parents: Tensor,
    row_offsets: Tensor,
    max_depth: int,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Follow the target's draws down each tree: int64 [num_trees, 2 + max_depth].

    draws, token_ids: int64 [num_rows], the token drawn at each node and the token it carries.
    parents: int32 [num_rows], index of the parent within the tree, -1 for the root, parents before
    children. row_offsets: int32 [num_trees + 1], every tree at least its root. A row of the result
    is the number of accepted nodes, the tail (the first draw that no child carries) and the
    accepted nodes in order, then -1. Of children with one token the first counts. max_depth bounds
    the accepted nodes. (SpecInfer, ASPLOS'24, section 4.) Raises KernelInputError on a wrong shape
    or dtype, BackendUnavailableError when `backend` is named and cannot serve.
    """
    rows = draws.shape
    for name, tensor, dtype in (
        ("draws", draws, torch.int64),
        ("token_ids", token_ids, torch.int64),
        ("parents", parents, torch.int32),
    ):
        if tensor.dtype != dtype or tensor.dim() != 1 or tensor.shape != rows:
            raise KernelInputError(
                f"{name} must be a flat {dtype} of {rows[0]} rows, got {tensor.dtype} "
                f"{list(tensor.shape)}"
            )
    if row_offsets.dtype != torch.int32 or row_offsets.dim() != 1 or row_offsets.numel() < 1:
        raise KernelInputError("row_offsets must be a flat int32 of num_trees + 1")
    if max_depth < 0:
        raise KernelInputError(f"max_depth must not be negative, got {max_depth}")
    if len({tensor.device for tensor in (draws, token_ids, parents, row_offsets)}) > 1:
        raise KernelInputError("the tensors of a walk are on different devices")
    # There is no C++ kernel: on a CPU the engine draws for visited nodes only.
    if choose_backend(draws.device, backend, draws.dtype, triton_dtypes=(torch.int64,)) == "triton":
        from specinfer_kernels.triton import walk

        return walk.walk_trees(draws, token_ids, parents, row_offsets, max_depth)
    return reference.walk_trees(draws, token_ids, parents, row_offsets, max_depth)
