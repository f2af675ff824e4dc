"""Every promised decoder family says on pages, in trees, what stock `transformers` says."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedConfig

from specinfer_engine.batch import SequenceRows
from specinfer_engine.fused import FusedDecoder
from specinfer_engine.loader import load_model
from specinfer_engine.runner import Runner
from tests.kit.architectures import VOCAB_SIZE, WINDOW, architectures
from tests.kit.passes import (
    Pages,
    prefill,
    random_tree,
    stock_logits,
    stock_model,
    stock_tree_logits,
)
from tests.kit.tiny_models import write_tiny

CONFIGS = architectures()
# These run written out unless told otherwise.
FUSED = {"llama", "mistral", "qwen2", "qwen3"}
CASES = [(name, True) for name in sorted(CONFIGS)] + [(name, False) for name in sorted(FUSED)]
# Activations long enough for several threads, and in most families no multiple of a vector.
NUM_ROWS = 200
WIDE_HIDDEN = 128
WIDE_INNER = 388
# Layers of these see WINDOW keys, one layer or all.
WINDOWED = {"mistral", "qwen2", "gemma2", "gemma3", "phi3", "mixtral"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this module writes its checkpoints."""
    return tmp_path_factory.mktemp("architectures")


@pytest.mark.parametrize(("name", "fused"), CASES)
def test_paged_tree_gives_the_stock_logits_on_every_path(
    name: str, fused: bool, folders: Path
) -> None:
    folder = write_tiny(folders / name, CONFIGS[name])
    # Stock attention that caps scores exists only in eager form, with softmax in float32.
    capped = name == "gemma2"
    stock = stock_model(folder, torch.float64, "eager" if capped else "sdpa")
    tolerance = 1e-5 if capped else 1e-8
    loaded = load_model(folder, dtype="float64", fused=fused)
    assert isinstance(loaded.decoder, FusedDecoder) == (fused and name in FUSED)
    runner = Runner(loaded, num_blocks=12, block_size=4)
    generator = random.Random(name)
    context = [generator.randrange(VOCAB_SIZE) for _ in range(3 * WINDOW)]
    tree = random_tree(generator, 10, VOCAB_SIZE)
    table = Pages(12, 4).table(len(context) + len(tree))

    prefilled = prefill(runner, context, table, 1, 7)
    torch.testing.assert_close(
        prefilled, stock_logits(stock, context), rtol=tolerance, atol=tolerance
    )
    (logits,) = runner.forward([SequenceRows.tree(tree, len(context), table)])
    assert logits.dtype == torch.float64
    expected = stock_tree_logits(stock, context, tree)
    torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_windows_are_seen_and_rows_are_invariant(name: str, folders: Path) -> None:
    folder = write_tiny(folders / name, CONFIGS[name])
    for dtype in ("float32", "bfloat16"):
        loaded = load_model(folder, dtype=dtype)
        assert loaded.row_invariant
        assert loaded.dtype_name == dtype
        assert (WINDOW in loaded.sliding_windows) == (name in WINDOWED)


@pytest.fixture
def three_threads() -> Iterator[None]:
    """More threads than one, in a number that no width divides by."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_rows_of_long_passes_are_invariant(name: str, dtype: str, tmp_path: Path) -> None:
    """A pass of many rows over wide layers equals the same tokens in pieces, some of one row."""
    loaded = load_model(write_tiny(tmp_path, widened(name)), dtype=dtype)
    runner = Runner(loaded, num_blocks=128, block_size=16)
    pages = Pages(128, 16)
    generator = random.Random(name)
    tokens = [generator.randrange(VOCAB_SIZE) for _ in range(NUM_ROWS)]
    whole = prefill(runner, tokens, pages.table(NUM_ROWS))
    pieces = prefill(runner, tokens, pages.table(NUM_ROWS), 1, 2, 5, 33, 100, NUM_ROWS - 1)
    assert torch.equal(whole, pieces)


def widened(name: str) -> PreTrainedConfig:
    """The configuration with WIDE_HIDDEN features and room for NUM_ROWS tokens."""
    config = architectures()[name]
    wide = {
        "hidden_size": WIDE_HIDDEN,
        "word_embed_proj_dim": WIDE_HIDDEN,
        "ffn_dim": WIDE_INNER,
        "intermediate_size": WIDE_INNER,
        "moe_intermediate_size": WIDE_INNER,
        "max_position_embeddings": 256,
    }
    for field, value in wide.items():
        # Through the names that a family gives them: GPT-2 says n_embd and n_positions.
        if hasattr(config, field):
            setattr(config, field, value)
    return config


def test_a_lost_window_would_be_seen(folders: Path) -> None:
    """Negative control: the comparison above fails when the windows are dropped."""
    folder = write_tiny(folders / "windowed", CONFIGS["mistral"])
    stock = stock_model(folder, torch.float64)
    loaded = load_model(folder, dtype="float64", fused=False)
    loaded.model.config.sliding_window = None
    runner = Runner(loaded, num_blocks=12, block_size=4)
    context = list(range(5, 5 + 3 * WINDOW))
    logits = prefill(runner, context, Pages(12, 4).table(len(context)))
    difference = (logits - stock_logits(stock, context)).abs().amax(1)
    assert float(difference[:WINDOW].max()) < 1e-8
    assert float(difference[WINDOW:].max()) > 1e-3
