"""Speculation on and off, alone and in company, preempted or not: the same tokens."""

from __future__ import annotations

import random

import pytest

from specinfer.sampling import SamplingParams
from tests.kit.table_models import random_drafter
from tests.kit.verify_driver import Job, decode, decode_all, decode_rounds, running, table_engine

SAMPLINGS = {
    "greedy": SamplingParams(temperature=0.0),
    "plain": SamplingParams(seed=1),
    "hot": SamplingParams(temperature=1.7, seed=2),
    "top-p": SamplingParams(temperature=0.8, top_p=0.7, seed=3),
    "top-k": SamplingParams(top_k=2, seed=4),
    "min-p": SamplingParams(min_p=0.2, seed=5),
    "greedy penalties": SamplingParams(
        temperature=0.0, repetition_penalty=1.4, frequency_penalty=0.5
    ),
    "penalties": SamplingParams(
        repetition_penalty=1.3, presence_penalty=0.8, frequency_penalty=0.4, seed=6
    ),
    "bias": SamplingParams(logit_bias={0: -3.0, 2: 1.5}, seed=7),
}
VOCAB = 5


def make_jobs(num_jobs: int, *, seed: int, max_tokens: int = 40) -> list[Job]:
    rng = random.Random(seed)
    samplings = list(SAMPLINGS.values())
    return [
        Job(
            prompt=tuple(rng.randrange(VOCAB) for _ in range(rng.randrange(1, 60))),
            sampling=samplings[index % len(samplings)],
            num_tokens=rng.randrange(5, max_tokens),
        )
        for index in range(num_jobs)
    ]


def plain_outputs(jobs: list[Job]) -> list[list[int]]:
    """What each job gives alone, one token a round, in a pool of its own."""
    outputs = []
    for job in jobs:
        engine, _, _ = table_engine(VOCAB)
        with running(engine):
            outputs.append(decode(engine, "alone", job))
    return outputs


def drafted(jobs: list[Job], outputs: list[list[int]], seed: int) -> list[Job]:
    """The same jobs with drafters that are often right."""
    return [
        Job(
            job.prompt,
            job.sampling,
            job.num_tokens,
            random_drafter(random.Random(seed + index), VOCAB, known=[*job.prompt, *output]),
        )
        for index, (job, output) in enumerate(zip(jobs, outputs, strict=True))
    ]


@pytest.mark.parametrize("name", SAMPLINGS)
def test_speculation_changes_no_token(name: str) -> None:
    engine, _, blocks = table_engine(VOCAB)
    with running(engine):
        for seed in range(4):
            job = Job((1, 2, 3, seed), SAMPLINGS[name], 60)
            plain = decode(engine, "plain", job)
            (speculated,) = drafted([job], [plain], seed)
            tokens, rounds = decode_rounds(engine, "speculated", speculated)
            assert tokens == plain
            assert len(rounds) < 45, "the drafter is right so often that rounds are saved"
        assert blocks.num_free_blocks == blocks.num_blocks


def test_sixteen_sessions_at_once_give_what_each_gives_alone() -> None:
    jobs = make_jobs(16, seed=11)
    outputs = plain_outputs(jobs)
    engine, runner, blocks = table_engine(VOCAB, num_blocks=512)
    with running(engine):
        assert decode_all(engine, drafted(jobs, outputs, seed=5)) == outputs
    assert max(runner.num_rows) > 20, "sessions shared passes"
    assert blocks.num_free_blocks == blocks.num_blocks


def test_preempted_sessions_are_computed_again_and_lose_nothing() -> None:
    jobs = make_jobs(8, seed=12)
    outputs = plain_outputs(jobs)
    engine, _, blocks = table_engine(VOCAB, num_blocks=40, max_tree_nodes=16)
    with running(engine):
        assert decode_all(engine, drafted(jobs, outputs, seed=6)) == outputs
        assert engine.num_preemptions > 0
    assert blocks.num_free_blocks == blocks.num_blocks


def test_a_prompt_in_chunks_gives_what_it_gives_at_once() -> None:
    job = Job(tuple(index % VOCAB for index in range(90)), SAMPLINGS["plain"], 20)
    outputs = []
    for rows in (128, 16, 5):
        engine, runner, _ = table_engine(
            VOCAB, max_rows=rows, min_prefill_rows=5, max_tree_nodes=min(rows, 8)
        )
        with running(engine):
            outputs.append(decode(engine, "a", job))
        assert max(runner.num_rows) <= rows
    assert outputs[0] == outputs[1] == outputs[2]


def test_a_cached_prefix_changes_no_token() -> None:
    prompt = tuple(index % 4 for index in range(41))
    job = Job(prompt, SAMPLINGS["penalties"], 20)
    engine, runner, _ = table_engine(VOCAB)
    with running(engine):
        first, rounds = decode_rounds(engine, "first", job)
        rows = sum(runner.num_rows)
        second, again = decode_rounds(engine, "second", job)
        other = decode(engine, "other", Job((*prompt[:30], 4, 4), job.sampling, 20))
    assert first == second
    assert rounds[0].num_cached_tokens == 0
    assert again[0].num_cached_tokens == 40
    assert sum(runner.num_rows) - rows < rows + 20
    fresh, _, _ = table_engine(VOCAB)
    with running(fresh):
        assert decode(fresh, "a", Job((*prompt[:30], 4, 4), job.sampling, 20)) == other


def test_two_sessions_share_a_prompt_that_ends_with_a_block() -> None:
    prompt = tuple(index % 3 for index in range(40))
    jobs = [Job(prompt, SamplingParams(seed=seed), 30) for seed in range(4)]
    outputs = plain_outputs(jobs)
    engine, _, blocks = table_engine(VOCAB, block_size=8)
    with running(engine):
        decode(engine, "warm", jobs[0])
        assert decode_all(engine, drafted(jobs, outputs, seed=7)) == outputs
    assert blocks.num_free_blocks == blocks.num_blocks


def test_a_session_resumed_on_another_worker_goes_on_with_the_same_tokens() -> None:
    job = Job((1, 2, 3), SAMPLINGS["penalties"], 40)
    (plain,) = plain_outputs([job])
    engine, _, _ = table_engine(VOCAB)
    with running(engine):
        tokens = [*job.prompt, *plain[:17]]
        draft = random_drafter(random.Random(1), VOCAB, known=[*job.prompt, *plain])
        engine.open("a", 9, tokens, job.sampling, 3)
        epoch = 9
        while len(tokens) < 43:
            result = engine.step("a", epoch, draft(tokens)).result(60)
            tokens += result.token_ids
            epoch = result.epoch
    assert tokens[3:43] == plain
