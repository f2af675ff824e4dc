"""The definition of `decoder_logits`: the single ops, one after the other.

Also what runs wherever the C++ loop does not: on GPUs, in float64, with oneDNN's products. Each op
takes the backend that it would take by itself. Knows tensors and the ops only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from specinfer_kernels.decoder_rows import (
    RotaryPlaces,
    add_rms_norm,
    rms_norm,
    rotate_and_write_kv,
    silu_multiply,
)
from specinfer_kernels.packed_linear import padded_rows
from specinfer_kernels.tree_attention import AttentionLayout, tree_attention

if TYPE_CHECKING:
    from specinfer_kernels.decoder_logits import DecoderLayer, DecoderRows, DecoderStack


def decoder_logits(
    rows: DecoderRows, stack: DecoderStack, caches: Sequence[tuple[Tensor, Tensor]]
) -> Tensor:
    """As the op of this name; see there."""
    places = RotaryPlaces(rows.positions, rows.slot_mapping, stack.cosines, stack.sines)
    hidden = functional.embedding(rows.token_ids, stack.embedding)
    hidden = _through_layers(hidden, stack, places, rows.layout, caches)
    wanted = hidden.index_select(0, rows.wanted)
    normed = rms_norm(wanted, stack.final_norm.weight, stack.final_norm.epsilon)
    logits = stack.head.forward(normed)
    return logits if logits.dtype == torch.float64 else logits.float()


def _through_layers(
    hidden: Tensor,
    stack: DecoderStack,
    places: RotaryPlaces,
    layout: AttentionLayout,
    caches: Sequence[tuple[Tensor, Tensor]],
) -> Tensor:
    count = hidden.shape[0]
    # Where products want more rows, they are added once here; no row looks at the others.
    padding = padded_rows(count) - count if stack.layers[0].down.layout == "onednn" else 0
    if padding:
        hidden = functional.pad(hidden, (0, 0, 0, padding))
    first = stack.layers[0].attention_norm
    normed = rms_norm(hidden, first.weight, first.epsilon)
    following = (*(layer.attention_norm for layer in stack.layers[1:]), None)
    for layer, pair, norm in zip(stack.layers, caches, following, strict=True):
        update = layer.output.forward(_attend(layer, normed, places, layout, pair))
        normed = add_rms_norm(hidden, update, layer.mlp_norm.weight, layer.mlp_norm.epsilon)
        update = layer.down.forward(silu_multiply(layer.gate_up.forward(normed)))
        if norm is None:
            hidden += update
        else:
            normed = add_rms_norm(hidden, update, norm.weight, norm.epsilon)
    return hidden[:count]


def _attend(
    layer: DecoderLayer,
    normed: Tensor,
    places: RotaryPlaces,
    layout: AttentionLayout,
    pair: tuple[Tensor, Tensor],
) -> Tensor:
    """Attention before its output product, [num_rows, num_heads * head_dim]; padding rows are 0."""
    count = places.positions.shape[0]
    mixed = layer.query_key_value.forward(normed)[:count]
    query = rotate_and_write_kv(mixed, places, *pair, layer.head_norms)
    attended = tree_attention(
        query,
        *pair,
        layout,
        scale=layer.scale,
        sliding_window=layer.sliding_window,
        softcap=layer.softcap,
    ).flatten(1)
    padding = normed.shape[0] - count
    return functional.pad(attended, (0, 0, 0, padding)) if padding else attended
