"""The Llama family written out: one call for a pass where `transformers` makes fifty a layer.

For Llama, Mistral, Qwen 2 and Qwen 3 a pass of a small model or of a few rows costs more in
bookkeeping than in arithmetic. Here query, key and value are one product, gate and up another, and
nothing runs through modules. The loader holds the result against the stock logits like any other
model's, and every other family runs through `transformers`. Row-invariant as the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from specinfer.errors import InvalidCheckpoint
from specinfer_engine.attention import AttentionCall, PagedPass
from specinfer_engine.batch import ForwardBatch
from specinfer_engine.rowwise import RotaryTable
from specinfer_kernels import (
    DecoderLayer,
    DecoderRows,
    DecoderStack,
    HeadNorms,
    PackedLinear,
    RowNorm,
    decoder_logits,
    pack_linear,
)

_FAMILIES = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)


class FusedDecoder:
    """A model of the family as a function of a batch; made by `fuse`."""

    def __init__(self, stack: DecoderStack) -> None:
        self._stack = stack

    def __call__(self, batch: ForwardBatch, paged_pass: PagedPass) -> Tensor:
        """One pass: logits [num_logits, vocab_size], float32 or float64."""
        rows = DecoderRows(
            batch.token_ids,
            batch.positions,
            paged_pass.slot_mapping,
            batch.logit_index,
            paged_pass.layout,
        )
        return decoder_logits(rows, self._stack, paged_pass.caches)


def fuse(
    model: PreTrainedModel,
    calls: Sequence[AttentionCall],
    max_model_len: int,
    int8: bool = False,
) -> FusedDecoder | None:
    """Take the weights out of a stock model of the family; None, and no change, for any other.

    int8: keep those of the products as int8.
    """
    source: Any = model
    if type(model) not in _FAMILIES or not _is_plain(source):
        return None
    with torch.no_grad():
        embedding = source.model.embed_tokens.weight.detach()
        head = pack_linear(source.lm_head.weight, source.lm_head.bias, int8=int8)
        source.lm_head = nn.Identity()
        layers = []
        for index, call in enumerate(calls):
            layers.append(_layer(source.model.layers[index], call, int8))
            # Frees what was packed before the next layer is.
            source.model.layers[index] = nn.Identity()
        cosines, sines = RotaryTable(source.model.rotary_emb, max_model_len).tables(embedding)
    stack = DecoderStack(
        embedding=embedding,
        cosines=cosines,
        sines=sines,
        layers=tuple(layers),
        final_norm=_norm(source.model.norm),
        head=head,
        num_heads=calls[0].num_heads,
        num_kv_heads=calls[0].num_kv_heads,
        head_dim=calls[0].head_dim,
    )
    return FusedDecoder(stack)


def _is_plain(source: Any) -> bool:
    """Whether the parts that configurations can change are as the pass here has them."""
    config = source.config
    full_rotation = (config.rope_parameters or {}).get("partial_rotary_factor", 1.0) == 1.0
    return bool(config.hidden_act == "silu" and full_rotation)


def _layer(source: Any, call: AttentionCall, int8: bool) -> DecoderLayer:
    attention, mlp = source.self_attn, source.mlp
    return DecoderLayer(
        attention_norm=_norm(source.input_layernorm),
        head_norms=_head_norms(attention),
        query_key_value=_joined(attention.q_proj, attention.k_proj, attention.v_proj, int8=int8),
        output=_joined(attention.o_proj, int8=int8),
        mlp_norm=_norm(source.post_attention_layernorm),
        gate_up=_joined(mlp.gate_proj, mlp.up_proj, int8=int8),
        down=_joined(mlp.down_proj, int8=int8),
        scale=float(attention.scaling),
        sliding_window=call.sliding_window,
        softcap=call.softcap,
    )


def _norm(source: Any) -> RowNorm:
    return RowNorm(source.weight.detach(), float(source.variance_epsilon))


def _head_norms(attention: Any) -> HeadNorms | None:
    if getattr(attention, "q_norm", None) is None or getattr(attention, "k_norm", None) is None:
        return None
    query, key = _norm(attention.q_norm), _norm(attention.k_norm)
    if query.epsilon != key.epsilon:
        raise InvalidCheckpoint("query and key norms differ in their epsilon")
    return HeadNorms(query.weight, key.weight, query.epsilon)


def _joined(*linears: nn.Linear, int8: bool) -> PackedLinear:
    """One product for linear layers that read the same rows."""
    weight = torch.cat(tuple(linear.weight for linear in linears))
    if all(linear.bias is None for linear in linears):
        return pack_linear(weight, int8=int8)
    biases = tuple(
        linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
        for linear in linears
    )
    return pack_linear(weight, torch.cat(biases), int8=int8)
