"""Grammars in the verify engine: tokens within them, the same with speculation on and off."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

import specinfer_verify.walks
from specinfer.errors import Cancelled, InvalidRequest, SpecinferError
from specinfer.grammar import CompiledGrammar, GrammarState
from specinfer.messages import Grammar
from specinfer.sampling import SamplingParams
from specinfer.tree import TokenTree
from specinfer_engine.grammar import constrain
from specinfer_engine.logits import process_logits, token_logprob
from specinfer_verify.session import Session
from specinfer_verify.walks import Past
from tests.kit.grammars import (
    END_TOKEN_IDS,
    LETTERS,
    letters_compiler,
    matches_to_the_end,
    regex_state,
)
from tests.kit.table_models import TableModel, draft_nothing, random_drafter
from tests.kit.verify_driver import (
    TIMEOUT,
    Job,
    decode,
    decode_all,
    decode_rounds,
    running,
    table_engine,
)
from tests.unit.test_verify_engine_equality import SAMPLINGS

VOCAB = len(LETTERS)
PATTERNS = ("(ab|ba){2,6}a?", "a{3,9}|b(ab)*bb", "(a|b){5,14}", "(aab|b){1,5}")


def job_of(pattern: str, sampling: SamplingParams, *, seed: int = 0, num_tokens: int = 24) -> Job:
    compiled = letters_compiler().compile(Grammar("regex", pattern))
    return Job((1, 2, seed % VOCAB, 3), sampling, num_tokens, grammar=compiled)


def drafted(job: Job, output: list[int], seed: int) -> Job:
    """The same job with a drafter that is often right, and often outside the grammar."""
    known = [*job.prompt, *output]
    return replace(job, draft=random_drafter(random.Random(seed), VOCAB, known=known))


def divergences(pattern: str = PATTERNS[0], num_seeds: int = 8) -> int:
    """Jobs whose tokens differ between speculation on and off, do not match, or fail."""
    found = 0
    engine, _, _ = table_engine(VOCAB)
    with running(engine):
        for seed in range(num_seeds):
            sampling = SamplingParams(temperature=0.8, top_k=3, seed=seed)
            job = job_of(pattern, sampling, seed=seed)
            try:
                plain = decode(engine, f"plain{seed}", job)
                tokens = decode(engine, f"tree{seed}", drafted(job, plain, seed))
                together = decode(engine, f"group{seed}", job, together=5)
            except SpecinferError:
                found += 1
                continue
            found += not tokens == together == plain or not matches_to_the_end(pattern, tokens)
    return found


@pytest.mark.parametrize("name", SAMPLINGS)
def test_speculation_changes_no_token_within_a_grammar(name: str) -> None:
    engine, _, blocks = table_engine(VOCAB)
    with running(engine):
        for seed, pattern in enumerate(PATTERNS):
            job = job_of(pattern, SAMPLINGS[name], seed=seed)
            plain = decode(engine, "plain", job)
            assert matches_to_the_end(pattern, plain), plain
            for trees in range(3):
                assert decode(engine, "tree", drafted(job, plain, 7 * seed + trees)) == plain
        assert blocks.num_free_blocks == blocks.num_blocks


@pytest.mark.parametrize("name", SAMPLINGS)
def test_plain_tokens_that_come_together_are_those_that_come_one_by_one(name: str) -> None:
    engine, _, blocks = table_engine(VOCAB, end_token_ids=END_TOKEN_IDS)
    with running(engine):
        for seed, pattern in enumerate(PATTERNS):
            job = job_of(pattern, SAMPLINGS[name], seed=seed)
            plain = up_to_the_end(decode(engine, "plain", job))
            assert matches_to_the_end(pattern, plain), plain
            text = replace(job, num_tokens=len(plain))
            for together in (2, 3, 8, 16):
                _, results = decode_rounds(engine, "groups", text, together=together)
                groups = [result.token_ids for result in results]
                assert [token for group in groups for token in group] == plain, "and not one more"
                assert all(len(group) == together for group in groups[:-1])
        assert blocks.num_free_blocks == blocks.num_blocks


def up_to_the_end(tokens: Sequence[int]) -> list[int]:
    """Tokens up to their first end token."""
    return [*tokens[: next(n for n, token in enumerate(tokens, 1) if token in END_TOKEN_IDS)]]


def test_sessions_with_and_without_grammars_share_passes() -> None:
    jobs = [job_of(PATTERNS[n % 4], SamplingParams(seed=n), seed=n) for n in range(12)]
    jobs = [job if n % 3 else replace(job, grammar=None) for n, job in enumerate(jobs)]
    outputs = []
    for job in jobs:
        engine, _, _ = table_engine(VOCAB)
        with running(engine):
            outputs.append(decode(engine, "alone", job))
    for num_blocks in (512, 24):
        engine, runner, _ = table_engine(VOCAB, num_blocks=num_blocks, max_tree_nodes=16)
        with running(engine):
            rushed = [drafted(job, output, 3) for job, output in zip(jobs, outputs, strict=True)]
            assert decode_all(engine, rushed) == outputs
            assert engine.num_preemptions > 0 or num_blocks == 512
        assert max(runner.num_rows) > 8, "sessions shared passes"


def test_a_session_taken_over_in_the_middle_goes_on_with_the_same_tokens() -> None:
    job = job_of("(a|b){30}", SamplingParams(temperature=1.3, seed=5), num_tokens=20)
    engine, _, _ = table_engine(VOCAB)
    with running(engine):
        plain = decode(engine, "plain", job)
        assert job.grammar is not None
        tokens, epoch = [*job.prompt, *plain[:7]], 4
        draft = drafted(job, plain, 2).draft
        engine.open("b", epoch, tokens, job.sampling, 4, grammar=job.grammar.start())
        while len(tokens) < 4 + 20:
            result = engine.step("b", epoch, draft(tokens)).result(TIMEOUT)
            tokens += result.token_ids
            epoch = result.epoch
    assert tokens[4:24] == plain


def test_the_law_is_over_the_allowed_tokens_and_logprobs_are_the_models_own() -> None:
    """A top-k cut takes its k tokens among the allowed ones; -inf never shows in a logprob."""
    engine, _, _ = table_engine(VOCAB)
    compiled = letters_compiler().compile(Grammar("regex", "(a|ba){4,8}"))
    model, sampling = TableModel(VOCAB), SamplingParams(temperature=0.0, top_k=1)
    contexts = [(first, second, 1) for first in range(VOCAB) for second in range(VOCAB)]
    tokens = next(c for c in contexts if int(model.logits(c).argmax()) in END_TOKEN_IDS)
    with running(engine):
        engine.open("a", 0, tokens, sampling, 3, 2, grammar=compiled.start())
        result = engine.step("a", 0, draft_nothing(tokens)).result(TIMEOUT)
    row = model.logits(tokens)
    best = sorted((1, 2, 3), key=lambda token_id: -float(row[token_id]))
    assert result.token_ids[0] == best[0]
    assert result.logprobs == (token_logprob(row, best[0], 2),)
    law = process_logits(constrain(row, compiled.start(), ()), SamplingParams(top_k=2))
    assert torch.isfinite(law).nonzero().flatten().tolist() == sorted(best[:2])


@pytest.mark.parametrize(("second", "same"), [("a+", True), ("b+", False), (None, False)])
def test_an_open_with_another_grammar_is_another_session(second: str | None, same: bool) -> None:
    engine, _, _ = table_engine(VOCAB)
    tokens, sampling = (1, 2, 1), SamplingParams(seed=3)
    grammar = regex_state("a+")
    engine.open("s", 0, tokens, sampling, 3, grammar=grammar)
    waiting = engine.step("s", 0, TokenTree.root_only(1))
    # Opened again before the first pass.
    engine.open("s", 0, tokens, sampling, 3, grammar=regex_state(second) if second else None)
    with running(engine):
        error = waiting.exception(TIMEOUT)
    assert isinstance(error, Cancelled) != same


def test_a_place_without_a_token_fails_that_session_alone() -> None:
    compiled = letters_compiler(("<|end|>", "a", "b", "<|x|>", "<|y|>")).compile(
        Grammar("regex", "bc|a{9}")
    )
    engine, _, blocks = table_engine(VOCAB)
    with running(engine):
        fine = job_of(PATTERNS[2], SamplingParams(seed=1))
        expected = decode(engine, "fine", fine)
        engine.open("good", 0, fine.prompt, fine.sampling, 4, grammar=start(fine.grammar))
        engine.open("bad", 0, (1, 2), SamplingParams(), 1, grammar=compiled.start())
        good = engine.step("good", 0, draft_nothing(fine.prompt))
        bad = engine.step("bad", 0, TokenTree.root_only(2))
        error = bad.exception(TIMEOUT)
        assert isinstance(error, InvalidRequest)
        assert error.field == "grammar"
        assert good.result(TIMEOUT).token_ids == (expected[0],)
        engine.close("good").result(TIMEOUT)
    assert blocks.num_free_blocks == blocks.num_blocks


def start(compiled: CompiledGrammar | None) -> GrammarState:
    assert compiled is not None
    return compiled.start()


def test_after_the_end_token_a_walk_goes_on_without_the_grammar() -> None:
    """The router cuts there; until then nothing may fail."""
    job = job_of("ab?", SamplingParams(seed=2), num_tokens=12)
    engine, _, _ = table_engine(VOCAB)
    with running(engine):
        plain = decode(engine, "plain", job)
        assert matches_to_the_end("ab?", plain)
        assert plain[0] not in END_TOKEN_IDS
        for seed in range(4):
            assert decode(engine, "tree", drafted(job, plain, seed)) == plain


def test_the_checks_find_nothing_in_the_engine_as_it_is() -> None:
    assert divergences() == 0


def at_the_root_alone(
    session: Session, row: torch.Tensor, past: Past, path: Sequence[int]
) -> torch.Tensor:
    """Planted: what the grammar allows is asked at the root and nowhere below."""
    output = [*past.output, *path]
    if session.grammar is not None and not path:
        row = constrain(row, session.grammar, output)
    return process_logits(row, session.sampling, past.prompt, output)


def without_the_path(
    session: Session, row: torch.Tensor, past: Past, path: Sequence[int]
) -> torch.Tensor:
    """Planted: accepted nodes do not move the grammar on."""
    assert session.grammar is not None
    row = constrain(row, session.grammar, past.output)
    return process_logits(row, session.sampling, past.prompt, [*past.output, *path])


def after_the_cuts(
    session: Session, row: torch.Tensor, past: Past, path: Sequence[int]
) -> torch.Tensor:
    """Planted: top-k takes its tokens first, and the mask takes of what is left."""
    assert session.grammar is not None
    output = [*past.output, *path]
    row = process_logits(row, session.sampling, past.prompt, output)
    return constrain(row, session.grammar, output)


def without_the_group(
    session: Session, row: torch.Tensor, past: Past, path: Sequence[int]
) -> torch.Tensor:
    """Planted: plain tokens that nobody was told yet do not move the grammar on."""
    assert session.grammar is not None
    told = past.output[: len(past.output) - session.num_unanswered]
    row = constrain(row, session.grammar, [*told, *path])
    return process_logits(row, session.sampling, past.prompt, [*past.output, *path])


@pytest.mark.parametrize(
    "planted", [at_the_root_alone, without_the_path, after_the_cuts, without_the_group]
)
def test_a_planted_bug_is_seen(
    planted: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(specinfer_verify.walks, "law_after", planted)
    assert divergences() > 0
