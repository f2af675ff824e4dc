"""The logits pipeline: each stage against its definition, the order, and rows on their own."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specinfer.errors import InternalError
from specinfer.sampling import SamplingParams
from specinfer_engine.logits import process_logits, token_logprob
from specinfer_kernels.reference_law import keep_min_p, keep_top_k, keep_top_p

VOCAB = 50


def random_row(seed: int, vocab_size: int = VOCAB) -> torch.Tensor:
    return torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def kept(row: torch.Tensor) -> list[int]:
    return torch.nonzero(row > -math.inf).flatten().tolist()


@pytest.mark.parametrize("seed", range(20))
def test_cuts_agree_with_transformers(seed: int) -> None:
    row, rng = random_row(seed), random.Random(seed)
    temperature, top_k = rng.uniform(0.3, 2.0), rng.randrange(1, VOCAB)
    top_p, min_p = rng.uniform(0.05, 0.99), rng.uniform(0.01, 0.5)
    penalty = rng.uniform(0.5, 2.0)
    seen = [rng.randrange(VOCAB) for _ in range(12)]
    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=penalty,
    )
    expected, history = row[None], torch.tensor([seen])
    stages: tuple[Any, ...] = (
        RepetitionPenaltyLogitsProcessor(penalty),
        TemperatureLogitsWarper(temperature),
        TopKLogitsWarper(top_k),
        TopPLogitsWarper(top_p),
        MinPLogitsWarper(min_p),
    )
    for stage in stages:
        expected = stage(history, expected)
    actual = process_logits(row, params, seen[:5], seen[5:])
    assert kept(actual) == kept(expected[0])
    torch.testing.assert_close(actual, expected[0])


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass() -> None:
    row = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64).log()
    assert kept(keep_top_p(row, 0.5)) == [0]
    assert kept(keep_top_p(row, 0.51)) == [0, 1]
    assert kept(keep_top_p(row, 0.76)) == [0, 1, 2], "of equal tokens the lower id comes first"
    assert kept(keep_top_p(row, 1e-9)) == [0], "at least one token"


def test_top_p_is_the_descending_rule_whatever_the_order() -> None:
    for seed in range(50):
        row, top_p = random_row(seed), random.Random(seed).uniform(0.1, 0.95)
        probabilities = row.double().softmax(0)
        chosen = kept(keep_top_p(row, top_p))
        mass = float(probabilities[chosen].sum())
        rest = [token_id for token_id in range(VOCAB) if token_id not in chosen]
        assert mass >= top_p - 1e-12
        assert mass - float(probabilities[chosen].min()) < top_p, "one token less is too little"
        assert probabilities[chosen].min() >= probabilities[rest].max()


def test_top_k_breaks_ties_by_the_lower_id() -> None:
    row = torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0])
    assert kept(keep_top_k(row, 2)) == [1, 2]
    assert kept(keep_top_k(row, 4)) == [0, 1, 2, 3]
    assert kept(process_logits(row, SamplingParams(top_k=9))) == [0, 1, 2, 3, 4]


def test_min_p_is_relative_to_the_best_token() -> None:
    row = torch.tensor([0.6, 0.3, 0.1]).log()
    assert kept(keep_min_p(row, 0.49)) == [0, 1]
    assert kept(keep_min_p(row, 0.51)) == [0]


def test_a_cut_hides_no_nan() -> None:
    row = torch.tensor([0.0, math.nan, 1.0])
    for params in (SamplingParams(top_k=1), SamplingParams(top_p=0.5)):
        with pytest.raises(InternalError, match="NaN"):
            process_logits(row, params)
    assert process_logits(row, SamplingParams(min_p=0.1)).isnan().any(), "the draw refuses it"


def test_top_p_counts_tokens_that_tie_with_the_best_exactly() -> None:
    for count in (3, 5, 7, 10, 100):
        row = torch.zeros(count)
        assert len(kept(keep_top_p(row, (count - 1) / count))) == count - 1


def test_presence_and_frequency_look_at_the_output_alone() -> None:
    row = torch.zeros(4)
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    assert process_logits(row, params, [0, 0], [1, 1, 2]).tolist() == [0.0, -1.0, -0.75, 0.0]


def test_repetition_looks_at_the_prompt_too_and_at_the_sign() -> None:
    row = torch.tensor([2.0, -2.0, 2.0, -2.0])
    params = SamplingParams(repetition_penalty=2.0)
    assert process_logits(row, params, [0], [1]).tolist() == [1.0, -4.0, 2.0, -2.0]


def test_the_order_of_stages() -> None:
    # Penalty (2 -> 1), then bias (1 + 3), then temperature (4 / 2): no other order gives 2.
    params = SamplingParams(temperature=2.0, repetition_penalty=2.0, logit_bias={0: 3.0})
    assert process_logits(torch.tensor([2.0, 0.0]), params, [0]).tolist() == [2.0, 0.0]
    # Bias comes before the cuts, so it can bring a token back.
    params = SamplingParams(top_k=1, logit_bias={1: 5.0})
    assert kept(process_logits(torch.tensor([2.0, 0.0]), params)) == [1]
    # Temperature comes before top-p: a hot law needs more tokens for the same mass.
    row = torch.tensor([2.0, 1.0, 0.0])
    assert len(kept(process_logits(row, SamplingParams(top_p=0.6)))) == 1
    assert len(kept(process_logits(row, SamplingParams(top_p=0.6, temperature=3.0)))) == 2


def test_greedy_skips_the_cuts_and_keeps_penalties_and_bias() -> None:
    row = torch.tensor([2.0, 1.5, 0.0])
    params = SamplingParams(temperature=0.0, top_k=1, frequency_penalty=1.0)
    assert process_logits(row, params, [], [0]).tolist() == [1.0, 1.5, 0.0]


def test_the_input_row_is_never_changed() -> None:
    row = random_row(1)
    before = row.clone()
    params = SamplingParams(
        temperature=0.5,
        top_k=5,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.5,
        presence_penalty=1.0,
        frequency_penalty=1.0,
        logit_bias={3: 1.0},
    )
    process_logits(row, params, [1], [2])
    assert torch.equal(row, before)


def test_a_row_is_the_same_inside_any_tensor() -> None:
    rows = torch.stack([random_row(seed, 997) for seed in range(7)])
    params = SamplingParams(temperature=0.7, top_p=0.9, repetition_penalty=1.2)
    for index in range(7):
        alone = process_logits(rows[index].clone(), params, [1, 2], [3])
        assert torch.equal(process_logits(rows[index], params, [1, 2], [3]), alone)


def test_logprobs_name_the_best_tokens() -> None:
    row = torch.tensor([1.0, 3.0, 3.0, 0.0])
    expected = torch.log_softmax(row.double(), 0)
    logprob = token_logprob(row, 3, 2)
    assert (logprob.token_id, logprob.logprob) == (3, float(expected[3]))
    assert logprob.top == ((1, float(expected[1])), (2, float(expected[2])))
    assert token_logprob(row, 0, 0).top == ()
