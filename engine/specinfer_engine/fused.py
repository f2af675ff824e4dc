"""The Llama family written out: a dozen calls a layer where `transformers`' modules make fifty.

For Llama, Mistral, Qwen 2 and Qwen 3 a pass of a small model or of a few rows costs more in
bookkeeping than in arithmetic. Here query, key and value are one product, gate and up another, and
nothing runs through modules. The loader holds the result against the stock logits like any other
model's, and every other family runs through `transformers`. Row-invariant as the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from specinfer.errors import InvalidCheckpoint
from specinfer_engine.attention import AttentionCall, PagedPass, attend_written
from specinfer_engine.batch import ForwardBatch
from specinfer_engine.rowwise import RotaryTable
from specinfer_kernels import (
    HeadNorms,
    PackedLinear,
    RotaryPlaces,
    add_rms_norm,
    pack_linear,
    padded_rows,
    rms_norm,
    rotate_and_write_kv,
    silu_multiply,
)

_FAMILIES = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)


@dataclass(frozen=True)
class Norm:
    """Root mean square normalisation of rows: weight [width], epsilon added to the mean square."""

    weight: Tensor
    epsilon: float


@dataclass(frozen=True)
class Layer:
    """One decoder layer.

    Attributes:
        attention_norm, mlp_norm: before each half.
        head_norms: over each query and key (Qwen 3), or None.
        query_key_value, output, gate_up, down: the four products.
        call: shape and window of its attention.
        scale: factor on the scores.
    """

    attention_norm: Norm
    head_norms: HeadNorms | None
    query_key_value: PackedLinear
    output: PackedLinear
    mlp_norm: Norm
    gate_up: PackedLinear
    down: PackedLinear
    call: AttentionCall
    scale: float


class FusedDecoder:
    """A model of the family as a function of a batch; made by `fuse`."""

    def __init__(
        self,
        embedding: Tensor,
        layers: Sequence[Layer],
        norm: Norm,
        head: PackedLinear,
        rotary: RotaryTable,
    ) -> None:
        self._embedding = embedding
        self._layers = tuple(layers)
        self._norm = norm
        self._head = head
        self._rotary = rotary

    def __call__(self, batch: ForwardBatch, paged_pass: PagedPass) -> Tensor:
        """One pass: logits [num_logits, vocab_size] in the model's format."""
        places = RotaryPlaces(
            batch.position_ids[0], paged_pass.slot_mapping, *self._rotary.tables(self._embedding)
        )
        # Where products want more rows, they are added once here; no row looks at the others.
        padding = padded_rows(batch.num_rows) - batch.num_rows
        token_ids = functional.pad(batch.input_ids[0], (0, padding))
        hidden = functional.embedding(token_ids, self._embedding)
        first = self._layers[0].attention_norm
        normed = rms_norm(hidden, first.weight, first.epsilon)
        following = (*(layer.attention_norm for layer in self._layers[1:]), None)
        for layer, norm in zip(self._layers, following, strict=True):
            mixed = _attention(layer, normed, places, paged_pass)
            update = layer.output.forward(mixed)
            normed = add_rms_norm(hidden, update, layer.mlp_norm.weight, layer.mlp_norm.epsilon)
            update = layer.down.forward(silu_multiply(layer.gate_up.forward(normed)))
            if norm is not None:
                normed = add_rms_norm(hidden, update, norm.weight, norm.epsilon)
        wanted, update = (rows.index_select(0, batch.logit_index) for rows in (hidden, update))
        return self._head.forward(
            add_rms_norm(wanted, update, self._norm.weight, self._norm.epsilon)
        )


def _attention(layer: Layer, normed: Tensor, places: RotaryPlaces, paged_pass: PagedPass) -> Tensor:
    """Attention before its output product, [num_rows, num_heads * head_dim]; padding rows are 0."""
    call = layer.call
    count = places.positions.shape[0]
    key_cache, value_cache = paged_pass.caches[call.layer_index]
    mixed = layer.query_key_value.forward(normed)[:count]
    query = rotate_and_write_kv(mixed, places, key_cache, value_cache, layer.head_norms)
    output = attend_written(query, call, layer.scale, paged_pass).view(count, -1)
    padding = normed.shape[0] - count
    return functional.pad(output, (0, 0, 0, padding)) if padding else output


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
    rotary = RotaryTable(source.model.rotary_emb, max_model_len)
    return FusedDecoder(embedding, layers, _norm(source.model.norm), head, rotary)


def _is_plain(source: Any) -> bool:
    """Whether the parts that configurations can change are as the pass here has them."""
    config = source.config
    full_rotation = (config.rope_parameters or {}).get("partial_rotary_factor", 1.0) == 1.0
    return bool(config.hidden_act == "silu" and full_rotation)


def _layer(source: Any, call: AttentionCall, int8: bool) -> Layer:
    attention, mlp = source.self_attn, source.mlp
    return Layer(
        attention_norm=_norm(source.input_layernorm),
        head_norms=_head_norms(attention),
        query_key_value=_joined(attention.q_proj, attention.k_proj, attention.v_proj, int8=int8),
        output=_joined(attention.o_proj, int8=int8),
        mlp_norm=_norm(source.post_attention_layernorm),
        gate_up=_joined(mlp.gate_proj, mlp.up_proj, int8=int8),
        down=_joined(mlp.down_proj, int8=int8),
        call=call,
        scale=float(attention.scaling),
    )


def _norm(source: Any) -> Norm:
    return Norm(source.weight.detach(), float(source.variance_epsilon))


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
