"""Recorded passes give the bits of plain ones, whatever shares them, and padding touches nobody.

A recorder on the CPU stands in for CUDA graphs: it keeps the function and runs it again, so that a
pass can read nothing but the places that were there when it was recorded.
"""

import logging
import random
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from specinfer.errors import InvalidRequest
from specinfer.worker_settings import WorkerSettings
from specinfer_engine import graphs
from specinfer_engine.batch import SequenceRows, build_batch
from specinfer_engine.graphs import (
    ROW_BUCKETS,
    ScratchBlocks,
    StepInputs,
    StepSizes,
    capture_for,
    choose_sizes,
    fill,
)
from specinfer_engine.loader import load_model
from specinfer_engine.model import LoadedModel
from specinfer_engine.runner import Runner
from tests.kit.recorded_passes import (
    BLOCK_SIZE,
    NUM_BLOCKS,
    Recorder,
    differing_passes,
    random_rows,
    refuse,
)
from tests.kit.threads import one_thread as one_thread
from tests.kit.tiny_models import write_tiny_llama

VOCAB_SIZE = 300
NUM_PASSES = 25


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A Llama with grouped heads, bit-invariant by row."""
    path = tmp_path_factory.mktemp("graphs") / "llama"
    write_tiny_llama(path, vocab_size=VOCAB_SIZE, hidden_size=32)
    model = load_model(path, dtype="float32")
    assert model.row_invariant
    return model


def compare(loaded: LoadedModel, num_passes: int = NUM_PASSES) -> list[int]:
    """Passes that differ between a runner that records and one that does not."""
    recorder = Recorder()
    different = differing_passes(loaded, recorder, num_passes)
    assert recorder.num_replayed == num_passes > recorder.num_recorded > 3
    return different


def test_recorded_passes_give_the_bits_of_plain_ones(loaded: LoadedModel) -> None:
    assert compare(loaded) == []


def test_padding_that_writes_into_the_first_blocks_is_noticed(loaded: LoadedModel) -> None:
    """Negative control: padding with the slots of somebody's blocks."""

    def scratch_of_others(first: int, block_size: int) -> ScratchBlocks:
        return ScratchBlocks(0, block_size)

    scratch_of_others.count = ScratchBlocks.count  # type: ignore[attr-defined]
    with patch("specinfer_engine.runner.ScratchBlocks", scratch_of_others):
        assert compare(loaded, 8)


def test_inputs_left_over_from_the_pass_before_are_noticed(loaded: LoadedModel) -> None:
    """Negative control: a replay that was not given its batch."""
    with patch.object(graphs, "_copy", _copy_once()):
        assert compare(loaded, 8)


def _copy_once() -> Callable[[StepInputs, StepInputs], None]:
    copied: set[int] = set()

    def copy(host: StepInputs, inputs: StepInputs) -> None:
        if id(inputs) not in copied:
            copied.add(id(inputs))
            inputs.wide.copy_(host.wide)
            inputs.narrow.copy_(host.narrow)

    return copy


