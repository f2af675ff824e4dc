"""Paged tree attention behind `transformers`' attention interface.

Every model loaded by `loader` runs with the implementation registered here under IMPLEMENTATION.
A pass brings its batch as the keyword argument PASS_ARGUMENT of the model's forward, which
`transformers` hands down to every layer: nothing is parked in globals. The function writes keys
and values by slot and calls the kernel. It refuses what it does not know, so a model that changes
its attention in another way fails at load and never answers wrongly. It knows no block manager.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from specinfer.errors import InvalidCheckpoint
from specinfer_kernels import AttentionLayout, LayerCaches, tree_attention, write_kv

IMPLEMENTATION = "specinfer"
PASS_ARGUMENT = "paged_pass"

# Arguments that say something about the call and nothing about the arithmetic of one row.
_HARMLESS_ARGUMENTS = frozenset(
    {
        "cache_position",
        "is_causal",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)


@dataclass(frozen=True)
class AttentionCall:
    """What one layer's attention was called with, for the checks at load.

    Attributes:
        layer_index: the layer as the model counts it.
        num_heads, num_kv_heads, head_dim: of its query and key.
        sliding_window: keys a row sees, or None for all.
        softcap: cap on the scores, or None.
    """

    layer_index: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    sliding_window: int | None
    softcap: float | None


@dataclass(frozen=True)
class DryPass:
    """A pass that computes no attention: it checks what each layer asks for and notes it.

    Attributes:
        calls: one entry a layer, in the order in which the layers run.
    """

    calls: list[AttentionCall] = field(default_factory=list)


@dataclass(frozen=True)
class PagedPass:
    """What the attention of every layer needs in one pass.

    Attributes:
        layout: rows, contexts, block tables and ancestor sets.
        slot_mapping: int64 [num_rows], place in the pool of each row's key and value.
        caches: key and value cache of each layer, views of the pool.
    """

    layout: AttentionLayout
    slot_mapping: Tensor
    caches: LayerCaches


def paged_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    paged_pass: PagedPass | DryPass | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer over the pages of the pass, SpecInfer's tree attention (section 4.2).

    query: [1, num_heads, num_rows, head_dim]; key, value: [1, num_kv_heads, num_rows, head_dim],
    positions already applied. Returns [1, num_rows, num_heads, head_dim] and no weights.

    Raises:
        InvalidCheckpoint: when the model asks for attention that this engine does not do.
    """
    if paged_pass is None:
        raise InvalidCheckpoint(
            f"{type(module).__name__} does not hand the arguments of forward down to its attention"
        )
    if isinstance(paged_pass, DryPass):
        _refuse_unknown(module, query, key, value, attention_mask, dropout, others)
        paged_pass.calls.append(_describe(module, query, key, sliding_window, softcap))
        return torch.zeros_like(query).transpose(1, 2), None
    call = _describe(module, query, key, sliding_window, softcap)
    output = attend(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        call,
        query.shape[3] ** -0.5 if scaling is None else scaling,
        paged_pass,
    )
    return output.unsqueeze(0), None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: AttentionCall,
    scale: float,
    paged_pass: PagedPass,
) -> Tensor:
    """Write keys and values of one layer into the pool, then attend from every row.

    query: [num_rows, num_heads, head_dim]; key, value: [num_rows, num_kv_heads, head_dim], last
    dimension contiguous. Returns [num_rows, num_heads, head_dim].
    """
    key_cache, value_cache = paged_pass.caches.pairs[call.layer_index]
    write_kv(key, value, key_cache, value_cache, paged_pass.slot_mapping)
    return tree_attention(
        query,
        key_cache,
        value_cache,
        paged_pass.layout,
        scale=scale,
        sliding_window=call.sliding_window,
        softcap=call.softcap,
    )


def _describe(
    module: Any, query: Tensor, key: Tensor, sliding_window: int | None, softcap: float | None
) -> AttentionCall:
    return AttentionCall(
        layer_index=module.layer_idx,
        num_heads=query.shape[1],
        num_kv_heads=key.shape[1],
        head_dim=query.shape[3],
        sliding_window=sliding_window,
        softcap=softcap,
    )


def _refuse_unknown(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    others: dict[str, Any],
) -> None:
    """Raise InvalidCheckpoint unless the call is causal attention as the kernel does it."""
    name = type(module).__name__
    if not isinstance(getattr(module, "layer_idx", None), int):
        raise InvalidCheckpoint(f"{name} does not say which layer it is")
    if attention_mask is not None:
        raise InvalidCheckpoint(f"{name} brings an attention mask of its own")
    if dropout:
        raise InvalidCheckpoint(f"{name} drops attention weights at random")
    causal = (getattr(module, "is_causal", True), others.get("is_causal", True))
    if not all(flag is None or flag for flag in causal):
        raise InvalidCheckpoint(f"{name} is not causal")
    shapes = (key.shape[0], key.shape[2:], value.shape)
    if shapes != (1, query.shape[2:], key.shape) or query.shape[0] != 1:
        raise InvalidCheckpoint(
            f"{name} has keys {list(key.shape)} and values {list(value.shape)} for queries "
            f"{list(query.shape)}; only one head size and self-attention are served"
        )
    for argument, given in others.items():
        if given is not None and given is not False and argument not in _HARMLESS_ARGUMENTS:
            raise InvalidCheckpoint(f"{name} asks for {argument}, which is not served")


AttentionInterface.register(IMPLEMENTATION, paged_attention)


def layer_caches(pool: Tensor) -> LayerCaches:
    """Key and value views of each layer of a pool [num_layers, 2, num_blocks, ...]."""
    return LayerCaches(tuple((layer[0], layer[1]) for layer in torch.unbind(pool)))
