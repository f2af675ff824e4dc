"""Widens and deepens a Llama checkpoint without changing the function it computes.

Growing makes a small target cost what a real model costs, for benchmarks. It follows the idea of
function-preserving growth (Net2Net, Chen et al., 2016; Gesmundo and Maile, 2023):

* the residual stream is padded with channels that stay zero, and RMSNorm weights are scaled by
  sqrt(d / D) because the mean square is now taken over D channels (eps by d / D for the same
  reason);
* what is added next to old parts (channels of the MLP, heads, whole layers) has ordinary random
  weights on its inputs and zeros on its outputs, so that it costs real work and adds nothing.

Refuses to know about the engine; works on files, one tensor at a time.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

_STD = 0.02
_COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama that growing may change; the head size and the vocabulary stay."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int


# A few layers more than usual at these widths, because the demo vocabulary is so small.
PRESETS = {
    "200m": Shape(hidden=1024, layers=18, intermediate=2816, heads=16, kv_heads=4),
    "1b": Shape(hidden=2048, layers=25, intermediate=5632, heads=32, kv_heads=4),
    "7b": Shape(hidden=4096, layers=32, intermediate=14336, heads=64, kv_heads=16),
}


@dataclass(frozen=True)
class _Plan:
    """Old and new shape, the head size, and where each old query head goes."""

    old: Shape
    new: Shape
    head_dim: int

    @property
    def scale(self) -> float:
        """What norm weights are multiplied by."""
        return math.sqrt(self.old.hidden / self.new.hidden)

    def query_head(self, head: int) -> int:
        """The new place of an old query head: its key/value group keeps its number."""
        old_group = self.old.heads // self.old.kv_heads
        new_group = self.new.heads // self.new.kv_heads
        return head // old_group * new_group + head % old_group


def _read_shape(config: dict[str, Any]) -> Shape:
    heads = config["num_attention_heads"]
    return Shape(
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        intermediate=config["intermediate_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads", heads),
    )


def _make_plan(config: dict[str, Any], new: Shape) -> _Plan:
    old = _read_shape(config)
    head_dim = config.get("head_dim") or old.hidden // old.heads
    for field in ("hidden", "layers", "intermediate", "heads", "kv_heads"):
        if getattr(new, field) < getattr(old, field):
            raise ValueError(f"cannot grow {field} from {getattr(old, field)} to a smaller number")
    if new.heads % new.kv_heads:
        raise ValueError(f"{new.heads} heads cannot share {new.kv_heads} key/value heads")
    if new.heads // new.kv_heads < old.heads // old.kv_heads:
        raise ValueError("the grown model must not have fewer query heads per key/value head")
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise ValueError("growing of models with biases is not supported")
    return _Plan(old, new, head_dim)


class _Source:
    """Tensors of a checkpoint by name, read when asked for, in float64."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        index = folder / "model.safetensors.index.json"
        if index.exists():
            self._files: dict[str, str] = json.loads(index.read_text())["weight_map"]
        else:
            with safe_open(folder / "model.safetensors", framework="pt") as opened:
                self._files = dict.fromkeys(opened.keys(), "model.safetensors")

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def read(self, name: str) -> torch.Tensor:
        with safe_open(self._folder / self._files[name], framework="pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(name)
            return tensor.to(torch.float64)


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator) * _STD


def _pad_columns(old: torch.Tensor, columns: int) -> torch.Tensor:
    """``old`` [rows, old columns] with zero columns appended."""
    return torch.nn.functional.pad(old, (0, columns - old.shape[1]))


def _grow_norm(old: torch.Tensor | None, plan: _Plan) -> torch.Tensor:
    """Norm weights [D]: old ones scaled, ones elsewhere; padded channels are zero anyway."""
    weight = torch.ones(plan.new.hidden, dtype=torch.float64)
    if old is not None:
        weight[: plan.old.hidden] = old * plan.scale
    return weight


def _grow_input(
    old: torch.Tensor | None,
    rows: int,
    places: torch.Tensor,
    plan: _Plan,
    generator: torch.Generator,
) -> torch.Tensor:
    """A projection [rows, D] that reads the residual stream: old rows at ``places`` over random
    ones. Columns of padded channels are random as well: they only ever meet zeros."""
    weight = _random((rows, plan.new.hidden), generator).to(torch.float64)
    if old is not None:
        weight[places, : plan.old.hidden] = old
    return weight


def _grow_output(
    old: torch.Tensor | None, columns: int, places: torch.Tensor, plan: _Plan
) -> torch.Tensor:
    """A projection [D, columns] that writes the residual stream: old block at ``places``, else
    zero."""
    weight = torch.zeros(plan.new.hidden, columns, dtype=torch.float64)
    if old is not None:
        weight[: plan.old.hidden, places] = old
    return weight


