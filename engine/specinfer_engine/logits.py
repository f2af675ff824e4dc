"""The one pipeline from raw logits to the law that a token is drawn from, and logprobs.

Order (algorithms.md 1.5): penalties, bias, temperature, top-k, top-p, min-p. What follows the bias
is the kernels' `law_of`, by which a device draws too. Every function takes one row, float32 or
float64 [vocab_size], so what a row becomes cannot depend on other rows; none changes its input.
This module knows nothing of trees, sessions or noise: the caller says which tokens stand before the
row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from specinfer.errors import InternalError
from specinfer.messages import TokenLogprob
from specinfer.sampling import SamplingParams
from specinfer_kernels.reference_law import law_of


def process_logits(
    row: Tensor,
    params: SamplingParams,
    prompt_ids: Sequence[int] = (),
    output_ids: Sequence[int] = (),
) -> Tensor:
    """Logits of the law that `params` asks for after the given tokens.

    Args:
        row: raw logits, float32 or float64 [vocab_size].
        params: with temperature 0 the cuts are skipped, as they never move the best token.
        prompt_ids: tokens of the prompt; only penalties look at them.
        output_ids: all later tokens up to the row's own, those of its tree path included.

    Returns:
        A row of the same shape and dtype; -inf for tokens that cannot be drawn.

    Raises:
        InternalError: when a cut would hide a NaN of the row.
    """
    if params.penalised:
        row = penalise(row, params, prompt_ids, output_ids)
    if params.logit_bias:
        row = add_bias(row, params.logit_bias)
    if params.greedy:
        return row
    if (params.top_k > 0 or params.top_p < 1.0) and bool(row.max().isnan()):
        raise InternalError("the model made a NaN")
    return law_of(row, params.temperature, params.top_k, params.top_p, params.min_p)


def penalise(
    row: Tensor, params: SamplingParams, prompt_ids: Sequence[int], output_ids: Sequence[int]
) -> Tensor:
    """Repetition over prompt and output as transformers does it, the others as OpenAI's API does.

    repetition: logit / r where the logit is positive, logit * r elsewhere (CTRL, section 4.1);
    presence and frequency: logit - presence * [count > 0] - frequency * count, output only.
    """
    vocab_size = row.shape[0]
    output = torch.tensor(output_ids, dtype=torch.int64, device=row.device)
    counts = torch.bincount(output, minlength=vocab_size)
    if params.repetition_penalty != 1.0:
        prompt = torch.tensor(prompt_ids, dtype=torch.int64, device=row.device)
        seen = (counts + torch.bincount(prompt, minlength=vocab_size)) > 0
        factor = params.repetition_penalty
        row = torch.where(seen, torch.where(row > 0, row / factor, row * factor), row)
    if params.presence_penalty != 0.0:
        row = row - params.presence_penalty * (counts > 0).to(row.dtype)
    if params.frequency_penalty != 0.0:
        row = row - params.frequency_penalty * counts.to(row.dtype)
    return row


def add_bias(row: Tensor, logit_bias: Mapping[int, float]) -> Tensor:
    """Add each token's bias to its logit."""
    token_ids = torch.tensor(list(logit_bias), dtype=torch.int64, device=row.device)
    biases = torch.tensor(list(logit_bias.values()), dtype=row.dtype, device=row.device)
    return row.index_add(0, token_ids, biases)


def token_logprob(row: Tensor, token_id: int, num_top: int) -> TokenLogprob:
    """Log probability of a token under the target's own law, before penalties and temperature.

    Args:
        row: raw logits, float32 or float64 [vocab_size].
        token_id: the token drawn.
        num_top: how many of the most probable tokens to name; of equal ones the lower ids.
    """
    logprobs = torch.log_softmax(row.double(), 0)
    own = logprobs[token_id : token_id + 1]
    if num_top == 0:
        return TokenLogprob(token_id, float(own), ())
    best = torch.sort(logprobs, descending=True, stable=True)
    # One copy leaves a GPU; float64 holds a token id exactly.
    found = torch.cat((own, best.values[:num_top], best.indices[:num_top].double())).tolist()
    values = found[1 : 1 + len(found) // 2]
    token_ids = (int(number) for number in found[1 + len(values) :])
    return TokenLogprob(token_id, found[0], tuple(zip(token_ids, values, strict=True)))
