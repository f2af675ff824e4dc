"""Runs ragged passes of one model over its pool of keys and values.

Owns the pool and nothing else: which block belongs to whom, what a session is and what a logit
means are not its business. Not thread-safe; the engine's thread owns it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specinfer_engine.attention import PagedPass, layer_caches
from specinfer_engine.batch import ForwardBatch, SequenceRows, build_batch
from specinfer_engine.graphs import ROW_BUCKETS, Capture, ScratchBlocks, StepGraphs, move_batch
from specinfer_engine.model import LoadedModel
from specinfer_engine.rowwise import capped
from specinfer_kernels import compact_kv, copy_blocks


class Runner:
    """A model with its key-value pool.

    With `capture`, passes of at most 256 rows are recorded at first use and replayed.

    Attributes:
        loaded: the model.
        num_blocks, block_size: shape of the pool.
        pool: [num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim] of the model's
            kv_dtype; sized once, never grown. With `capture` a few blocks more, for padding rows.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        num_blocks: int,
        block_size: int = 16,
        capture: Capture | None = None,
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool of {num_blocks} blocks of {block_size} holds nothing")
        self.loaded = loaded
        self.num_blocks = num_blocks
        self.block_size = block_size
        spare = 0 if capture is None else ScratchBlocks.count(block_size)
        block = (block_size, loaded.num_kv_heads, loaded.head_dim)
        shape = (loaded.num_layers, 2, num_blocks + spare, *block)
        self.pool = torch.zeros(shape, dtype=loaded.kv_dtype, device=loaded.device)
        self._caches = layer_caches(self.pool)
        self._graphs = None if capture is None else self._make_graphs(capture)

    @property
    def graphs(self) -> StepGraphs | None:
        """Its recorded passes, for whoever records several in a row; None without `capture`."""
        return self._graphs

    @property
    def records_passes(self) -> bool:
        """Whether the first pass of a size records it, which takes much longer than the pass."""
        return self._graphs is not None

    def forward(self, rows: Sequence[SequenceRows]) -> list[Tensor]:
        """One pass over the rows of all sequences, writing their keys and values.

        Returns for each sequence the logits of its `logit_rows`, [len(logit_rows), vocab_size],
        float32 (float64 for a float64 model), in the order asked for.
        """
        # Graphs take a batch from the host, padded and in two copies.
        device = self.loaded.device if self._graphs is None else "cpu"
        batch = build_batch(rows, self.block_size, device)
        logits = self.forward_batch(batch)
        return [logits] if len(rows) == 1 else list(logits.split(list(batch.logit_counts)))

    @torch.inference_mode()
    def forward_batch(self, batch: ForwardBatch) -> Tensor:
        """One pass over a batch that is laid out already: logits [num_logits, vocab_size].

        With graphs the batch lies on the host, else on the model's device.
        """
        if self._graphs is not None:
            logits = self._graphs.logits(batch)
            if logits is not None:
                return logits
            batch = move_batch(batch, self.loaded.device)
        return self._run(batch)

    def _run(self, batch: ForwardBatch) -> Tensor:
        paged_pass = PagedPass(batch.layout, batch.slot_mapping, self._caches)
        logits = self.loaded.decoder(batch, paged_pass)
        if logits.dtype != torch.float64:
            logits = logits.float()
        cap = self.loaded.final_softcap
        return logits if cap is None else capped(logits, cap)

    def compact(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Move the keys and values of slots `sources` to slots `targets`, in every layer."""
        if sources:
            compact_kv(self.pool, self._indices(sources), self._indices(targets))

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy whole blocks, in every layer (copy-on-write)."""
        if sources:
            copy_blocks(self.pool, self._indices(sources), self._indices(targets))

    def _make_graphs(self, capture: Capture) -> StepGraphs:
        loaded = self.loaded
        dtype = torch.float64 if loaded.dtype == torch.float64 else torch.float32
        shape = (ROW_BUCKETS[-1], loaded.vocab_size)
        return StepGraphs(
            self._run,
            capture,
            ScratchBlocks(self.num_blocks, self.block_size),
            torch.zeros(shape, dtype=dtype, device=loaded.device),
        )

    def _indices(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.loaded.device)