def _head_rows(heads: list[int], head_dim: int) -> torch.Tensor:
    """Row numbers of the given heads, in order."""
    return torch.cat([torch.arange(head * head_dim, (head + 1) * head_dim) for head in heads])


def _grow_layer(
    layer: int, source: _Source, plan: _Plan, generator: torch.Generator
) -> Iterator[tuple[str, torch.Tensor]]:
    prefix = f"model.layers.{layer}."

    def old(name: str) -> torch.Tensor | None:
        return source.read(prefix + name) if layer < plan.old.layers else None

    new, size = plan.new, plan.head_dim
    queries = _head_rows([plan.query_head(head) for head in range(plan.old.heads)], size)
    keys = torch.arange(plan.old.kv_heads * size)
    channels = torch.arange(plan.old.intermediate)
    inputs = (
        ("self_attn.q_proj.weight", new.heads * size, queries),
        ("self_attn.k_proj.weight", new.kv_heads * size, keys),
        ("self_attn.v_proj.weight", new.kv_heads * size, keys),
        ("mlp.gate_proj.weight", new.intermediate, channels),
        ("mlp.up_proj.weight", new.intermediate, channels),
    )
    for name, rows, places in inputs:
        yield prefix + name, _grow_input(old(name), rows, places, plan, generator)
    outputs = (
        ("self_attn.o_proj.weight", new.heads * size, queries),
        ("mlp.down_proj.weight", new.intermediate, channels),
    )
    for name, columns, places in outputs:
        yield prefix + name, _grow_output(old(name), columns, places, plan)
    for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
        yield prefix + name, _grow_norm(old(name), plan)


def _grow_tensors(source: _Source, plan: _Plan, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    width = plan.new.hidden
    embedding = source.read("model.embed_tokens.weight")
    yield "model.embed_tokens.weight", _pad_columns(embedding, width)
    for layer in range(plan.new.layers):
        yield from _grow_layer(layer, source, plan, generator)
    yield "model.norm.weight", _grow_norm(source.read("model.norm.weight"), plan)
    if "lm_head.weight" in source:
        yield "lm_head.weight", _pad_columns(source.read("lm_head.weight"), width)


def _grown_config(config: dict[str, Any], plan: _Plan, dtype: torch.dtype) -> dict[str, Any]:
    grown = dict(config)
    ratio = plan.old.hidden / plan.new.hidden
    grown.update(
        hidden_size=plan.new.hidden,
        num_hidden_layers=plan.new.layers,
        intermediate_size=plan.new.intermediate,
        num_attention_heads=plan.new.heads,
        num_key_value_heads=plan.new.kv_heads,
        head_dim=plan.head_dim,
        rms_norm_eps=config["rms_norm_eps"] * ratio,
        dtype=str(dtype).removeprefix("torch."),
    )
    grown.pop("torch_dtype", None)
    return grown


def grow_checkpoint(
    source: Path | str,
    target_dir: Path | str,
    shape: str | Shape,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Path:
    """Write a larger Llama that computes the same logits as the one in ``source``.

    In exact arithmetic the logits are equal. In a floating type they differ by rounding; where
    D / d is a power of four the rescaled norm weights are exact in every type.

    Args:
        source: a Hugging Face folder with a Llama in safetensors.
        target_dir: the folder to write, with the tokenizer files copied.
        shape: "200m", "1b", "7b" or explicit sizes, none smaller than the source's.
        dtype: the type of the written weights.
        seed: of the random weights.

    Returns:
        ``target_dir``.

    Raises:
        ValueError: not a Llama, an unknown preset, or a shape that cannot hold the source.
    """
    source, target_dir = Path(source), Path(target_dir)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != "llama":
        raise ValueError(f"only Llama checkpoints can be grown, not {config.get('model_type')!r}")
    if isinstance(shape, str):
        if shape not in PRESETS:
            raise ValueError(f"unknown preset {shape!r}; choose from {', '.join(PRESETS)}")
        shape = PRESETS[shape]
    plan = _make_plan(config, shape)
    target_dir.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.to(dtype).contiguous()
        for name, tensor in _grow_tensors(_Source(source), plan, seed)
    }
    save_file(tensors, target_dir / "model.safetensors", metadata={"format": "pt"})
    grown = json.dumps(_grown_config(config, plan, dtype), indent=2)
    (target_dir / "config.json").write_text(grown + "\n", encoding="utf-8")
    for name in _COPIED:
        if (source / name).exists():
            shutil.copyfile(source / name, target_dir / name)
    return target_dir
