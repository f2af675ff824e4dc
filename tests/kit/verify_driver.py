"""Drives a verify engine as a router would: one session's rounds, or many sessions at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from specinfer.grammar import CompiledGrammar
from specinfer.messages import VerifyResult
from specinfer.sampling import SamplingParams
from specinfer.step_curve import StepCurve
from specinfer_engine.blocks import BlockManager
from specinfer_verify.checks import Limits
from specinfer_verify.engine import VerifyEngine
from tests.kit.table_models import Draft, TableModel, TableRunner, draft_nothing

TIMEOUT = 60.0


@dataclass(frozen=True)
class Job:
    """One request: what goes in and how it is drafted for."""

    prompt: tuple[int, ...]
    sampling: SamplingParams
    num_tokens: int
    draft: Draft = draft_nothing
    grammar: CompiledGrammar | None = None


@contextmanager
def running(engine: VerifyEngine) -> Iterator[VerifyEngine]:
    """The engine with its thread running."""
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def table_engine(
    vocab_size: int = 5,
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    make_runner: Callable[[TableModel, int, int], TableRunner] = TableRunner,
    clock: Callable[[], float] = time.perf_counter,
    walk_on_device: bool = False,
    roots_ahead: bool = False,
    end_token_ids: Sequence[int] = (),
    **limits: float,
) -> tuple[VerifyEngine, TableRunner, BlockManager]:
    """An engine over a table model, with its runner and pool; passes of all sizes cost the same."""
    bounds = {"max_model_len": 200, "max_rows": 64, "min_prefill_rows": 8, "max_tree_nodes": 32}
    runner = make_runner(TableModel(vocab_size), num_blocks, block_size)
    blocks = BlockManager(num_blocks, block_size)
    ends = frozenset(end_token_ids)
    chosen = Limits(vocab_size=vocab_size, end_token_ids=ends, **(bounds | limits))  # type: ignore[arg-type]
    engine = VerifyEngine(
        runner,
        blocks,
        chosen,
        walk_on_device=walk_on_device,
        clock=clock,
    )
    if roots_ahead:
        engine.run_ahead(StepCurve(()))
    return engine, runner, blocks


def decode(engine: VerifyEngine, session_id: str, job: Job, *, together: int = 1) -> list[int]:
    """The first `num_tokens` output tokens of a job, round after round."""
    tokens, _ = decode_rounds(engine, session_id, job, together=together)
    return tokens


def decode_rounds(
    engine: VerifyEngine,
    session_id: str,
    job: Job,
    num_logprobs: int | None = None,
    *,
    together: int = 1,
) -> tuple[list[int], list[VerifyResult]]:
    """Output tokens and the results of all rounds; those without guesses ask for `together`."""
    tokens = list(job.prompt)
    results: list[VerifyResult] = []
    grammar = None if job.grammar is None else job.grammar.start()
    opened = engine.open(
        session_id, 0, tokens, job.sampling, len(tokens), num_logprobs, grammar=grammar
    )
    while len(tokens) < len(job.prompt) + job.num_tokens:
        tree = job.draft(tokens)
        most = together if len(tree) == 1 else 1
        step = engine.step(session_id, len(results), tree, num_tokens=most)
        results.append(step.result(TIMEOUT))
        tokens += results[-1].token_ids
    opened.result(TIMEOUT)
    engine.close(session_id).result(TIMEOUT)
    return tokens[len(job.prompt) :][: job.num_tokens], results


def decode_all(engine: VerifyEngine, jobs: Sequence[Job]) -> list[list[int]]:
    """Outputs of jobs that all run at once."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        names = [f"s{index}" for index in range(len(jobs))]
        return list(pool.map(lambda name, job: decode(engine, name, job), names, jobs))
