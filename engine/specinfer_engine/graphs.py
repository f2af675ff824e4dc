"""Whole passes recorded once and replayed: on a GPU a small pass is mostly launches of kernels.

A recorded pass reads and writes fixed places, so it serves every batch that fits its sizes. Batches
are padded to one of a few sizes with rows that belong to nobody, whose keys and values go to blocks
that nobody else has. Rows are bit-invariant, so neither the padding nor the replaying changes a bit
of the others. What is computed on the host from the sizes of a pass (the grids and splits of
attention, the states between its launches) is fixed by the sizes here, and positions alone decide
the order of a row's sums. Knows no model: a pass is a function of a batch.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from specinfer_engine.batch import ForwardBatch, aligned, cut
from specinfer_engine.device_waits import RefuseWaits, WaitsForDevice
from specinfer_kernels import AttentionLayout

log = logging.getLogger(__name__)

ROW_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
SEQUENCE_BUCKETS = (1, 8, 64, 256)
# Widths of block tables, times four each: they decide into how many splits attention is launched.
_NARROWEST_TABLE = 64
# A graph of a large model holds a few MiB of launches; their working memory they share.
MOST_GRAPHS = 96
_MOST_PADDING = max(right - left for left, right in pairwise(ROW_BUCKETS)) - 1
# Not a worker's: what it guards, the device with all its streams, is one for the whole process.
_RECORDING = threading.Lock()


class CaptureFailed(Exception):
    """A pass cannot be recorded on this device, with the reason; it can still be run."""


class Capture(Protocol):
    """Records a function of tensors."""

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        """Run `step`, recording it; the result does the same again with the same tensors.

        Raises:
            CaptureFailed: when `step` does what cannot be recorded; it may have run.
        """
        ...


class CudaCapture:
    """Records CUDA graphs that share one pool of working memory: they never run side by side.

    One recording at a time in a process: to begin one waits for the device, which ends others.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._memory = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        """See Capture."""
        try:
            with (
                _RECORDING,
                torch.cuda.device(self._device),
                # A recording that fails leaves its thread on the stream it was on.
                torch.cuda.stream(torch.cuda.current_stream()),
            ):
                self._warm_up(step)
                return self._record(step)
        except (RuntimeError, WaitsForDevice) as error:
            raise CaptureFailed(f"{type(error).__name__}: {error}") from error

    def _warm_up(self, step: Callable[[], None]) -> None:
        # What is made at first use (compiled kernels, tables, workspaces) must not be recorded.
        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self._stream):
                step()
                with RefuseWaits(self._device.type):
                    step()
        finally:
            torch.cuda.current_stream().wait_stream(self._stream)

    def _record(self, step: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # Other engines of this process may use the device from their own threads meanwhile.
        with torch.cuda.graph(
            graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"
        ):
            step()
        replay: Callable[[], None] = graph.replay
        return replay


def capture_for(wanted: bool, device: torch.device, dtype: torch.dtype) -> Capture | None:
    """How passes of a model of this dtype are recorded on this device, or None: they are not.

    In float64 the ops are their references, which ask the host.
    """
    served = device.type == "cuda" and dtype != torch.float64
    return CudaCapture(device) if wanted and served else None


@dataclass(frozen=True)
class StepSizes:
    """What a recorded pass has room for: rows, sequences, words of ancestors, columns of the block
    tables, and rows whose logits are wanted. One more sequence holds the padding."""

    rows: int
    sequences: int
    words: int
    blocks: int
    logits: int


def choose_sizes(batch: ForwardBatch) -> StepSizes | None:
    """The smallest sizes that a batch fits, or None when it is larger than all of them."""
    layout, num_logits = batch.layout, batch.logit_index.numel()
    if batch.num_rows > ROW_BUCKETS[-1]:
        return None
    rows = _bucket(batch.num_rows, ROW_BUCKETS)
    sequences = min(rows, _bucket(layout.context_lens.numel(), SEQUENCE_BUCKETS))
    if num_logits > rows:
        return None
    return StepSizes(
        rows=rows,
        sequences=sequences,
        words=1 << (layout.ancestors.shape[1] - 1).bit_length(),
        blocks=table_width(layout.block_tables.shape[1]),
        # Plain decoding and prefills want one row of each sequence, trees want all.
        logits=sequences if num_logits <= sequences else rows,
    )


def table_width(num_blocks: int) -> int:
    """Columns of the block tables of a recorded pass that has room for `num_blocks`."""
    width = _NARROWEST_TABLE
    while width < num_blocks:
        width *= 4
    return width


def _bucket(count: int, buckets: tuple[int, ...]) -> int:
    return next(bucket for bucket in buckets if count <= bucket)


@dataclass(frozen=True)
class ScratchBlocks:
    """Blocks of the pool that hold the keys and values of padding rows, side by side."""

    first: int
    block_size: int

    @staticmethod
    def count(block_size: int) -> int:
        """How many there must be, so that each padding row has a slot of its own."""
        return -(-_MOST_PADDING // block_size)


@dataclass(frozen=True)
class StepInputs:
    """A batch of fixed sizes over two flat buffers, so that two copies bring it to the device.

    Attributes:
        wide: int64 buffer of tokens, positions, slots, logit rows and ancestors.
        narrow: int32 buffer of row offsets, context lengths and block tables.
        sizes: what they have room for.
    """

    wide: Tensor
    narrow: Tensor
    sizes: StepSizes

    @classmethod
    def zeros(cls, sizes: StepSizes, device: torch.device | str) -> StepInputs:
        """Empty inputs on a device."""
        wide, narrow = (
            torch.zeros(sum(map(aligned, pieces)), dtype=dtype, device=device)
            for pieces, dtype in zip(_pieces(sizes), (torch.int64, torch.int32), strict=True)
        )
        return cls(wide, narrow, sizes)

    def batch(self) -> ForwardBatch:
        """The inputs as a batch; its attention plan is not made yet."""
        sizes, (wide, narrow) = self.sizes, _pieces(self.sizes)
        token_ids, positions, slots, logit_index, ancestors = cut(self.wide, wide)
        row_offsets, context_lens, tables = cut(self.narrow, narrow)
        layout = AttentionLayout(
            row_offsets=row_offsets,
            context_lens=context_lens,
            block_tables=tables.view(sizes.sequences + 1, sizes.blocks),
            ancestors=ancestors.view(sizes.rows, sizes.words),
        )
        return ForwardBatch(
            token_ids=token_ids,
            positions=positions,
            slot_mapping=slots,
            layout=layout,
            logit_index=logit_index,
            logit_counts=(),
        )


def _pieces(sizes: StepSizes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Elements of each piece of the two buffers."""
    rows, sequences = sizes.rows, sizes.sequences + 1
    return (
        (rows, rows, rows, sizes.logits, rows * sizes.words),
        (sequences + 1, sequences, sequences * sizes.blocks),
    )


def fill(inputs: StepInputs, batch: ForwardBatch, scratch: ScratchBlocks) -> None:
    """Lay a batch of the host out in zeroed inputs of the host, padding included.

    The padding is one more sequence without context, whose rows see themselves alone; sequences
    between it and the batch's own have no rows.
    """
    target, sizes = inputs.batch(), inputs.sizes
    num_rows, num_sequences = batch.num_rows, batch.layout.context_lens.numel()
    padding = sizes.rows - num_rows
    for name in ("token_ids", "positions", "slot_mapping"):
        getattr(target, name)[:num_rows] = getattr(batch, name)
    target.slot_mapping[num_rows:] = torch.arange(padding) + scratch.first * scratch.block_size
    target.logit_index[: batch.logit_index.numel()] = batch.logit_index
    layout, given = target.layout, batch.layout
    layout.ancestors[:num_rows, : given.ancestors.shape[1]] = given.ancestors
    layout.ancestors[num_rows:, 0] = torch.ones((), dtype=torch.int64) << torch.arange(padding)
    layout.row_offsets[: num_sequences + 1] = given.row_offsets
    layout.row_offsets[num_sequences + 1 : -1] = num_rows
    layout.row_offsets[-1] = sizes.rows
    layout.context_lens[:num_sequences] = given.context_lens
    layout.block_tables[:num_sequences, : given.block_tables.shape[1]] = given.block_tables
    count = ScratchBlocks.count(scratch.block_size)
    layout.block_tables[-1, :count] = torch.arange(scratch.first, scratch.first + count)


@dataclass(frozen=True)
class _RecordedStep:
    inputs: StepInputs
    replay: Callable[[], None]


class StepGraphs:
    """The recorded passes of one runner, made at first use and at most `most_graphs` of them.

    Args:
        run: one pass over a batch of the device: logits [num_logits, vocab_size].
        capture: what records it.
        scratch: blocks for the padding.
        logits: buffer [rows of the largest bucket, vocab_size] that all passes write.
        most_graphs: bound; batches of further sizes are not served.

    Attributes:
        run, scratch: as given, for whoever records passes of its own.
        capture: as given; None once a pass could not be recorded.
    """

    def __init__(
        self,
        run: Callable[[ForwardBatch], Tensor],
        capture: Capture,
        scratch: ScratchBlocks,
        logits: Tensor,
        most_graphs: int = MOST_GRAPHS,
    ) -> None:
        self.run = run
        self.capture: Capture | None = capture
        self.scratch = scratch
        self._logits = logits
        self._most_graphs = most_graphs
        self._steps: dict[StepSizes, _RecordedStep] = {}

    @property
    def num_graphs(self) -> int:
        """Passes recorded."""
        return len(self._steps)

    def logits(self, batch: ForwardBatch) -> Tensor | None:
        """One pass over a batch of the host: logits of its own, [num_logits, vocab_size].

        None when no recorded pass can serve it; then nothing was computed that counts.
        """
        sizes = choose_sizes(batch)
        if sizes is None:
            return None
        host = StepInputs.zeros(sizes, "cpu")
        fill(host, batch, self.scratch)
        step = self._steps.get(sizes) or self._record(host)
        if step is None:
            return None
        _copy(host, step.inputs)
        step.replay()
        # The next pass writes the same places.
        return self._logits[: batch.logit_index.numel()].clone()

    def _record(self, host: StepInputs) -> _RecordedStep | None:
        """Record a pass of these sizes while it runs this batch; None when that is not to be."""
        if self.capture is None or len(self._steps) >= self._most_graphs:
            return None
        inputs = StepInputs.zeros(host.sizes, self._logits.device)
        _copy(host, inputs)

        def run_step() -> None:
            # A batch of its own each time: the plan of attention is kept by the layout.
            self._logits[: host.sizes.logits].copy_(self.run(inputs.batch()))

        try:
            step = _RecordedStep(inputs, self.capture(run_step))
        except CaptureFailed as error:
            log.warning("passes are not recorded any more: %s", error)
            self.capture = None
            return None
        self._steps[host.sizes] = step
        return step


def _copy(host: StepInputs, inputs: StepInputs) -> None:
    inputs.wide.copy_(host.wide)
    inputs.narrow.copy_(host.narrow)


def move_batch(batch: ForwardBatch, device: torch.device) -> ForwardBatch:
    """The batch on a device."""
    layout = batch.layout
    return replace(
        batch,
        token_ids=batch.token_ids.to(device),
        positions=batch.positions.to(device),
        slot_mapping=batch.slot_mapping.to(device),
        layout=AttentionLayout(
            row_offsets=layout.row_offsets.to(device),
            context_lens=layout.context_lens.to(device),
            block_tables=layout.block_tables.to(device),
            ancestors=layout.ancestors.to(device),
        ),
        logit_index=batch.logit_index.to(device),
    )
