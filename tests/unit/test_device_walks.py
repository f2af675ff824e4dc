"""Walks done together, where the logits lie: the tokens of the rule, session by session."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import specinfer_verify.device_walks
import specinfer_verify.engine
from specinfer.errors import InternalError
from specinfer.sampling import SamplingParams
from specinfer.tree import TokenTree
from specinfer_engine.acceptance import Walk, match_walk
from specinfer_engine.batch import SequenceRows
from specinfer_engine.logits import process_logits
from specinfer_kernels import Backend
from specinfer_verify.device_walks import (
    MOST_WALK_FAILURES,
    Walked,
    Walker,
    read_walk,
    walk_on_device,
    walk_together,
)
from specinfer_verify.scheduler import ScheduledRows
from tests.kit.table_models import TableRunner, random_drafter
from tests.kit.triton_interpreter import patch_once
from tests.kit.verify_driver import TIMEOUT, Job, decode, decode_all, running, table_engine

WalkTogether = Callable[[Sequence[ScheduledRows], Sequence[Tensor]], Walked]

VOCAB = 5
GREEDY = SamplingParams(temperature=0.0)
SAMPLINGS = (
    GREEDY,
    SamplingParams(seed=1),
    SamplingParams(temperature=1.7, min_p=0.1, seed=2),
    SamplingParams(temperature=0.8, top_p=0.7, seed=3),
    SamplingParams(temperature=0.6, top_k=3, top_p=0.9, min_p=0.02, seed=4),
    SamplingParams(repetition_penalty=1.3, frequency_penalty=0.4, seed=6),
    SamplingParams(logit_bias={0: -3.0, 2: 1.5}, seed=7),
    SamplingParams(temperature=0.0, presence_penalty=0.6),
)


def random_walker(rng: random.Random, vocab_size: int) -> Walker:
    sampling = SamplingParams(
        temperature=rng.choice((0.0, 0.3, 1.0, rng.uniform(0.1, 2.0))),
        top_k=rng.choice((0, 0, rng.randrange(1, vocab_size + 2))),
        top_p=rng.choice((1.0, rng.uniform(0.05, 0.99))),
        min_p=rng.choice((0.0, rng.uniform(0.0, 0.3))),
        seed=rng.randrange(2**63),
    )
    tree = random_drafter(rng, min(vocab_size, 4), max_nodes=14)([0])
    return Walker(tree, rng.choice((0, 7, 2**31)), sampling)


def random_logits(walkers: Sequence[Walker], vocab_size: int, seed: int) -> Tensor:
    """Every third set is of whole numbers, so that many logits tie."""
    num_nodes = sum(len(walker.tree) for walker in walkers)
    noise = torch.randn(num_nodes, vocab_size, generator=torch.Generator().manual_seed(seed))
    return (2 * noise).round() if seed % 3 == 0 else 3 * noise


def rule_walk(walker: Walker, logits: Tensor) -> Walk:
    sampling = walker.sampling
    return match_walk(
        walker.tree,
        lambda node: process_logits(logits[node], sampling),
        base_len=walker.base_len,
        seed=sampling.seed,
        greedy=sampling.greedy,
    )


def differing_walks(
    seed: int, vocab_size: int, num_trees: int, backend: Backend | None = None
) -> tuple[int, int]:
    """How many walks differ from the rule's, and how many nodes were accepted in all."""
    rng = random.Random(seed)
    walkers = [random_walker(rng, vocab_size) for _ in range(num_trees)]
    logits = random_logits(walkers, vocab_size, seed)
    rows = logits.split([len(walker.tree) for walker in walkers])
    expected = [rule_walk(walker, part) for walker, part in zip(walkers, rows, strict=True)]
    together = walk_together(walkers, logits, backend=backend)
    walks = [read_walk(numbers, 0) for numbers in together]
    pairs = zip(walks, expected, strict=True)
    return sum(one != other for one, other in pairs), sum(len(walk.path) for walk in expected)


def test_walks_together_are_those_of_the_rule() -> None:
    num_accepted = 0
    for seed in range(60):
        num_differing, accepted = differing_walks(seed, (5, 17, 90)[seed % 3], 6)
        assert num_differing == 0
        num_accepted += accepted
    assert num_accepted > 60, "walks go below the root"


