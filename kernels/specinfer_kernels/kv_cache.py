"""Moves of keys and values in the paged pool: write, compact, copy.

The pool is [num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim]; a layer's caches are
its views pool[layer, 0] and pool[layer, 1]. A slot is block * block_size + offset. Knows no block
manager: whoever calls owns the slots.

Caches may be float8_e4m3fn for rows of another dtype: an element is then what lies there times a
scale that a layer's keys, or values, share. The scale is given and not found from the rows, so
that a key has the same bits whichever pass writes it.
"""

import math

import torch
from torch import Tensor

from specinfer_kernels import native, reference
from specinfer_kernels.backends import Backend, choose_backend
from specinfer_kernels.errors import KernelInputError
from specinfer_kernels.triton.runtime import DTYPES as TRITON_DTYPES


def write_kv(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
    backend: Backend | None = None,
) -> None:
    """Put the key and value of row i into slot slot_mapping[i], in place.

    key, value: [num_rows, num_kv_heads, head_dim] of the caches' dtype. key_cache, value_cache:
    contiguous [num_blocks, block_size, num_kv_heads, head_dim]. slot_mapping: int64 [num_rows],
    distinct slots. Caches of float8_e4m3fn take float16, bfloat16 and float32 divided by
    key_scale or value_scale, rounded to nearest and kept within 448; no C++ kernel does.
    Raises KernelInputError on a wrong shape, dtype, scale, device or (on a CPU) slot.
    """
    rows = (slot_mapping.shape[0], *key_cache.shape[2:])
    if key_cache.dim() != 4 or value_cache.shape != key_cache.shape:
        raise KernelInputError(
            f"caches must have one 4-dimensional shape, got {list(key_cache.shape)} "
            f"and {list(value_cache.shape)}"
        )
    if key.shape != rows or value.shape != rows:
        raise KernelInputError(
            f"key and value must be {list(rows)}, got {list(key.shape)} and {list(value.shape)}"
        )
    if key.dtype != value.dtype or key_cache.dtype != value_cache.dtype:
        raise KernelInputError(
            f"keys and values differ: {key.dtype} and {value.dtype} rows, {key_cache.dtype} and "
            f"{value_cache.dtype} caches"
        )
    check_scales(key.dtype, key_cache.dtype, key_scale, value_scale)
    tensors = (key, value, key_cache, value_cache, slot_mapping)
    if len({tensor.device for tensor in tensors}) > 1:
        raise KernelInputError("rows, caches and slot_mapping are on different devices")
    if not (key_cache.is_contiguous() and value_cache.is_contiguous()):
        raise KernelInputError("the caches must be contiguous")
    chosen = choose_backend(key_cache.device, backend, key_cache.dtype, native.DTYPE_CODES)
    if chosen == "native" and _native_takes(key, value, slot_mapping):
        native.write_kv(key, value, key_cache, value_cache, slot_mapping)
        return
    check_indices("slot_mapping", slot_mapping, key_cache.shape[0] * key_cache.shape[1])
    reference.write_kv(key, value, key_cache, value_cache, slot_mapping, key_scale, value_scale)


def compact_kv(
    pool: Tensor, sources: Tensor, targets: Tensor, *, backend: Backend | None = None
) -> None:
    """Copy the key and value of slot sources[i] to slot targets[i] in every layer, in place.

    Every source is read before any target is written, so overlapping moves are safe in any order.
    sources, targets: int64 [n], targets distinct. Raises KernelInputError as write_kv does.
    """
    _check_moves(pool, sources, targets, pool.shape[2] * pool.shape[3] if pool.dim() == 6 else 0)
    pool = _bytes_of(pool)
    movable = (*TRITON_DTYPES, torch.uint8)
    if choose_backend(pool.device, backend, pool.dtype, triton_dtypes=movable) == "triton":
        # Imported when first needed: it takes a second, and a CPU never needs it.
        from specinfer_kernels.triton import decoder_rows

        if decoder_rows.can_move(sources.numel()):
            decoder_rows.move_slots(pool, sources, targets)
            return
    reference.compact_kv(pool, sources, targets)


def copy_blocks(pool: Tensor, sources: Tensor, targets: Tensor) -> None:
    """Copy block sources[i] to block targets[i] in every layer, in place (copy-on-write).

    sources, targets: int64 [n] block ids, targets distinct. Raises KernelInputError as write_kv
    does.
    """
    _check_moves(pool, sources, targets, pool.shape[2] if pool.dim() == 6 else 0)
    reference.copy_blocks(_bytes_of(pool), sources, targets)


def _bytes_of(pool: Tensor) -> Tensor:
    """A pool of float8 as bytes, which everything can move; any other pool as it is."""
    return pool.view(torch.uint8) if pool.dtype == reference.FLOAT8 else pool


def _native_takes(key: Tensor, value: Tensor, slot_mapping: Tensor) -> bool:
    """Whether each head's values lie side by side, as a memory copy needs."""
    flat = slot_mapping.dtype == torch.int64 and slot_mapping.is_contiguous()
    return flat and key.stride(2) == 1 and value.stride(2) == 1


def _check_moves(pool: Tensor, sources: Tensor, targets: Tensor, limit: int) -> None:
    if pool.dim() != 6 or pool.shape[1] != 2 or not pool.is_contiguous():
        raise KernelInputError(
            "pool must be a contiguous [num_layers, 2, num_blocks, block_size, num_kv_heads, "
            f"head_dim], got {list(pool.shape)}"
        )
    if sources.shape != targets.shape:
        raise KernelInputError(f"{sources.shape[0]} sources but {targets.shape[0]} targets")
    check_indices("sources", sources, limit)
    check_indices("targets", targets, limit)


def check_scales(
    rows: torch.dtype, caches: torch.dtype, key_scale: float, value_scale: float
) -> None:
    """Raise KernelInputError unless caches of one dtype can hold rows of the other so scaled."""
    if caches != reference.FLOAT8:
        if rows != caches:
            raise KernelInputError(f"dtypes differ: {rows} rows, {caches} caches")
        if key_scale != 1.0 or value_scale != 1.0:
            raise KernelInputError(f"caches of {caches} have no scale")
        return
    if rows not in TRITON_DTYPES:
        raise KernelInputError(f"caches of {caches} do not take rows of {rows}")
    for name, scale in (("key_scale", key_scale), ("value_scale", value_scale)):
        if not 0.0 < scale < math.inf:
            raise KernelInputError(f"{name} must be positive and finite, got {scale}")


def check_indices(name: str, indices: Tensor, limit: int) -> None:
    """Raise KernelInputError unless indices are a flat int64 and (on a CPU) in 0..limit - 1."""
    if indices.dtype != torch.int64 or indices.dim() != 1:
        raise KernelInputError(
            f"{name} must be a flat int64, got {indices.dtype} {list(indices.shape)}"
        )
    # Reading values would make a GPU wait for its stream; there the device's own checks speak.
    if indices.device.type != "cpu" or indices.numel() == 0:
        return
    lowest, highest = (int(bound) for bound in torch.aminmax(indices))
    if lowest < 0 or highest >= limit:
        raise KernelInputError(f"{name} must lie in 0..{limit - 1}, got {lowest}..{highest}")
