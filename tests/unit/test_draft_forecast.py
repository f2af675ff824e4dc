"""Forecasts of the target's draws against the target's own pipeline."""

from __future__ import annotations

import math

import pytest
import torch

from specinfer.errors import InvalidRequest
from specinfer.sampling import SamplingParams
from specinfer_draft.drafters import forecast
from specinfer_draft.drafters.forecast import DrawForecast, NoiseCache, rank
from specinfer_engine.acceptance import draw_token
from specinfer_engine.logits import process_logits
from specinfer_kernels import gumbel_noise

VOCAB = 300
PROMPT = [5, 6, 7, 5, 8]
OUTPUT = [9, 9, 10]
PATHS = [[], [9], [9, 11], [12, 12]]
DEPTHS = [0, 1, 2, 2]

SAMPLINGS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.0, seed=1),
    SamplingParams(temperature=0.7, seed=2**62),
    SamplingParams(temperature=1.3, top_k=7, seed=3),
    SamplingParams(temperature=0.9, top_p=0.6, seed=4),
    SamplingParams(temperature=2.0, min_p=0.05, seed=5),
    SamplingParams(temperature=0.8, top_k=40, top_p=0.9, min_p=0.01, seed=6),
    SamplingParams(temperature=1.0, repetition_penalty=1.7, seed=7),
    SamplingParams(temperature=0.0, presence_penalty=1.5, frequency_penalty=0.8),
    SamplingParams(temperature=1.0, logit_bias={3: 4.0, 200: -50.0}, seed=8),
]


def logits(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(PATHS), VOCAB, generator=generator) * 3.0


def forecast_of(sampling: SamplingParams) -> DrawForecast:
    forecast = DrawForecast(sampling, VOCAB, len(PROMPT))
    forecast.begin(PROMPT + OUTPUT)
    return forecast


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=range(len(SAMPLINGS)))
@pytest.mark.parametrize("seed", range(5))
def test_with_the_targets_logits_the_best_forecast_is_the_targets_draw(
    sampling: SamplingParams, seed: int
) -> None:
    rows = logits(seed)
    positions = [len(PROMPT + OUTPUT) + depth for depth in DEPTHS]
    z = forecast_of(sampling).forecast(rows, PATHS, positions)
    best = [candidates.token_ids[0] for candidates in rank(z, 1, 1.0)]
    for row, path, position, token_id in zip(rows, PATHS, positions, best, strict=True):
        law = process_logits(row, sampling, PROMPT, OUTPUT + path)
        assert token_id == draw_token(law, sampling.seed, position, greedy=sampling.greedy)
        allowed = set(torch.nonzero(law > -math.inf).flatten().tolist())
        assert set(torch.nonzero(z[PATHS.index(path)] > -math.inf).flatten().tolist()) == allowed


def test_another_position_has_another_draw() -> None:
    """Negative control: the noise of the wrong position forecasts something else."""
    rows = torch.zeros(1, VOCAB)
    forecast = forecast_of(SamplingParams(seed=9))
    draws = [rank(forecast.forecast(rows, [[]], [t]), 1, 1.0)[0].token_ids[0] for t in range(8, 28)]
    assert len(set(draws)) > 15


def test_siblings_share_their_noise_and_depths_do_not() -> None:
    rows = torch.zeros(3, VOCAB)
    z = forecast_of(SamplingParams(seed=9)).forecast(rows, [[], [], []], [8, 9, 9])
    assert torch.equal(z[1], z[2])
    assert not torch.equal(z[0], z[1])
    seeds, positions = torch.tensor([9, 9]), torch.tensor([8, 9])
    assert torch.equal(z[:2], gumbel_noise(seeds, positions, VOCAB).float())


def test_noise_is_bounded_over_all_sessions_and_stays_the_same() -> None:
    small, large = NoiseCache(VOCAB, max_bytes=4 * VOCAB * 3), NoiseCache(VOCAB)
    for seed in range(4):
        sampling = SamplingParams(temperature=0.8, seed=seed)
        for length in range(8, 30, 3):
            positions = [length, length + 1, length]
            bounded = DrawForecast(sampling, VOCAB, 3, noise=small)
            ample = DrawForecast(sampling, VOCAB, 3, noise=large)
            rows = torch.zeros(3, VOCAB)
            assert torch.equal(
                bounded.forecast(rows, [[], [2], []], positions),
                ample.forecast(rows, [[], [2], []], positions),
            )
            assert len(small) <= 3
    assert len(large) > 3


