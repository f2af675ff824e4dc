"""The lean pass against the generic one: same logits, and no lean pass where it does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, Qwen2Config

from specinfer.tree import TokenTree
from specinfer_draft.drafters import lean
from specinfer_draft.drafters.lean import LeanRunner, difference, lean_weights
from specinfer_engine.batch import SequenceRows
from specinfer_engine.loader import load_model
from specinfer_engine.model import LoadedModel
from specinfer_engine.runner import Runner
from tests.kit.tiny_models import write_tiny, write_tiny_llama

CONFIG: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def load(folder: Path, dtype: str = "float32") -> LoadedModel:
    return load_model(folder, dtype=dtype)


@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-6), ("float32", 1e-4)])
@pytest.mark.parametrize("tied", [False, True])
def test_its_logits_are_the_generic_passes(
    tmp_path: Path, dtype: str, bound: float, tied: bool
) -> None:
    folder = write_tiny_llama(tmp_path, vocab_size=300, tied=tied)
    loaded = load(folder, dtype)
    weights = lean_weights(folder, loaded)
    assert weights is not None
    runner = LeanRunner(loaded, weights, num_blocks=2, block_size=8)
    assert difference(runner, Runner(loaded, num_blocks=2, block_size=8)) < bound


def test_in_bfloat16_it_guesses_the_same_tokens(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path, vocab_size=300, dtype=torch.bfloat16)
    loaded = load(folder, "bfloat16")
    weights = lean_weights(folder, loaded)
    assert weights is not None
    tokens = list(range(5, 45))
    rows = [SequenceRows.chain(tokens, 0, range(5), range(40))]
    guesses = [
        runner.forward(rows)[0].argmax(1)
        for runner in (
            LeanRunner(loaded, weights, num_blocks=5, block_size=8),
            Runner(loaded, num_blocks=5, block_size=8),
        )
    ]
    assert int((guesses[0] == guesses[1]).sum()) >= 38


def test_several_sequences_and_a_tree_in_pieces_share_a_pass(tmp_path: Path) -> None:
    """Rows of a tree that come level by level see what they see in one piece."""
    folder = write_tiny_llama(tmp_path, vocab_size=300)
    loaded = load(folder)
    weights = lean_weights(folder, loaded)
    assert weights is not None
    runner = LeanRunner(loaded, weights, num_blocks=4, block_size=8)
    tree = TokenTree((7, 8, 9, 10), (-1, 0, 0, 2))
    whole = runner.forward([SequenceRows.tree(tree, 0, (0, 1))])[0]
    first = SequenceRows((7, 8, 9), 0, 0, (0, 1, 1), tree.ancestors[:3], (2, 3), (0, 1, 2))
    other = SequenceRows.chain((5, 6), 0, (1,), (1,))
    parts = runner.forward([first, other])
    second = SequenceRows((10,), 0, 3, (2,), tree.ancestors[3:], (2, 3), (0,))
    parts += runner.forward([second])
    torch.testing.assert_close(torch.cat([parts[0], parts[2]]), whole, rtol=1e-5, atol=1e-5)
    assert parts[1].shape == (1, 300)


def test_a_pass_of_a_prompt_alone_has_no_logits(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path, vocab_size=300)
    loaded = load(folder)
    weights = lean_weights(folder, loaded)
    assert weights is not None
    runner = LeanRunner(loaded, weights, num_blocks=2, block_size=8)
    assert runner.forward([SequenceRows.chain((1, 2, 3), 0, (1,))])[0].shape == (0, 300)


@pytest.mark.parametrize(
    "config",
    [
        Qwen2Config(**CONFIG),
        LlamaConfig(**CONFIG, attention_bias=True),
        LlamaConfig(**CONFIG, mlp_bias=True),
        LlamaConfig(**CONFIG, hidden_act="gelu"),
        LlamaConfig(**CONFIG, rope_parameters={"rope_type": "dynamic", "factor": 2.0}),
    ],
    ids=["qwen2", "attention bias", "mlp bias", "gelu", "dynamic rope"],
)
def test_other_models_run_in_the_generic_pass(
    tmp_path: Path, config: LlamaConfig | Qwen2Config
) -> None:
    folder = write_tiny(tmp_path, config)
    assert lean_weights(folder, load(folder)) is None


def test_linear_rope_is_served(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
    folder = write_tiny(tmp_path, LlamaConfig(**CONFIG, rope_parameters=rope))
    assert lean_weights(folder, load(folder)) is not None


def test_weights_that_give_other_logits_are_noticed(tmp_path: Path) -> None:
    """The folder changes between the two readings: the check sees that the passes differ."""
    folder = write_tiny_llama(tmp_path, vocab_size=300)
    loaded = load(folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= 1.1
    save_file(weights, folder / "model.safetensors")
    assert lean_weights(folder, loaded) is None
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors")
    assert lean_weights(folder, loaded) is None


def test_a_large_model_is_not_held_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tiny_llama(tmp_path, vocab_size=300)
    monkeypatch.setattr(lean, "MAX_WEIGHT_BYTES", 1000)
    assert lean_weights(folder, load(folder)) is None