@pytest.mark.parametrize(
    ("num_sequences", "count", "num_wanted", "expected"),
    [
        (1, 1, 1, StepSizes(rows=1, sequences=1, words=1, blocks=64, logits=1)),
        (1, 33, 33, StepSizes(rows=48, sequences=1, words=1, blocks=64, logits=48)),
        (1, 100, 1, StepSizes(rows=128, sequences=1, words=2, blocks=64, logits=1)),
        (3, 1, 1, StepSizes(rows=4, sequences=4, words=1, blocks=64, logits=4)),
        (9, 9, 9, StepSizes(rows=96, sequences=64, words=1, blocks=64, logits=96)),
        (64, 1, 1, StepSizes(rows=64, sequences=64, words=1, blocks=64, logits=64)),
        (1, 200, 0, StepSizes(rows=224, sequences=1, words=4, blocks=64, logits=1)),
    ],
)
def test_the_smallest_sizes_that_fit_are_chosen(
    num_sequences: int, count: int, num_wanted: int, expected: StepSizes
) -> None:
    table = range(-(-count // BLOCK_SIZE))
    rows = [SequenceRows.chain([0] * count, 0, table, range(num_wanted))] * num_sequences
    assert choose_sizes(build_batch(rows, BLOCK_SIZE)) == expected


def test_wide_tables_take_wider_sizes() -> None:
    rows = [SequenceRows.chain([0], 8 * 64, range(65), (0,))]
    sizes = choose_sizes(build_batch(rows, BLOCK_SIZE))
    assert sizes is not None
    assert sizes.blocks == 256


def test_a_pass_above_the_largest_bucket_runs_plainly(loaded: LoadedModel) -> None:
    recorder = Recorder()
    runner = Runner(loaded, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, capture=recorder)
    plain = Runner(loaded, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    count = ROW_BUCKETS[-1] + 1
    rows = [SequenceRows.chain([5] * count, 0, range(-(-count // BLOCK_SIZE)), (count - 1,))]
    assert torch.equal(runner.forward(rows)[0], plain.forward(rows)[0])
    assert recorder.num_recorded == 0


def test_padding_rows_have_slots_of_their_own_that_no_block_of_the_pool_has() -> None:
    scratch = ScratchBlocks(NUM_BLOCKS, BLOCK_SIZE)
    for num_rows in range(1, ROW_BUCKETS[-1] + 1):
        batch = build_batch([one_row(index) for index in range(num_rows)], BLOCK_SIZE)
        sizes = choose_sizes(batch)
        assert sizes is not None
        inputs = StepInputs.zeros(sizes, "cpu")
        fill(inputs, batch, scratch)
        padding = inputs.batch().slot_mapping[num_rows:].tolist()
        room = ScratchBlocks.count(BLOCK_SIZE) * BLOCK_SIZE
        first = NUM_BLOCKS * BLOCK_SIZE
        assert padding == list(range(first, first + len(padding)))
        assert len(padding) <= room


def one_row(index: int) -> SequenceRows:
    """A sequence of one token in a block of its own."""
    return SequenceRows.chain([1], 0, (index,), (0,))


def test_only_so_many_passes_are_recorded(loaded: LoadedModel) -> None:
    recorder = Recorder()
    logits = torch.zeros(ROW_BUCKETS[-1], VOCAB_SIZE)
    plain = Runner(loaded, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    recording = graphs.StepGraphs(
        plain.forward_batch, recorder, ScratchBlocks(NUM_BLOCKS - 8, BLOCK_SIZE), logits, 2
    )

    def served(count: int) -> Tensor | None:
        rows = [SequenceRows.chain([3] * count, 0, range(4), range(count))]
        return recording.logits(build_batch(rows, BLOCK_SIZE))

    assert [served(count) is not None for count in (1, 2, 4, 2, 8, 1)] == [
        *(True, True, False, True, False, True)
    ]
    assert recorder.num_recorded == recording.num_graphs == 2


def test_what_cannot_be_recorded_runs_plainly_and_is_told_once(
    loaded: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    runner = Runner(loaded, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, capture=refuse)
    plain = Runner(loaded, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    choose = random.Random(2)
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            rows = random_rows(choose, 3, VOCAB_SIZE)
            pairs = zip(plain.forward(rows), runner.forward(rows), strict=True)
            assert all(torch.equal(mine, its) for mine, its in pairs)
    assert [record.message for record in caplog.records] == [
        "passes are not recorded any more: this model asks the host"
    ]


def test_nothing_is_recorded_on_a_cpu_nor_in_float64() -> None:
    assert capture_for(True, torch.device("cpu"), torch.float32) is None
    assert capture_for(True, torch.device("cuda"), torch.float64) is None


def test_the_setting_is_auto_or_off() -> None:
    assert WorkerSettings(model=Path("m")).cuda_graphs == "auto"
    with pytest.raises(InvalidRequest):
        WorkerSettings(model=Path("m"), cuda_graphs="always")
