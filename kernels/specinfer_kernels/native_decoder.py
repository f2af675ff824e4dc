"""A whole decoder in C++, see decoder_logits.py and csrc/decoder.h.

A stack's weights are told to the library once, a pool's caches once, a pass's rows at every call.
Tensors are trusted to have the shapes that the op checked. Knows CPU tensors only.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specinfer_kernels.native import native_failure, native_library, raise_for
from specinfer_kernels.native_rows import DTYPE_CODES

if TYPE_CHECKING:
    from specinfer_kernels.decoder_logits import DecoderLayer, DecoderRows, DecoderStack

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


class NativeStack(ctypes.Structure):
    """DecoderStack of csrc/decoder.h, field by field; the tensors are kept by the Python one."""

    _fields_ = (
        *((name, _POINTER) for name in ("layers", "embedding", "cosines", "sines")),
        *((name, _POINTER) for name in ("final_norm", "head")),
        ("final_epsilon", _DOUBLE),
        *((name, _LONG) for name in ("num_layers", "width", "vocab_size", "num_positions")),
        *((name, _LONG) for name in ("num_heads", "num_kv_heads", "head_dim", "dtype")),
    )
    kept: Any
    """The array of layers."""


class NativeCaches(ctypes.Structure):
    """DecoderCaches of csrc/decoder.h, field by field; whoever makes one keeps the tensors."""

    _fields_ = (
        *((name, _POINTER) for name in ("keys", "values")),
        *((name, _LONG) for name in ("num_blocks", "block_size")),
    )
    kept: Any
    """The arrays of pointers."""


class _Arguments(ctypes.Structure):
    """DecoderArguments of csrc/decoder.h, field by field."""

    _fields_ = (
        *((name, _POINTER) for name in ("stack", "caches")),
        *((name, _POINTER) for name in ("token_ids", "positions", "slots", "wanted")),
        *((name, _POINTER) for name in ("row_offsets", "context_lens", "block_tables")),
        *((name, _POINTER) for name in ("ancestors", "logits")),
        *((name, _LONG) for name in ("num_rows", "num_wanted", "num_sequences")),
        *((name, _LONG) for name in ("max_blocks", "num_words", "num_threads")),
    )


def native_stack(stack: DecoderStack) -> NativeStack | None:
    """The decoder for `decoder_logits`, or None when the library does not run all of it."""
    if native_failure() or stack.dtype not in DTYPE_CODES or stack.head_dim > _LARGEST_HEAD:
        return None
    head = stack.head.native_weight
    products = [item.native_weight for layer in stack.layers for item in layer.products]
    if head is None or None in products:
        return None
    layers = (_Layer * len(stack.layers))(*map(_native_layer, stack.layers))
    found = NativeStack(
        ctypes.addressof(layers),
        stack.embedding.data_ptr(),
        stack.cosines.data_ptr(),
        stack.sines.data_ptr(),
        stack.final_norm.weight.data_ptr(),
        ctypes.addressof(head.struct),
        stack.final_norm.epsilon,
        len(stack.layers),
        *stack.embedding.shape[::-1],
        stack.cosines.shape[0],
        stack.num_heads,
        stack.num_kv_heads,
        stack.head_dim,
        DTYPE_CODES[stack.dtype],
    )
    found.kept = layers
    return found


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


def native_caches(pairs: Sequence[tuple[Tensor, Tensor]]) -> NativeCaches:
    """Where the caches are, and the shape they share."""
    keys, values = zip(*pairs, strict=True)
    array = _POINTER * len(keys)
    kept = (
        array(*(cache.data_ptr() for cache in keys)),
        array(*(cache.data_ptr() for cache in values)),
    )
    found = NativeCaches(*map(ctypes.addressof, kept), *keys[0].shape[:2])
    found.kept = kept
    return found


def decoder_logits(
    rows: DecoderRows, stack: NativeStack, caches: NativeCaches, logits: Tensor
) -> None:
    """As reference_decoder.decoder_logits, into `logits`."""
    layout, wanted = rows.layout, rows.wanted
    ancestors, block_tables = layout.ancestors, layout.block_tables
    arguments = _Arguments(
        ctypes.addressof(stack),
        ctypes.addressof(caches),
        rows.token_ids.data_ptr(),
        rows.positions.data_ptr(),
        rows.slot_mapping.data_ptr(),
        wanted.data_ptr(),
        layout.row_offsets.data_ptr(),
        layout.context_lens.data_ptr(),
        block_tables.data_ptr(),
        ancestors.data_ptr(),
        logits.data_ptr(),
        ancestors.shape[0],
        wanted.shape[0],
        *block_tables.shape,
        ancestors.shape[1],
        torch.get_num_threads(),
    )
    status = native_library().specinfer_decoder_logits(ctypes.byref(arguments))
    if status:
        raise_for(status)
