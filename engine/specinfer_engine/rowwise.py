"""Elementwise functions whose bits depend neither on neighbours nor on the number of threads.

On a CPU PyTorch computes `exp`, `tanh`, `cos` and their kin in vectors, the last elements of a loop
one by one with another routine, and it cuts long loops between threads wherever the count says. So
the last bit of an element depends on its place. Here every element stays in a full vector: loops
start and end at multiples of LANES and are short enough to stay in one thread. Knows no
architecture by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import activation
from transformers import activations

# At least two of the widest vectors of the smallest format (2 x 32 bfloat16 in AVX-512).
LANES = 64
# Loops of so many elements were never cut between threads, GELU's own lower threshold included.
_GRAIN = 8192
_TABLE_STEP = 64

_EXACT = (nn.ReLU, nn.Identity, activations.ReLUSquaredActivation)


def apply_elementwise(function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """`function` of every element of [..., width], in full vectors and uncut loops.

    `function` maps a tensor to one of the same shape and dtype, element by element.
    """
    if values.device.type == "cuda":  # one routine for every element, wherever it lies
        return function(values)
    width = values.shape[-1]
    padding = -width % LANES
    if padding:
        values = functional.pad(values, (0, padding))
    if values.numel() <= _GRAIN and values.stride(-1) == 1:
        # Rows may lie apart: each is whole vectors, and the loop over them stays in this thread.
        result = function(values)
    else:
        pieces = values.reshape(-1).split(_GRAIN)
        result = torch.cat([function(piece) for piece in pieces]).view(values.shape)
    return result[..., :width] if padding else result


class RowwiseActivation(nn.Module):
    """An activation function applied by `apply_elementwise`."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function

    def forward(self, values: Tensor) -> Tensor:
        """values [..., width] to the same shape."""
        return apply_elementwise(self.function, values)


class RotaryTable(nn.Module):
    """Cosines and sines of every position, computed once and then looked up.

    A position has the same bits in every pass, and a pass computes none. One table for each kind
    of layer that the wrapped module tells apart by further arguments.
    """

    def __init__(self, rotary: nn.Module, max_model_len: int) -> None:
        super().__init__()
        self._rotary = rotary
        self._max_model_len = max_model_len
        self._tables: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Cosines and sines [1, num_rows, rotary_dim] of position_ids [1, num_rows]."""
        rows = position_ids[0]
        tables = self.tables(x, *args, **kwargs)
        return tuple(table.index_select(0, rows).unsqueeze(0) for table in tables)

    def tables(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Cosines and sines of all positions, [num_positions, rotary_dim] of the dtype of x."""
        key = (*args, *sorted(kwargs.items()))
        tables = self._tables.get(key)
        if tables is None:
            tables = self._tables[key] = self._compute(x, args, kwargs)
        return tables

    def _compute(
        self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        parts = []
        for start in range(0, self._max_model_len, _TABLE_STEP):
            # Whole steps, so the last positions too stand in full vectors.
            positions = torch.arange(start, start + _TABLE_STEP, device=x.device)
            inside = positions.clamp_max(self._max_model_len - 1)[None]
            parts.append(self._rotary(x, inside, *args, **kwargs))
        cosines, sines = (torch.cat(column, 1)[0] for column in zip(*parts, strict=True))
        return cosines, sines


def make_elementwise_invariant(model: nn.Module, max_model_len: int) -> None:
    """Wrap the activations and rotary embeddings of a model, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if _is_activation(child):
                setattr(parent, name, RowwiseActivation(child))
            elif "RotaryEmbedding" in type(child).__name__ and hasattr(child, "inv_freq"):
                setattr(parent, name, RotaryTable(child, max_model_len))


def capped(logits: Tensor, cap: float) -> Tensor:
    """cap * tanh(logits / cap) of [num_logits, vocab_size], as Gemma 2 ends its forward."""
    return apply_elementwise(torch.tanh, logits / cap) * cap


def _is_activation(module: nn.Module) -> bool:
    homes = (activation.__name__, activations.__name__)
    return type(module).__module__ in homes and not isinstance(module, _EXACT)