def test_noise_of_a_text_that_goes_on_is_made_for_several_positions_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[list[int]] = []

    def noise(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
        made.append(positions.tolist())
        return gumbel_noise(seeds, positions, vocab_size)

    monkeypatch.setattr(forecast, "gumbel_noise", noise)
    sampling, seeds = SamplingParams(temperature=0.8, seed=1), torch.tensor([1])
    cache = NoiseCache(VOCAB)
    for position in (9, 10, 16, 17, 12):
        (alone,) = gumbel_noise(seeds, torch.tensor([position]), VOCAB)
        found = cache.scaled(sampling, [position])[position]
        assert torch.equal(found, (alone * sampling.temperature).float())
    assert made == [[*range(9, 17)], [*range(17, 25)]]
    # What is known already is not made again, and of many tokens nothing is made ahead.
    cache.scaled(sampling, [7])
    assert made[-1] == [7, 8]
    NoiseCache(forecast.SMALL_VOCABULARY + 1).scaled(sampling, [9])
    assert made[-1] == [9]


def test_sessions_that_differ_in_seed_or_temperature_share_no_noise() -> None:
    cache = NoiseCache(VOCAB)
    rows = [
        DrawForecast(sampling, VOCAB, 3, noise=cache).forecast(torch.zeros(1, VOCAB), [[]], [9])
        for sampling in (
            SamplingParams(temperature=0.8, seed=1),
            SamplingParams(temperature=0.8, seed=2),
            SamplingParams(temperature=0.9, seed=1),
        )
    ]
    assert not torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


def test_greedy_scores_are_the_drafters_own_log_probabilities() -> None:
    rows = logits(0)
    z = forecast_of(SamplingParams(temperature=0.0)).forecast(rows, PATHS, [8, 9, 10, 10])
    expected = torch.log_softmax(rows, 1)
    for row, candidates in enumerate(rank(z, 5, 1.0)):
        assert list(candidates.log_scores) == sorted(candidates.log_scores, reverse=True)
        for token_id, score in zip(candidates.token_ids, candidates.log_scores, strict=True):
            assert score == pytest.approx(float(expected[row, token_id]), abs=1e-5)


def test_scores_are_the_chances_of_being_picked_when_models_differ_by_gumbel_noise() -> None:
    """The statement of the module's docstring, by simulation: 20,000 targets near one drafter."""
    spread, num_trials = 0.7, 20_000
    drafter = torch.tensor([[1.0, 0.4, 0.0, -1.0]])
    sampling = SamplingParams(temperature=0.8, seed=3)
    z = DrawForecast(sampling, 4, 1).forecast(drafter, [[]], [17])
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(num_trials, 4, generator=generator, dtype=torch.float64)
    targets = drafter - spread * torch.log(-torch.log(uniform))
    noise = gumbel_noise(torch.tensor([3]), torch.tensor([17]), 4)
    picks = (targets / sampling.temperature + noise).argmax(1)
    share = torch.bincount(picks, minlength=4) / num_trials
    candidates = rank(z, 4, spread)[0]
    for token_id, score in zip(candidates.token_ids, candidates.log_scores, strict=True):
        # Four standard deviations of a share of 20,000 trials are at most 0.0142.
        assert math.exp(score) == pytest.approx(float(share[token_id]), abs=0.0142)


def test_a_bias_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        DrawForecast(SamplingParams(logit_bias={VOCAB: 1.0}), VOCAB, 1)
    assert caught.value.field == "logit_bias"


def test_top_p_keeps_what_the_target_keeps_of_a_flat_law() -> None:
    """The best 256 of 1,000 tokens hold too little here, so all of them have to be looked at."""
    rows = torch.linspace(0.0, 1.0, 1000)[None]
    sampling = SamplingParams(temperature=1.0, top_p=0.9)
    z = DrawForecast(sampling, 1000, 1).forecast(rows, [[]], [1])
    law = process_logits(rows[0], sampling)
    kept = torch.nonzero(z[0] > -math.inf).flatten().tolist()
    expected = torch.nonzero(law > -math.inf).flatten().tolist()
    assert 256 < len(kept) < 1000
    # Sums of float32 and float64 may part on the token at the edge.
    assert abs(len(kept) - len(expected)) <= 1
