"""A grammar's mask on a row of logits: tokens that may not follow become -inf.

Applied to raw logits, before penalties, bias, temperature and cuts, so that a law is one over the
allowed tokens. This module knows nothing of sessions, trees or how grammars are compiled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from specinfer.grammar import GrammarState


def constrain(row: Tensor, state: GrammarState, output_ids: Sequence[int]) -> Tensor:
    """A row's logits with -inf for every token that may not follow.

    Args:
        row: raw logits, [vocab_size]; not changed.
        state: the session's.
        output_ids: all tokens between the prompt and the one that the row decides.

    Returns:
        A row of the same shape and dtype; the row itself after an end token, where a text is over.

    Raises:
        InvalidRequest: when no token may follow.
    """
    mask = state.mask_after(output_ids)
    if mask is None:
        return row
    return row.masked_fill(~allowed_tokens(mask, row.shape[0]).to(row.device), -math.inf)


def allowed_tokens(mask: bytes, vocab_size: int) -> Tensor:
    """A grammar's bit mask as bool [vocab_size] on the CPU."""
    bits = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), count=vocab_size, bitorder="little")
    return torch.from_numpy(bits).bool()
