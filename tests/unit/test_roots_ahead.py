"""Roots computed before they are asked for: when, for whom, and never with another token."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pytest
from prometheus_client import CollectorRegistry

from specinfer.errors import InvalidTree, SpecinferError
from specinfer.messages import StepCost, VerifyResult
from specinfer.metrics import VerifyMetrics
from specinfer.sampling import SamplingParams
from specinfer.step_curve import StepCurve
from specinfer.tree import TokenTree
from specinfer_verify.engine import VerifyEngine
from specinfer_verify.roots_ahead import cheap_rows
from specinfer_verify.session import Session
from tests.kit.fake_workers import info_of
from tests.kit.table_models import Draft, TableRunner, greedy_output, random_drafter
from tests.kit.verify_driver import (
    TIMEOUT,
    Job,
    decode,
    decode_all,
    decode_rounds,
    running,
    table_engine,
)
from tests.kit.waiting import until

GREEDY = SamplingParams(temperature=0.0)
VOCAB = 5
PROMPT: tuple[int, ...] = (1, 2, 3)


class Ahead(NamedTuple):
    """Session "a" four plain steps on, its next root computed; its tokens so far."""

    engine: VerifyEngine
    runner: TableRunner
    tokens: list[int]


@pytest.fixture
def counted() -> Iterator[tuple[VerifyEngine, TableRunner]]:
    engine, runner, _ = table_engine(roots_ahead=True)
    with running(engine):
        yield engine, runner


def ask(engine: VerifyEngine, epoch: int, *token_ids: int) -> VerifyResult:
    return engine.step("a", epoch, TokenTree.chain(token_ids)).result(TIMEOUT)


def decode_plainly(engine: VerifyEngine, num_rounds: int) -> list[int]:
    """Open session "a" and decode; its tokens."""
    tokens: list[int] = [*PROMPT]
    engine.open("a", 0, PROMPT, GREEDY, len(PROMPT)).result(TIMEOUT)
    for epoch in range(num_rounds):
        tokens += ask(engine, epoch, tokens[-1]).token_ids
    return tokens


def right_tokens(num_tokens: int) -> list[int]:
    """Prompt and output of the greedy table model."""
    return [*PROMPT, *greedy_output(PROMPT, num_tokens, VOCAB)]


def until_ahead(runner: TableRunner, num_asked: int, num_ahead: int = 1) -> None:
    """Wait until so many rows were computed below the prompt, the unasked ones among them."""
    rows = len(PROMPT) - 1 + num_asked + num_ahead
    asyncio.run(until(lambda: sum(runner.num_rows) == rows, f"{rows} rows computed"))


@pytest.fixture
def ahead(counted: tuple[VerifyEngine, TableRunner]) -> Ahead:
    engine, runner = counted
    tokens = decode_plainly(engine, 4)
    until_ahead(runner, 4)
    return Ahead(engine, runner, tokens)


def test_after_two_plain_steps_the_next_root_is_there_before_it_is_asked_for(
    counted: tuple[VerifyEngine, TableRunner],
) -> None:
    engine, runner = counted
    tokens = decode_plainly(engine, 1)
    until_ahead(runner, 1, 0)
    tokens += ask(engine, 1, tokens[-1]).token_ids
    until_ahead(runner, 2)
    tokens += ask(engine, 2, tokens[-1]).token_ids
    until_ahead(runner, 3)
    assert runner.num_rows[-3:] == [1, 1, 1]
    assert tokens == right_tokens(3)


def test_those_that_were_asked_for_are_counted() -> None:
    registry = CollectorRegistry()
    engine, runner, _ = table_engine(roots_ahead=True)
    engine.count_with(VerifyMetrics(registry, info_of("verify")))
    with running(engine):
        tokens = decode_plainly(engine, 2)
        until_ahead(runner, 2)
        tokens += ask(engine, 2, tokens[-1]).token_ids
        until_ahead(runner, 3)
        ask(engine, 3, *right_tokens(8)[len(tokens) - 1 :])
    samples = [sample for family in registry.collect() for sample in family.samples]
    found = {sample.name: sample.value for sample in samples}
    assert found["specinfer_roots_ahead_total"] == 2
    assert found["specinfer_roots_ahead_used_total"] == 1


def test_a_tree_that_comes_takes_the_unasked_step_back(ahead: Ahead) -> None:
    engine, runner, tokens = ahead
    right = right_tokens(10)
    result = ask(engine, 4, *right[len(tokens) - 1 : len(tokens) + 4])
    assert result.accepted == (1, 2, 3, 4)
    assert [*tokens, *result.token_ids] == right_tokens(9)
    assert runner.num_rows[-1] == 5, "after guesses none is expected"


def test_a_repeated_step_gets_its_own_answer_and_not_the_next_one(ahead: Ahead) -> None:
    engine, _, tokens = ahead
    again = ask(engine, 3, tokens[-2])
    assert (again.epoch, again.token_ids) == (4, (tokens[-1],))
    assert tokens + list(ask(engine, 4, tokens[-1]).token_ids) == right_tokens(5)


def test_opening_again_forgets_the_unasked_step(ahead: Ahead) -> None:
    engine, _, tokens = ahead
    engine.open("a", 4, tokens, GREEDY, len(PROMPT)).result(TIMEOUT)
    assert tokens + list(ask(engine, 4, tokens[-1]).token_ids) == right_tokens(5)


def test_a_wrong_root_is_refused_as_ever(ahead: Ahead) -> None:
    engine, _, tokens = ahead
    wrong = engine.step("a", 4, TokenTree.root_only((tokens[-1] + 1) % VOCAB))
    assert isinstance(wrong.exception(TIMEOUT), InvalidTree)
    assert tokens + list(ask(engine, 4, tokens[-1]).token_ids) == right_tokens(5)


def test_nothing_is_computed_below_the_end_of_a_text() -> None:
    right = right_tokens(8)
    end = next(token for token in right[len(PROMPT) + 3 :] if token not in right[len(PROMPT) :][:2])
    num_rounds = right.index(end, len(PROMPT)) - len(PROMPT) + 1
    engine, runner, _ = table_engine(roots_ahead=True, end_token_ids=(end,))
    with running(engine):
        assert decode_plainly(engine, num_rounds)[-1] == end
        # Another session's step shows that the engine had time for the first one's root.
        engine.open("b", 0, (1,), GREEDY, 1).result(TIMEOUT)
        engine.step("b", 0, TokenTree.root_only(1)).result(TIMEOUT)
    assert sum(runner.num_rows) == len(PROMPT) - 1 + num_rounds + 1


def test_a_session_at_its_full_length_has_no_root_ahead() -> None:
    engine, _, _ = table_engine(roots_ahead=True, max_model_len=8)
    with running(engine):
        tokens = decode_plainly(engine, 5)
        assert isinstance(
            engine.step("a", 5, TokenTree.root_only(tokens[-1])).exception(TIMEOUT), SpecinferError
        )
    assert tokens == right_tokens(5)


def moody(rng: random.Random, known: Sequence[int]) -> Draft:
    """Guesses for a while and then none for a while."""
    guessing = random_drafter(rng, VOCAB, known=known)

    def draft(token_ids: Sequence[int]) -> TokenTree:
        if len(token_ids) // 7 % 2:
            return guessing(token_ids)
        return TokenTree.root_only(token_ids[-1])

    return draft


def moody_jobs() -> tuple[list[Job], list[list[int]]]:
    """Jobs of several laws, with what each gives alone without roots ahead."""
    rng = random.Random(5)
    laws = [GREEDY, SamplingParams(seed=3), SamplingParams(repetition_penalty=1.3, seed=4)]
    jobs, outputs = [], []
    for index in range(12):
        prompt = tuple(rng.randrange(VOCAB) for _ in range(rng.randrange(1, 40)))
        plain = Job(prompt, laws[index % len(laws)], 40)
        engine, _, _ = table_engine(VOCAB)
        with running(engine):
            outputs.append(decode(engine, "alone", plain))
        draft = moody(random.Random(index), (*prompt, *outputs[-1]))
        jobs.append(Job(prompt, plain.sampling, 40, draft))
    return jobs, outputs


@pytest.mark.parametrize("num_blocks", [256, 40])
def test_no_token_changes_in_company_or_preempted(num_blocks: int) -> None:
    jobs, outputs = moody_jobs()
    engine, _, blocks = table_engine(
        VOCAB, num_blocks=num_blocks, roots_ahead=True, yield_seconds=0.0
    )
    with running(engine):
        assert decode_all(engine, jobs) == outputs
        assert blocks.num_free_blocks == blocks.num_blocks


def test_logprobs_are_those_of_a_step_that_was_asked_for() -> None:
    job = Job(PROMPT, SamplingParams(seed=9), 12)
    found = []
    for roots_ahead in (False, True):
        engine, _, _ = table_engine(VOCAB, roots_ahead=roots_ahead)
        with running(engine):
            _, results = decode_rounds(engine, "a", job, num_logprobs=2)
            found.append([result.logprobs for result in results])
    assert found[0] == found[1]
    assert all(found[0])


def test_negative_control_a_step_that_is_not_taken_back(
    ahead: Ahead, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forget(session: Session) -> None:
        session.ahead = None

    monkeypatch.setattr(Session, "take_back", forget)
    engine, _, tokens = ahead
    guesses = engine.step("a", 4, TokenTree.chain(right_tokens(8)[len(tokens) - 1 :]))
    wrong = guesses.exception(TIMEOUT) or guesses.result().token_ids != tuple(right_tokens(9)[7:])
    assert wrong


def test_so_many_rows_go_along_as_are_cheap() -> None:
    flat_to_eight = StepCurve([StepCost(1, 0, 0.01), StepCost(8, 0, 0.01), StepCost(16, 0, 0.02)])
    assert cheap_rows(flat_to_eight, 256) == 10
    assert cheap_rows(flat_to_eight, 4) == 4
    assert cheap_rows(StepCurve([StepCost(1, 0, 0.01), StepCost(64, 0, 0.64)]), 256) == 1
