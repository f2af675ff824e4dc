"""A model of int8 weights: another model than the stored one, and as lossless as any."""

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from specinfer.errors import InvalidCheckpoint
from specinfer_engine.batch import SequenceRows
from specinfer_engine.linear import round_weights
from specinfer_engine.loader import load_model
from specinfer_engine.runner import Runner
from specinfer_kernels import quantize_rows
from tests.kit.architectures import VOCAB_SIZE, architectures
from tests.kit.passes import Pages, prefill, random_tree
from tests.kit.tiny_models import write_tiny

NUM_BLOCKS, BLOCK_SIZE, LENGTH = 160, 4, 24
FAMILIES = [("llama", True), ("llama", False), ("qwen3", True), ("gpt2", False), ("mixtral", False)]


def tokens_of(seed: int, count: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(VOCAB_SIZE) for _ in range(count)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "fused"), FAMILIES)
def test_served_losslessly_and_as_another_model(
    family: str, fused: bool, dtype: str, tmp_path: Path
) -> None:
    """Chunks and trees equal rows alone; the loader has compared it with the rounded model."""
    folder = write_tiny(tmp_path, architectures()[family])
    loaded = load_model(folder, dtype=dtype, fused=fused, weights="int8")
    stored = load_model(folder, dtype=dtype, fused=fused)
    assert loaded.row_invariant
    assert loaded.model_hash != stored.model_hash
    assert loaded.tokenizer_hash == stored.tokenizer_hash
    runner = Runner(loaded, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    pages = Pages(NUM_BLOCKS, BLOCK_SIZE)
    context = tokens_of(1, LENGTH)
    alone = prefill(runner, context, pages.table(LENGTH), *range(1, LENGTH))
    table = pages.table(2 * LENGTH)
    assert torch.equal(prefill(runner, context, table), alone)
    tree = random_tree(random.Random(6), 9, VOCAB_SIZE)
    logits = runner.forward([SequenceRows.tree(tree, LENGTH, table)])[0]
    for node in (1, 4, 8):
        path = [*context, *tree.path_token_ids(node)]
        plain = prefill(runner, path, pages.table(LENGTH + 9), *range(1, len(path)))
        assert torch.equal(logits[node], plain[-1])
    other = Runner(stored, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    assert not torch.equal(prefill(other, context, Pages(NUM_BLOCKS, BLOCK_SIZE).table(24)), alone)


def test_what_is_rounded_and_what_stays(tmp_path: Path) -> None:
    """Products are on the grid of their rows; a shared embedding keeps its own matrix."""
    config = architectures()["llama"]
    assert isinstance(config, LlamaConfig)
    config.tie_word_embeddings = True
    folder = write_tiny(tmp_path, config)
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    round_weights(model)
    assert torch.equal(model.model.embed_tokens.weight, before["model.embed_tokens.weight"])
    assert torch.equal(model.model.norm.weight, before["model.norm.weight"])
    for module in (model.lm_head, model.model.layers[0].mlp.down_proj):
        whole, scale = quantize_rows(module.weight)
        assert torch.equal(whole * scale.unsqueeze(1), module.weight)
    assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])


def test_negative_control_a_model_that_was_not_rounded_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the stock model compared before its rounding, int8 logits would not be what it says."""
    folder = write_tiny(tmp_path, architectures()["llama"])
    monkeypatch.setattr("specinfer_engine.loader.round_weights", lambda model: None)
    with pytest.raises(InvalidCheckpoint):
        load_model(folder, dtype="float32", weights="int8")


def test_refuses_other_names(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, architectures()["llama"])
    with pytest.raises(InvalidCheckpoint, match="int4"):
        load_model(folder, dtype="float32", weights="int4")
