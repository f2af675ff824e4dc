"""Calls on tensors of the native ops between the products, see decoder_rows.py and csrc/rows.h.

Tensors are trusted to have the shapes and strides that the ops checked; slots and positions the
library checks itself. Knows CPU tensors only.
"""

import torch
from torch import Tensor

from specinfer_kernels.native import native_library, raise_for

# float64 is left to the reference: the stock modules round its norms to float32 in their own order.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}


def rms_norm(hidden: Tensor, update: Tensor | None, weight: Tensor, epsilon: float) -> Tensor:
    """As reference.rms_norm, or with an update as reference.add_rms_norm."""
    num_rows, width = hidden.shape
    output = hidden.new_empty(num_rows, width)
    status = native_library().specinfer_rms_norm(
        hidden.data_ptr(),
        None if update is None else update.data_ptr(),
        weight.data_ptr(),
        output.data_ptr(),
        num_rows,
        width,
        hidden.stride(0),
        0 if update is None else update.stride(0),
        epsilon,
        DTYPE_CODES[hidden.dtype],
        torch.get_num_threads(),
    )
    raise_for(status)
    return output


def silu_multiply(gate_up: Tensor) -> Tensor:
    """As reference.silu_multiply."""
    num_rows, double_width = gate_up.shape
    output = gate_up.new_empty(num_rows, double_width // 2)
    status = native_library().specinfer_silu_multiply(
        gate_up.data_ptr(),
        gate_up.stride(0),
        num_rows,
        double_width // 2,
        output.data_ptr(),
        DTYPE_CODES[gate_up.dtype],
        torch.get_num_threads(),
    )
    raise_for(status)
    return output


def rotate_and_write_kv(
    mixed: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    cosines: Tensor,
    sines: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    epsilon: float,
) -> Tensor:
    """As reference.rotate_and_write_kv; everything is checked before anything is written."""
    num_rows, width = mixed.shape
    num_blocks, block_size, num_kv_heads, head_dim = key_cache.shape
    num_heads = width // head_dim - 2 * num_kv_heads
    query = mixed.new_empty(num_rows, num_heads, head_dim)
    status = native_library().specinfer_rotate_and_write_kv(
        mixed.data_ptr(),
        cosines.data_ptr(),
        sines.data_ptr(),
        positions.data_ptr(),
        slot_mapping.data_ptr(),
        None if query_weight is None else query_weight.data_ptr(),
        None if key_weight is None else key_weight.data_ptr(),
        query.data_ptr(),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        num_rows,
        mixed.stride(0),
        num_heads,
        num_kv_heads,
        head_dim,
        cosines.shape[0],
        num_blocks * block_size,
        epsilon,
        DTYPE_CODES[mixed.dtype],
        torch.get_num_threads(),
    )
    raise_for(status)
    return query
