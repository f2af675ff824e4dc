"""The loop over a decoder's layers in C++, see decoder_layers.py and csrc/decoder.h.

A stack's weights are told to the library once, a pool's caches once, a pass's rows at every call.
Tensors are trusted to have the shapes that the op checked. Knows CPU tensors only.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specinfer_kernels.decoder_rows import RotaryPlaces
from specinfer_kernels.native import native_failure, native_library, raise_for
from specinfer_kernels.native_rows import DTYPE_CODES
from specinfer_kernels.tree_attention import AttentionLayout

if TYPE_CHECKING:
    from specinfer_kernels.decoder_layers import DecoderLayer, DecoderStack

_POINTER, _LONG, _DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
_LARGEST_HEAD = 1024  # kMostHeadDim of csrc/rows.h


class _Layer(ctypes.Structure):
    """DecoderLayer of csrc/decoder.h, field by field."""

    _fields_ = (
        *((name, _POINTER) for name in ("attention_norm", "mlp_norm", "query_norm", "key_norm")),
        *((name, _POINTER) for name in ("query_key_value", "output", "gate_up", "down")),
        *((name, _DOUBLE) for name in ("attention_epsilon", "mlp_epsilon", "head_epsilon")),
        *((name, _DOUBLE) for name in ("scale", "softcap")),
        ("sliding_window", _LONG),
    )


class _Arguments(ctypes.Structure):
    """DecoderArguments of csrc/decoder.h, field by field."""

    _fields_ = (
        *((name, _POINTER) for name in ("layers", "key_caches", "value_caches", "hidden")),
        *((name, _POINTER) for name in ("positions", "slots", "cosines", "sines")),
        *((name, _POINTER) for name in ("row_offsets", "context_lens", "block_tables")),
        ("ancestors", _POINTER),
        *((name, _LONG) for name in ("num_layers", "num_rows", "width", "num_positions")),
        *((name, _LONG) for name in ("num_sequences", "max_blocks", "num_words", "num_blocks")),
        *((name, _LONG) for name in ("block_size", "num_heads", "num_kv_heads", "head_dim")),
        *((name, _LONG) for name in ("dtype", "num_threads")),
    )


@dataclass(frozen=True)
class NativeStack:
    """Layers as an array of the C struct, and their shape; a DecoderStack keeps the tensors."""

    layers: Any
    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype_code: int


@dataclass(frozen=True)
class CachePointers:
    """Arrays of pointers to the caches of every layer, and the shape they share."""

    keys: Any
    values: Any
    num_blocks: int
    block_size: int


def native_stack(stack: DecoderStack) -> NativeStack | None:
    """The layers for `decoder_layers`, or None when the library does not run all of them."""
    if native_failure() or stack.dtype not in DTYPE_CODES or stack.head_dim > _LARGEST_HEAD:
        return None
    if any(item.native_weight is None for layer in stack.layers for item in layer.products):
        return None
    return NativeStack(
        layers=(_Layer * len(stack.layers))(*map(_native_layer, stack.layers)),
        num_layers=len(stack.layers),
        width=stack.width,
        num_heads=stack.num_heads,
        num_kv_heads=stack.num_kv_heads,
        head_dim=stack.head_dim,
        dtype_code=DTYPE_CODES[stack.dtype],
    )


def _native_layer(layer: DecoderLayer) -> _Layer:
    norms = layer.head_norms
    weights = [item.native_weight for item in layer.products]
    return _Layer(
        layer.attention_norm.weight.data_ptr(),
        layer.mlp_norm.weight.data_ptr(),
        None if norms is None else norms.query.data_ptr(),
        None if norms is None else norms.key.data_ptr(),
        *(ctypes.addressof(weight.struct) for weight in weights if weight is not None),
        layer.attention_norm.epsilon,
        layer.mlp_norm.epsilon,
        0.0 if norms is None else norms.epsilon,
        layer.scale,
        layer.softcap or 0.0,
        layer.sliding_window or 0,
    )


def cache_pointers(pairs: Sequence[tuple[Tensor, Tensor]]) -> CachePointers:
    """Where the caches are; whoever asks keeps the tensors."""
    keys, values = zip(*pairs, strict=True)
    array = _POINTER * len(keys)
    return CachePointers(
        array(*(cache.data_ptr() for cache in keys)),
        array(*(cache.data_ptr() for cache in values)),
        *keys[0].shape[:2],
    )


def decoder_layers(
    hidden: Tensor,
    stack: NativeStack,
    places: RotaryPlaces,
    layout: AttentionLayout,
    caches: CachePointers,
) -> None:
    """As reference_decoder.decoder_layers, in place in `hidden`."""
    arguments = _Arguments(
        ctypes.addressof(stack.layers),
        ctypes.addressof(caches.keys),
        ctypes.addressof(caches.values),
        hidden.data_ptr(),
        places.positions.data_ptr(),
        places.slot_mapping.data_ptr(),
        places.cosines.data_ptr(),
        places.sines.data_ptr(),
        layout.row_offsets.data_ptr(),
        layout.context_lens.data_ptr(),
        layout.block_tables.data_ptr(),
        layout.ancestors.data_ptr(),
        stack.num_layers,
        hidden.shape[0],
        stack.width,
        places.cosines.shape[0],
        layout.context_lens.shape[0],
        layout.block_tables.shape[1],
        layout.ancestors.shape[1],
        caches.num_blocks,
        caches.block_size,
        stack.num_heads,
        stack.num_kv_heads,
        stack.head_dim,
        stack.dtype_code,
        torch.get_num_threads(),
    )
    status = native_library().specinfer_decoder_layers(ctypes.byref(arguments))
    if status:
        raise_for(status)
