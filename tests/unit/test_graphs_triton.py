"""Padded passes on the path of a GPU, through Triton's interpreter: the bits of plain ones; and
trees that are grown whole: those of the levels."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from specinfer.tree import TokenTree
from specinfer_engine.batch import SequenceRows
from specinfer_engine.device_waits import RefuseWaits
from specinfer_engine.loader import load_model
from specinfer_engine.model import LoadedModel
from specinfer_engine.runner import Runner
from specinfer_kernels import native_decoder
from tests.kit.recorded_passes import fill_pool
from tests.kit.tiny_models import SMALLEST_VOCABULARY, write_tiny_llama
from tests.kit.triton_interpreter import take_triton
from tests.kit.whole_trees import SAMPLED, drafter_of, rounds, shape_of

pytest.importorskip("triton")

from specinfer_kernels.triton import attention
from specinfer_kernels.triton.runtime import is_interpreting

pytestmark = pytest.mark.skipif(not is_interpreting(), reason="Triton compiles in this process")

BLOCK_SIZE, NUM_BLOCKS = 8, 40
TREE = TokenTree((5, 6, 7, 8, 9), (-1, 0, 0, 2, 1))


def run_again(step: Callable[[], None]) -> Callable[[], None]:
    """A recorder that keeps the function, which must not wait for its device."""
    with RefuseWaits("cpu"):
        step()
    return step


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    """A model of one layer on Triton's kernels."""
    folder = write_tiny_llama(
        tmp_path, vocab_size=SMALLEST_VOCABULARY, hidden_size=32, num_layers=1, num_heads=2
    )
    # Otherwise the whole decoder is one native call, which asks for no backend.
    monkeypatch.setattr(native_decoder, "native_stack", lambda stack: None)
    loaded = load_model(folder, dtype="float32")
    take_triton(monkeypatch)
    # Only on a CPU are values looked at.
    op = importlib.import_module("specinfer_kernels.tree_attention")
    monkeypatch.setattr(op, "_check_values", lambda *arguments: None)
    return loaded


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.float8_e4m3fn])
def test_padding_changes_no_bit_on_the_path_of_a_gpu(
    loaded: LoadedModel, kv_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = replace(loaded, kv_dtype=kv_dtype)
    plain = Runner(loaded, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    padded = Runner(loaded, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, capture=run_again)
    fill_pool(plain)
    fill_pool(padded)
    launched: list[int] = []
    launch = attention.tree_attention

    def count(query: Tensor, *args: Any, **named: Any) -> Tensor:
        launched.append(query.shape[0])
        return launch(query, *args, **named)

    monkeypatch.setattr(attention, "tree_attention", count)
    passes = (
        # One tree of five rows in eight; then three sequences in room for eight, after a context
        # that fills tiles.
        [SequenceRows.tree(TREE, 13, (3, 9, 1))],
        [
            SequenceRows.tree(TREE, 70, (12, 2, 17, 4, 30, 6, 21, 8, 25, 10)),
            SequenceRows.chain((4,), 0, (20,), (0,)),
            SequenceRows.chain((11, 12, 13), 6, (39, 38), (2,)),
        ],
    )
    for rows in passes:
        for mine, its in zip(plain.forward(rows), padded.forward(rows), strict=True):
            assert torch.equal(mine, its)
        pools = (plain.pool, padded.pool[:, :, :NUM_BLOCKS])
        assert torch.equal(*(pool.view(torch.uint8) for pool in pools))
    # Of the second pass of each runner: nine rows, and sixteen with the padding.
    assert {5, 8, 9, 16} == set(launched)


def test_a_whole_tree_is_that_of_the_levels_on_the_path_of_a_gpu(loaded: LoadedModel) -> None:
    shape = shape_of((2, 2, 1))
    expected, _ = rounds(drafter_of(loaded), [SAMPLED], [shape], 1)
    assert rounds(drafter_of(loaded, run_again), [SAMPLED], [shape], 1) == (expected, 1)
