"""More sessions than places or blocks: everybody's turn comes, and nobody's tokens change."""

from __future__ import annotations

import pytest

from specinfer.errors import NotFound, ResourceExhausted
from specinfer.sampling import SamplingParams
from specinfer_verify.engine import VerifyEngine
from tests.kit.table_models import draft_nothing
from tests.kit.verify_driver import TIMEOUT, Job, decode, decode_all, running, table_engine

VOCAB = 4
PROMPT_LENGTH = 240
GREEDY = SamplingParams(temperature=0.0)


def job_of(seed: int, num_tokens: int) -> Job:
    prompt = tuple((index * (seed + 1) + seed) % VOCAB for index in range(PROMPT_LENGTH))
    return Job(prompt, SamplingParams(temperature=0.9, seed=seed), num_tokens)


def crowded_engine(starve_seconds: float) -> VerifyEngine:
    """A pool of 440 tokens: one session of these tests fits, two do not; none counts as idle."""
    engine, _, _ = table_engine(
        VOCAB,
        num_blocks=110,
        max_model_len=430,
        yield_seconds=600.0,
        starve_seconds=starve_seconds,
    )
    return engine


def solo(job: Job) -> list[int]:
    engine, _, _ = table_engine(VOCAB, num_blocks=110, max_model_len=430)
    with running(engine):
        return decode(engine, "solo", job)


def old_rounds_before_the_young_one(engine: VerifyEngine, old: Job, young: Job) -> int:
    """Rounds of an older session that keeps stepping until a younger one's first is answered.

    All that either of them says has to be what it says alone.
    """
    tokens = {"old": list(old.prompt), "young": list(young.prompt)}

    def step(name: str, epoch: int) -> None:
        result = engine.step(name, epoch, draft_nothing(tokens[name])).result(TIMEOUT)
        tokens[name] += result.token_ids

    with running(engine):
        engine.open("old", 0, old.prompt, old.sampling, PROMPT_LENGTH).result(TIMEOUT)
        step("old", 0)
        engine.open("young", 0, young.prompt, young.sampling, PROMPT_LENGTH).result(TIMEOUT)
        waiting = engine.step("young", 0, draft_nothing(young.prompt))
        num_rounds = 1
        while not waiting.done() and num_rounds < old.num_tokens:
            step("old", num_rounds)
            num_rounds += 1
        if waiting.done():
            for epoch in range(young.num_tokens):
                step("young", epoch)
            assert tokens["young"][PROMPT_LENGTH:] == solo(young)
        for epoch in range(num_rounds, old.num_tokens):
            step("old", epoch)
        assert tokens["old"][PROMPT_LENGTH:] == solo(old)
        if not waiting.done():
            engine.close("old").result(TIMEOUT)
            assert waiting.result(TIMEOUT).epoch == 1
    return num_rounds


def test_a_younger_session_gets_its_turn_beside_an_older_one_that_keeps_stepping() -> None:
    engine = crowded_engine(starve_seconds=0.02)
    assert old_rounds_before_the_young_one(engine, job_of(1, 150), job_of(2, 8)) < 150
    assert engine.num_preemptions >= 2, "the older one got its blocks back"


def test_without_a_bound_the_younger_one_waits_for_the_end_of_the_other() -> None:
    engine = crowded_engine(starve_seconds=600.0)
    assert old_rounds_before_the_young_one(engine, job_of(1, 60), job_of(2, 8)) == 60


def test_many_that_do_not_fit_together_all_end_with_their_own_tokens() -> None:
    jobs = [job_of(seed, 60 + seed) for seed in range(5)]
    expected = [solo(job) for job in jobs]
    engine = crowded_engine(starve_seconds=0.01)
    with running(engine):
        assert decode_all(engine, jobs) == expected
        assert engine.num_preemptions > 0


def test_a_silent_session_makes_place_for_a_new_one_and_an_active_one_does_not() -> None:
    now = [0.0]
    engine, _, blocks = table_engine(max_sessions=2, silent_seconds=10.0, clock=lambda: now[0])
    with running(engine):
        for name in "ab":
            engine.open(name, 0, (1, 2, 3), GREEDY, 3).result(TIMEOUT)
        now[0] = 8.0
        engine.step("b", 0, draft_nothing((1, 2, 3))).result(TIMEOUT)
        with pytest.raises(ResourceExhausted):
            engine.open("c", 0, (1, 2, 3), GREEDY, 3).result(TIMEOUT)
        now[0] = 11.0
        engine.open("c", 0, (1, 2, 3), GREEDY, 3).result(TIMEOUT)
        with pytest.raises(NotFound):
            engine.step("a", 0, draft_nothing((1, 2, 3))).result(TIMEOUT)
        with pytest.raises(ResourceExhausted):
            engine.open("d", 0, (1, 2, 3), GREEDY, 3).result(TIMEOUT)
        for name in "bc":
            engine.close(name).result(TIMEOUT)
        assert blocks.num_free_blocks == blocks.num_blocks
