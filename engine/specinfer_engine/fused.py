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

from specinfer_engine.attention import AttentionCall, PagedPass, attend
from specinfer_engine.batch import ForwardBatch
from specinfer_engine.rowwise import RotaryTable, apply_elementwise
from specinfer_kernels import PackedLinear, pack_linear, padded_rows

_FAMILIES = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)


@dataclass(frozen=True)
class Norm:
    """Root mean square normalisation over the last dimension (Zhang and Sennrich, 2019).

    Attributes:
        weight: [width].
        epsilon: added to the mean square.
    """

    weight: Tensor
    epsilon: float

    def __call__(self, values: Tensor) -> Tensor:
        """values [..., width], computed in float32 as the stock modules do."""
        wide = values.to(torch.float32)
        square = wide.pow(2).mean(-1, keepdim=True)
        normed = wide * torch.rsqrt(square.add_(self.epsilon))
        return self.weight * normed.to(values.dtype)


@dataclass(frozen=True)
class Layer:
    """One decoder layer.

    Attributes:
        attention_norm, mlp_norm: before each half.
        query_norm, key_norm: over each head (Qwen 3), or None.
        query_key_value, output, gate_up, down: the four products.
        call: shape and window of its attention.
        scale: factor on the scores.
    """

    attention_norm: Norm
    query_norm: Norm | None
    key_norm: Norm | None
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
        # Padded once here instead of in every product; no row looks at the others.
        padding = (0, padded_rows(batch.num_rows) - batch.num_rows)
        hidden = functional.embedding(functional.pad(batch.input_ids[0], padding), self._embedding)
        cosines, sines = self._rotary(hidden, functional.pad(batch.position_ids, padding))
        # [num_rows, 1, head_dim]; the half that moves up brings its sign with the sine.
        cosines, sines = cosines[0].unsqueeze(1), sines[0].unsqueeze(1)
        half = sines.shape[2] // 2
        signed = torch.cat((-sines[..., :half], sines[..., half:]), 2)
        for layer in self._layers:
            mixed = _attention(layer, layer.attention_norm(hidden), cosines, signed, paged_pass)
            hidden = hidden + layer.output.forward(mixed)
            gate_up = layer.gate_up.forward(layer.mlp_norm(hidden))
            gate, up = gate_up.chunk(2, 1)
            hidden = hidden + layer.down.forward(apply_elementwise(functional.silu, gate) * up)
        wanted = hidden.index_select(0, batch.logit_index)
        return self._head.forward(self._norm(wanted))


def _attention(
    layer: Layer, hidden: Tensor, cosines: Tensor, signed: Tensor, paged_pass: PagedPass
) -> Tensor:
    """Attention before its output product, [num_rows, num_heads * head_dim]; padding rows are 0."""
    call = layer.call
    num_rows, heads, kv_heads = hidden.shape[0], call.num_heads, call.num_kv_heads
    mixed = layer.query_key_value.forward(hidden).view(num_rows, -1, call.head_dim)
    turning, value = mixed[:, : heads + kv_heads], mixed[:, heads + kv_heads :]
    if layer.query_norm is not None and layer.key_norm is not None:
        turning = torch.cat(
            (layer.query_norm(turning[:, :heads]), layer.key_norm(turning[:, heads:])), 1
        )
    # Rotary positions (Su et al., 2021): halves of a head swap places.
    swapped = turning.roll(call.head_dim // 2, 2)
    turned = turning * cosines + swapped * signed
    count = paged_pass.slot_mapping.shape[0]
    query, key = turned[:count, :heads], turned[:count, heads:]
    output = attend(query, key, value[:count], call, layer.scale, paged_pass).view(count, -1)
    return functional.pad(output, (0, 0, 0, num_rows - count))


def fuse(
    model: PreTrainedModel, calls: Sequence[AttentionCall], max_model_len: int
) -> FusedDecoder | None:
    """Take the weights out of a stock model of the family; None, and no change, for any other."""
    source: Any = model
    if type(model) not in _FAMILIES or not _is_plain(source):
        return None
    with torch.no_grad():
        embedding = source.model.embed_tokens.weight.detach()
        head = pack_linear(source.lm_head.weight, source.lm_head.bias)
        source.lm_head = nn.Identity()
        layers = []
        for index, call in enumerate(calls):
            layers.append(_layer(source.model.layers[index], call))
            # Frees what was packed before the next layer is.
            source.model.layers[index] = nn.Identity()
    rotary = RotaryTable(source.model.rotary_emb, max_model_len)
    return FusedDecoder(embedding, layers, _norm(source.model.norm), head, rotary)


def _is_plain(source: Any) -> bool:
    """Whether the parts that configurations can change are as the pass here has them."""
    config = source.config
    full_rotation = (config.rope_parameters or {}).get("partial_rotary_factor", 1.0) == 1.0
    return bool(config.hidden_act == "silu" and full_rotation)


def _layer(source: Any, call: AttentionCall) -> Layer:
    attention, mlp = source.self_attn, source.mlp
    query_norm = getattr(attention, "q_norm", None)
    key_norm = getattr(attention, "k_norm", None)
    return Layer(
        attention_norm=_norm(source.input_layernorm),
        query_norm=None if query_norm is None else _norm(query_norm),
        key_norm=None if key_norm is None else _norm(key_norm),
        query_key_value=_joined(attention.q_proj, attention.k_proj, attention.v_proj),
        output=_joined(attention.o_proj),
        mlp_norm=_norm(source.post_attention_layernorm),
        gate_up=_joined(mlp.gate_proj, mlp.up_proj),
        down=_joined(mlp.down_proj),
        call=call,
        scale=float(attention.scaling),
    )


def _norm(source: Any) -> Norm:
    return Norm(source.weight.detach(), float(source.variance_epsilon))


def _joined(*linears: nn.Linear) -> PackedLinear:
    """One product for linear layers that read the same rows."""
    weight = torch.cat(tuple(linear.weight for linear in linears))
    if all(linear.bias is None for linear in linears):
        return pack_linear(weight)
    biases = tuple(
        linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
        for linear in linears
    )
    return pack_linear(weight, torch.cat(biases))
