"""Random passes through a runner that records and one that does not, compared bit for bit; and what
stands in for the recorder of a device."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch

from specinfer_engine.batch import SequenceRows
from specinfer_engine.graphs import Capture, CaptureFailed
from specinfer_engine.model import LoadedModel
from specinfer_engine.runner import Runner
from tests.kit.passes import Pages, random_tree

BLOCK_SIZE = 8
NUM_BLOCKS = 320
MOST_CONTEXT = 40
# On a GPU contexts fill several splits of attention, and need wider block tables.
GPU_NUM_BLOCKS = 2400
GPU_MOST_CONTEXT = 900


class Recorder:
    """Keeps what it is given and runs it again; counts both."""

    def __init__(self) -> None:
        self.num_recorded = 0
        self.num_replayed = 0

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        self.num_recorded += 1
        step()

        def replay() -> None:
            self.num_replayed += 1
            step()

        return replay


def refuse(step: Callable[[], None]) -> Callable[[], None]:
    """A device on which nothing can be recorded."""
    step()
    raise CaptureFailed("this model asks the host")


def random_rows(
    choose: random.Random,
    num_sequences: int,
    vocab_size: int,
    *,
    num_blocks: int = NUM_BLOCKS,
    most_context: int = MOST_CONTEXT,
) -> list[SequenceRows]:
    """Chains and trees of one to twelve rows on scattered pages."""
    pages = Pages(num_blocks, BLOCK_SIZE, choose.randrange(1 << 30))
    rows = []
    for _ in range(num_sequences):
        context, count = choose.randrange(most_context), choose.choice((1, 1, 3, 12))
        table = pages.table(context + count)
        if choose.random() < 0.5:
            rows.append(SequenceRows.tree(random_tree(choose, count, vocab_size), context, table))
        else:
            tokens = [choose.randrange(vocab_size) for _ in range(count)]
            wanted = (count - 1,) if choose.random() < 0.7 else ()
            rows.append(SequenceRows.chain(tokens, context, table, wanted))
    return rows


def fill_pool(runner: Runner) -> None:
    """Keys and values in every slot, so that contexts say something; the same for every runner."""
    pool = runner.pool[:, :, : runner.num_blocks]
    pool.copy_(torch.randn(pool.shape, generator=torch.Generator().manual_seed(1)))


def differing_passes(loaded: LoadedModel, capture: Capture, num_passes: int) -> list[int]:
    """Passes whose logits, or whose keys and values, are not those of a runner without graphs."""
    on_gpu = loaded.device.type == "cuda"
    num_blocks = GPU_NUM_BLOCKS if on_gpu else NUM_BLOCKS
    most_context = GPU_MOST_CONTEXT if on_gpu else MOST_CONTEXT
    plain = Runner(loaded, num_blocks=num_blocks, block_size=BLOCK_SIZE)
    recording = Runner(loaded, num_blocks=num_blocks, block_size=BLOCK_SIZE, capture=capture)
    choose, different = random.Random(4), []
    fill_pool(plain)
    fill_pool(recording)
    for index in range(num_passes):
        rows = random_rows(
            choose,
            choose.choice((1, 1, 2, 5, 9, 20)),
            loaded.vocab_size,
            num_blocks=num_blocks,
            most_context=most_context,
        )
        pairs = zip(plain.forward(rows), recording.forward(rows), strict=True)
        same = all(torch.equal(mine, its) for mine, its in pairs)
        # As bytes: not every device compares float8.
        pools = (plain.pool, recording.pool[:, :, :num_blocks])
        if not same or not torch.equal(*(pool.view(torch.uint8) for pool in pools)):
            different.append(index)
    return different
