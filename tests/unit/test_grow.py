"""Growing a checkpoint keeps its function and gives it the wanted size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from specinfer_training.grow import PRESETS, Shape, grow_checkpoint

VOCAB = 37


@pytest.fixture
def exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets RMSNorm compute in the input's type; transformers drops to float32 inside it."""

    def forward(self: LlamaRMSNorm, hidden_states: torch.Tensor) -> torch.Tensor:
        mean_square = hidden_states.square().mean(-1, keepdim=True)
        return self.weight * hidden_states * torch.rsqrt(mean_square + self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


def write_llama(folder: Path, *, kv_heads: int = 2, tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=kv_heads,
        head_dim=6,
        rms_norm_eps=1e-3,
        initializer_range=0.5,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    torch.nn.Module.to(model, torch.float64)
    model.eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)
    return model


def logits_of(model: LlamaForCausalLM) -> torch.Tensor:
    tokens = torch.arange(15).reshape(1, 15) * 7 % VOCAB
    with torch.inference_mode():
        logits: torch.Tensor = model(tokens).logits
    return logits


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("kv_heads", "shape"),
    [
        (2, Shape(hidden=60, layers=3, intermediate=33, heads=12, kv_heads=3)),
        (2, Shape(hidden=24, layers=2, intermediate=20, heads=6, kv_heads=2)),
        (2, Shape(hidden=100, layers=5, intermediate=21, heads=10, kv_heads=2)),
        (6, Shape(hidden=32, layers=4, intermediate=40, heads=16, kv_heads=8)),
        (1, Shape(hidden=42, layers=2, intermediate=20, heads=14, kv_heads=2)),
    ],
)
def test_logits_agree_in_float64(tmp_path: Path, kv_heads: int, shape: Shape, tied: bool) -> None:
    model = write_llama(tmp_path / "small", kv_heads=kv_heads, tied=tied)
    grow_checkpoint(tmp_path / "small", tmp_path / "large", shape, torch.float64)
    grown = LlamaForCausalLM.from_pretrained(tmp_path / "large", dtype=torch.float64)
    assert grown.config.num_hidden_layers == shape.layers
    last_keys = grown.state_dict()[f"model.layers.{shape.layers - 1}.self_attn.k_proj.weight"]
    assert last_keys.shape == (shape.kv_heads * 6, shape.hidden)
    torch.testing.assert_close(logits_of(grown), logits_of(model), atol=1e-9, rtol=1e-9)


def test_added_parts_cost_real_work(tmp_path: Path) -> None:
    write_llama(tmp_path / "small")
    shape = Shape(hidden=48, layers=3, intermediate=40, heads=12, kv_heads=4)
    grow_checkpoint(tmp_path / "small", tmp_path / "large", shape, torch.float32)
    grown = LlamaForCausalLM.from_pretrained(tmp_path / "large", dtype=torch.float32)
    weights = grown.state_dict()
    for name in ("self_attn.q_proj", "mlp.up_proj"):
        assert 0.015 < float(weights[f"model.layers.2.{name}.weight"].std()) < 0.025
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        assert not weights[f"model.layers.2.{name}.weight"].any()


def test_bfloat16_checkpoint_loads_and_copies_the_tokenizer(tmp_path: Path) -> None:
    write_llama(tmp_path / "small")
    (tmp_path / "small" / "tokenizer.json").write_text("{}")
    shape = Shape(hidden=96, layers=2, intermediate=64, heads=6, kv_heads=2)
    folder = grow_checkpoint(tmp_path / "small", tmp_path / "large", shape)
    grown = LlamaForCausalLM.from_pretrained(folder, dtype="auto")
    assert grown.dtype is torch.bfloat16
    assert torch.isfinite(logits_of(grown)).all()
    assert (folder / "tokenizer.json").read_text() == "{}"


def test_presets_have_the_stated_sizes() -> None:
    for name, expected in (("200m", 200e6), ("1b", 1.1e9), ("7b", 7e9)):
        shape = PRESETS[name]
        attention = 2 * shape.hidden * 64 * (shape.heads + shape.kv_heads)
        per_layer = attention + 3 * shape.hidden * shape.intermediate
        total = shape.layers * per_layer + 3072 * shape.hidden
        assert abs(total / expected - 1) < 0.15, name


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (Shape(12, 2, 20, 6, 2), "hidden"),
        (Shape(24, 2, 20, 7, 2), "cannot share"),
        (Shape(24, 2, 20, 6, 6), "fewer query heads"),
        ("70b", "unknown preset"),
    ],
)
def test_impossible_shapes_are_refused(tmp_path: Path, shape: str | Shape, message: str) -> None:
    write_llama(tmp_path / "small")
    with pytest.raises(ValueError, match=message):
        grow_checkpoint(tmp_path / "small", tmp_path / "large", shape)
