"""A pass written out by hand for small Llama drafters, where Python costs more than arithmetic.

`transformers`' modules spend about two thirds of a one-million-parameter model's pass on
bookkeeping. The same layers here are a dozen calls each, with one product for query, key and value
and one for gate and up. Its logits are held against the generic pass when it is built, and the
generic pass stays wherever they differ or the model is of another kind. Knows no session or tree.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from specinfer.tree import TokenTree
from specinfer_engine.attention import layer_caches
from specinfer_engine.batch import ForwardBatch, SequenceRows
from specinfer_engine.model import LoadedModel
from specinfer_engine.runner import Runner
from specinfer_kernels import PackedLinear, pack_linear, tree_attention, write_kv

MAX_WEIGHT_BYTES = 512 << 20
MAX_POSITIONS = 32_768
_PROBE_BLOCK_SIZE = 8
_ROTARY_KINDS = ("default", "linear", "llama3")
# Root mean square of the difference, in units of the logits' own spread: rounding, no more.
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layer:
    """Weights of one decoder layer; linear layers hold [out_features, in_features]."""

    attention_norm: Tensor  # [hidden]
    query_key_value: PackedLinear
    output: PackedLinear
    mlp_norm: Tensor  # [hidden]
    gate_up: PackedLinear
    down: PackedLinear


class LeanRunner(Runner):
    """Runs a Llama as `Runner` does, with the same pool and the same kernels.

    Args:
        loaded: the model that `transformers` would run; its shape facts and rotary table are used.
        weights: tensors of the checkpoint by name.
        num_blocks, block_size: shape of the pool.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        weights: Mapping[str, Tensor],
        *,
        num_blocks: int,
        block_size: int,
    ) -> None:
        super().__init__(loaded, num_blocks=num_blocks, block_size=block_size)
        config = loaded.model.config
        assert isinstance(config, LlamaConfig)
        self._eps = float(config.rms_norm_eps)
        self._layer_caches = layer_caches(self.pool)
        self._embedding = weights["model.embed_tokens.weight"]
        self._norm = weights["model.norm.weight"]
        self._head = pack_linear(weights.get("lm_head.weight", self._embedding))
        self._layers = [_layer(weights, index) for index in range(loaded.num_layers)]
        self._cos, self._sin = _rotary_tables(loaded)

    @torch.inference_mode()
    def forward_batch(self, batch: ForwardBatch) -> Tensor:
        """One pass over a batch that is laid out already: logits [num_logits, vocab_size]."""
        positions = batch.position_ids[0]
        cos, sin = self._cos[positions], self._sin[positions]  # [num_rows, 1, head_dim]
        hidden = functional.embedding(batch.input_ids[0], self._embedding)
        for layer, caches in zip(self._layers, self._layer_caches, strict=True):
            mixed = self._attend(
                layer, caches, self._normed(hidden, layer.attention_norm), cos, sin, batch
            )
            hidden = hidden + layer.output.forward(mixed)
            gate, up = layer.gate_up.forward(self._normed(hidden, layer.mlp_norm)).chunk(2, 1)
            hidden = hidden + layer.down.forward(functional.silu(gate) * up)
        wanted = self._normed(hidden[batch.logit_index], self._norm)
        logits = self._head.forward(wanted)
        return logits if logits.dtype == torch.float64 else logits.float()

    def _attend(
        self,
        layer: Layer,
        caches: tuple[Tensor, Tensor],
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        batch: ForwardBatch,
    ) -> Tensor:
        """Attention before its output product, [num_rows, num_heads * head_dim]."""
        heads, kv_heads, size = (
            self.loaded.num_heads,
            self.loaded.num_kv_heads,
            self.loaded.head_dim,
        )
        rows = hidden.shape[0]
        mixed = layer.query_key_value.forward(hidden).view(rows, heads + 2 * kv_heads, size)
        turning = mixed[:, : heads + kv_heads]
        halves = turning.reshape(rows, heads + kv_heads, 2, size // 2)
        # `sin` carries the sign of the half that moves up.
        turned = turning * cos + halves.flip(2).view(turning.shape) * sin
        write_kv(turned[:, heads:], mixed[:, heads + kv_heads :], *caches, batch.slot_mapping)
        return tree_attention(turned[:, :heads], *caches, batch.layout, scale=size**-0.5).view(
            rows, heads * size
        )

    def _normed(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(hidden, weight.shape, weight, self._eps)


def lean_weights(folder: Path, loaded: LoadedModel) -> dict[str, Tensor] | None:
    """Weights for a LeanRunner of the model in `folder`; None where it has to run in `Runner`.

    None for other kinds of model, for large ones, where Python no longer counts, and wherever the
    two passes differ by more than rounding.
    """
    if not _is_plain_llama(loaded):
        return None
    try:
        weights = _read_weights(folder, loaded)
        if weights is None:
            return None
        lean = LeanRunner(loaded, weights, num_blocks=2, block_size=_PROBE_BLOCK_SIZE)
        plain = Runner(loaded, num_blocks=2, block_size=_PROBE_BLOCK_SIZE)
        error = difference(lean, plain)
    except (KeyError, OSError, RuntimeError, SafetensorError) as failure:
        log.info("the generic pass is used, as the lean one failed: %s", failure)
        return None
    if not error <= _TOLERANCES[loaded.dtype]:
        log.info("the generic pass is used, as the lean one differs by %.2g", error)
        return None
    return weights


def _is_plain_llama(loaded: LoadedModel) -> bool:
    config = loaded.model.config
    if type(loaded.model) is not LlamaForCausalLM or not isinstance(config, LlamaConfig):
        return False
    rotary = config.rope_parameters
    return (
        config.hidden_act == "silu"
        and not config.attention_bias
        and not config.mlp_bias
        and isinstance(rotary, dict)
        and rotary.get("rope_type", "default") in _ROTARY_KINDS
        and loaded.max_model_len <= MAX_POSITIONS
        and loaded.final_softcap is None
        and not any(loaded.sliding_windows)
    )


def _read_weights(folder: Path, loaded: LoadedModel) -> dict[str, Tensor] | None:
    """All tensors of the checkpoint in the model's format, or None when they are many."""
    files = sorted(folder.glob("*.safetensors"))
    if sum(file.stat().st_size for file in files) > MAX_WEIGHT_BYTES:
        return None
    weights: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in load_file(file).items():
            weights[name] = tensor.to(device=loaded.device, dtype=loaded.dtype)
    return weights


def _layer(weights: Mapping[str, Tensor], index: int) -> Layer:
    def weight(name: str) -> Tensor:
        return weights[f"model.layers.{index}.{name}.weight"]

    attention, mlp = "self_attn", "mlp"
    joined = torch.cat([weight(f"{attention}.{name}_proj") for name in ("q", "k", "v")])
    return Layer(
        attention_norm=weight("input_layernorm"),
        query_key_value=pack_linear(joined),
        output=pack_linear(weight(f"{attention}.o_proj")),
        mlp_norm=weight("post_attention_layernorm"),
        gate_up=pack_linear(torch.cat([weight(f"{mlp}.gate_proj"), weight(f"{mlp}.up_proj")])),
        down=pack_linear(weight(f"{mlp}.down_proj")),
    )


@torch.inference_mode()
def _rotary_tables(loaded: LoadedModel) -> tuple[Tensor, Tensor]:
    """Cosines, and sines with the first half negated: both [max_model_len, 1, head_dim]."""
    positions = torch.arange(loaded.max_model_len, device=loaded.device)[None]
    example = torch.zeros(1, 1, 1, dtype=loaded.dtype, device=loaded.device)
    cos, sin = loaded.model.model.rotary_emb(example, positions)
    signed = sin[0].clone()
    signed[:, : loaded.head_dim // 2].neg_()
    return cos[0][:, None].contiguous(), signed[:, None].contiguous()


def difference(lean: Runner, plain: Runner) -> float:
    """How far the logits of a chunk and a tree below it lie apart, in units of their spread.

    Both runners have two blocks of eight tokens, in which nothing else lies.
    """
    results = [torch.cat(_probe(runner)).double() for runner in (lean, plain)]
    apart = (results[0] - results[1]).square().mean().sqrt()
    return float(apart / results[1].std().clamp_min(1e-12))


def _probe(runner: Runner) -> list[Tensor]:
    vocab_size = runner.loaded.vocab_size
    tokens = [(7919 * index + 31) % vocab_size for index in range(12)]
    chunk = SequenceRows.chain(tokens[:6], 0, (1, 0), range(6))
    tree = TokenTree((*tokens[6:11], (tokens[10] + 1) % vocab_size), (-1, 0, 0, 2, 1, 1))
    below = SequenceRows.tree(tree, len(tokens) // 2, (1, 0))
    return runner.forward([chunk]) + runner.forward([below])