def test_the_kernels_walk_as_the_rule_does(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_once(monkeypatch)
    num_accepted = 0
    for seed, vocab_size in ((1, 5), (3, 17), (4, 1100)):
        num_differing, accepted = differing_walks(seed, vocab_size, 3, backend="triton")
        assert num_differing == 0
        num_accepted += accepted
    assert num_accepted > 0


def test_negative_control_noise_of_another_position(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        specinfer_verify.device_walks, "decided_position", lambda base_len, depth: base_len + 1
    )
    assert sum(differing_walks(seed, 5, 6)[0] for seed in range(20)) > 0


def test_a_nan_ends_the_walk_that_comes_to_it_and_no_other() -> None:
    tree = TokenTree((0, 1, 2), (-1, 0, 0))
    walkers = [Walker(tree, 7, GREEDY)] * 3
    logits = torch.zeros(9, 4)
    logits[[0, 3, 6], 1] = 1.0  # every walk goes to node 1
    logits[1, 3] = torch.nan
    logits[5, 3] = torch.nan  # node 2 of the second tree, which no walk visits
    together = walk_together(walkers, logits)
    with pytest.raises(InternalError, match="NaN where token 9 is decided"):
        read_walk(together[0], 7)
    assert read_walk(together[1], 7) == read_walk(together[2], 7) == Walk((1,), 0)


def make_jobs(num_jobs: int) -> list[Job]:
    rng = random.Random(5)
    prompts = [tuple(rng.randrange(VOCAB) for _ in range(3 + index)) for index in range(num_jobs)]
    samplings = [SAMPLINGS[index % len(SAMPLINGS)] for index in range(num_jobs)]
    return [Job(prompt, one, 40) for prompt, one in zip(prompts, samplings, strict=True)]


def plain_outputs(jobs: Sequence[Job]) -> list[list[int]]:
    engine, _, _ = table_engine(VOCAB)
    with running(engine):
        return [decode(engine, "alone", job) for job in jobs]


def drafted(jobs: Sequence[Job], outputs: Sequence[Sequence[int]]) -> list[Job]:
    return [
        replace(job, draft=random_drafter(random.Random(index), VOCAB, known=(*job.prompt, *out)))
        for index, (job, out) in enumerate(zip(jobs, outputs, strict=True))
    ]


def together_outputs(jobs: Sequence[Job]) -> list[list[int]]:
    engine, _, blocks = table_engine(VOCAB, num_blocks=512, walk_on_device=True)
    with running(engine):
        outputs = decode_all(engine, jobs)
        assert blocks.num_free_blocks == blocks.num_blocks
    return outputs


def test_an_engine_that_walks_on_the_device_gives_the_same_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shares: list[tuple[int, int]] = []

    def counted(plan: Sequence[ScheduledRows], logits: Sequence[Tensor]) -> Walked:
        walked = walk_on_device(plan, logits)
        shares.append((len(walked), len(plan)))
        return walked

    monkeypatch.setattr(specinfer_verify.device_walks, "walk_on_device", counted)
    jobs = make_jobs(16)
    outputs = plain_outputs(jobs)
    assert together_outputs(drafted(jobs, outputs)) == outputs
    assert any(1 < walked < planned for walked, planned in shares), "both ways in one pass"


def test_negative_control_penalties_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = make_jobs(8)
    outputs = plain_outputs(jobs)
    monkeypatch.setattr(specinfer_verify.device_walks, "draws_from_rows", lambda session: True)
    assert together_outputs(drafted(jobs, outputs)) != outputs


class SpoiledRunner(TableRunner):
    """Makes a NaN after token 4."""

    def forward(self, rows: Sequence[SequenceRows]) -> list[Tensor]:
        """As the table's, but for those rows."""
        logits = super().forward(rows)
        for part, values in zip(rows, logits, strict=True):
            if part.token_ids[-1] == 4:
                values[:] = torch.nan
        return logits


def test_a_nan_fails_its_session_alone() -> None:
    engine, _, _ = table_engine(make_runner=SpoiledRunner, walk_on_device=True)
    with running(engine):
        for name, last in (("bad", 4), ("good", 2)):
            engine.open(name, 0, (1, last), GREEDY, 2)
        steps = [engine.step("bad", 0, TokenTree.root_only(4))]
        steps.append(engine.step("good", 0, TokenTree.root_only(2)))
        with pytest.raises(InternalError, match="NaN"):
            steps[0].result(TIMEOUT)
        assert steps[1].result(TIMEOUT).epoch == 1
        assert engine.healthy


def test_walks_that_fail_together_are_done_one_by_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(plan: Sequence[ScheduledRows], logits: Sequence[Tensor]) -> Walked:
        raise RuntimeError("no memory for the logits")

    messages = failures_told(monkeypatch, caplog, failing)
    assert [message.rpartition(" one by one ")[2] for message in messages] == [
        *["in this pass"] * (MOST_WALK_FAILURES - 1),
        "from now on",
    ]


def test_a_failure_now_and_then_turns_no_walks_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    num_calls = 0

    def failing_at_times(plan: Sequence[ScheduledRows], logits: Sequence[Tensor]) -> Walked:
        nonlocal num_calls
        num_calls += 1
        if num_calls % MOST_WALK_FAILURES:
            raise RuntimeError("no memory for the logits")
        return walk_on_device(plan, logits)

    messages = failures_told(monkeypatch, caplog, failing_at_times)
    assert num_calls > 2 * MOST_WALK_FAILURES
    assert len(messages) == num_calls - num_calls // MOST_WALK_FAILURES
    assert all(message.endswith("in this pass") for message in messages)


def failures_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, walk: WalkTogether
) -> list[str]:
    """What is logged, each with its error, while an engine gives the right tokens all the same."""
    monkeypatch.setattr(specinfer_verify.device_walks, "walk_on_device", walk)
    jobs = make_jobs(4)
    outputs = plain_outputs(jobs)
    with caplog.at_level(logging.ERROR):
        assert together_outputs(drafted(jobs, outputs)) == outputs
    assert all(record.exc_text is not None for record in caplog.records)
    return [record.message for record in caplog.records]


class WideRunner(TableRunner):
    """Logits in float64."""

    def forward(self, rows: Sequence[SequenceRows]) -> list[Tensor]:
        """As the table's."""
        return [logits.double() for logits in super().forward(rows)]


def test_a_float64_model_is_walked_session_by_session() -> None:
    job = make_jobs(4)[3]
    (output,) = plain_outputs([job])
    engine, _, _ = table_engine(VOCAB, make_runner=WideRunner, walk_on_device=True)
    with running(engine):
        assert decode(engine, "wide", job) == output
