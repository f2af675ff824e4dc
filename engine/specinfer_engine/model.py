"""A loaded model and the facts that the rest of the engine goes by.

Data only: `loader` makes it, `runner` runs it. Knows no files and no sessions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specinfer_engine.attention import PASS_ARGUMENT, PagedPass
from specinfer_engine.batch import ForwardBatch
from specinfer_engine.checkpoint import TokenizerFiles

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class LoadedModel:
    """A decoder ready to run on pages.

    Attributes:
        model: the `transformers` model, its linear layers row-invariant, its attention paged; a
            fused decoder has taken its layers out.
        decoder: one pass over a batch: logits [num_logits, vocab_size] of any float format.
        name: name it is served under.
        num_layers, num_heads, num_kv_heads, head_dim: shape of its attention.
        vocab_size: number of logits, and the bound of token ids.
        max_model_len: most positions.
        eos_token_ids: tokens that end a text.
        dtype, device: of weights and rows.
        kv_dtype: of keys and values in the pool.
        model_hash: SHA-256 over the parts of the configuration and weight files, hex; another for
            int8 weights, and for keys and values of another dtype than the weights'.
        tokenizer_hash: SHA-256 over tokenizer.json, hex.
        tokenizer_files: what a router needs.
        row_invariant: whether a row's bits never depend on the rows that share its pass, as a
            probe at load found.
        final_softcap: cap on the logits that the runner applies in place of the model, or None.
        sliding_windows: window of each layer in keys, None for all keys.
    """

    model: PreTrainedModel
    decoder: Callable[[ForwardBatch, PagedPass], Tensor] = field(repr=False)
    name: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    dtype: torch.dtype
    kv_dtype: torch.dtype
    device: torch.device
    model_hash: str
    tokenizer_hash: str
    tokenizer_files: TokenizerFiles = field(repr=False)
    row_invariant: bool = False
    final_softcap: float | None = None
    sliding_windows: tuple[int | None, ...] = ()

    @property
    def dtype_name(self) -> str:
        """The number format as the wire names it, such as "bfloat16"."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def kv_dtype_name(self) -> str:
        """That of keys and values, such as "float8_e4m3fn"."""
        return str(self.kv_dtype).removeprefix("torch.")

    @property
    def kv_bytes_per_token(self) -> int:
        """What the keys and values of one token take in the pool."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.kv_dtype.itemsize


class StockDecoder:
    """Any served model as `transformers` runs it, attention and products replaced."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def __call__(self, batch: ForwardBatch, paged_pass: PagedPass) -> Tensor:
        """One pass: logits [num_logits, vocab_size] in the model's format."""
        arguments: dict[str, Any] = {PASS_ARGUMENT: paged_pass}
        output = self._model(
            input_ids=batch.token_ids.unsqueeze(0),
            position_ids=batch.positions.unsqueeze(0),
            use_cache=False,
            logits_to_keep=batch.logit_index,
            **arguments,
        )
        logits: Tensor = output.logits[0]
        return logits
