"""Every ablation draws the same tokens, and takes out what it says it takes out."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from specinfer.messages import WorkerInfo
from specinfer.sampling import SamplingParams
from specinfer_bench.peers.ablations import (
    FULL,
    PLAIN,
    Ablations,
    OneLayout,
    OwnLawLink,
    other_layouts,
)
from specinfer_bench.peers.interleave import run_all
from specinfer_bench.peers.peer import Pair, Task
from specinfer_bench.peers.report import build_report
from specinfer_draft.engine import DraftEngine
from specinfer_kernels import PackedLinear
from specinfer_kernels.packed_linear import Layout, layouts
from specinfer_verify.passes import run_rows
from specinfer_verify.settings import Settings as VerifySettings
from specinfer_verify.worker import Worker, build_worker
from tests.kit.architectures import architectures
from tests.kit.tiny_models import write_tiny, write_tiny_llama

TASK = Task("", (1, 5, 9, 20, 7), max_tokens=12, temperature=0.8, seed=3)
# Longer than the passes of one layout may be.
LONG_TASK = replace(TASK, token_ids=tuple(range(5, 45)))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = write_tiny_llama(tmp_path_factory.mktemp("pair") / "target")
    return Pair(folder, folder, "float32", 1, frozenset({2}), Path("unused"))


@pytest.fixture
def targets(monkeypatch: pytest.MonkeyPatch) -> list[set[Layout]]:
    """The layouts of each target's weights, in the order of loading; drafters' are left out."""
    laid_out: list[Layout] = []
    found: list[set[Layout]] = []
    build = PackedLinear.__init__

    def note(self: PackedLinear, weight: Any, bias: Any, layout: Layout) -> None:
        laid_out.append(layout)
        build(self, weight, bias, layout)

    def build_target(settings: VerifySettings) -> Worker:
        laid_out.clear()
        worker = build_worker(settings)
        found.append(set(laid_out))
        return worker

    monkeypatch.setattr(PackedLinear, "__init__", note)
    monkeypatch.setattr("specinfer_bench.peers.ablations.build_verifier", build_target)
    return found


def test_every_arm_draws_the_same_tokens_from_weights_in_its_own_layout(
    pair: Pair, targets: list[set[Layout]]
) -> None:
    with ExitStack() as stack:
        arms = dict(stack.enter_context(Ablations().load(pair)))
        for layout in other_layouts(pair.dtype):
            arms.update(stack.enter_context(OneLayout(layout).load(pair)))
        outcome = run_all(arms, TASK, [TASK], repeats=1)
        report = build_report(
            outcome,
            arms,
            temperature=TASK.temperature,
            eos_token_ids=pair.eos_token_ids,
            baseline=PLAIN,
            ours=FULL,
        )
    assert not report.failed
    assert {"plain, no packing", "no shared noise", "with drafting ahead"} <= set(report.arms)
    assert {name: arm.num_same for name, arm in report.arms.items()} == dict.fromkeys(arms, 1)
    assert [name for name, arm in arms.items() if arm.plain][:1] == [PLAIN]
    assert targets == [{layout} for layout in layouts(torch.empty(16, 16))]


def test_a_target_that_transformers_runs_has_the_layout_too(
    pair: Pair, targets: list[set[Layout]], tmp_path: Path
) -> None:
    folder = write_tiny(tmp_path / "phi", architectures()["phi"])
    with OneLayout("plain").load(replace(pair, target=folder, draft=folder)):
        assert targets == [{"plain"}]


@pytest.mark.parametrize("layout", [None, "plain"])
def test_passes_in_one_layout_have_few_rows(
    layout: Layout | None, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_rows: list[int] = []

    def note(runner: Any, plan: Sequence[Any]) -> Any:
        num_rows.append(sum(item.num_rows for item in plan))
        return run_rows(runner, plan)

    monkeypatch.setattr("specinfer_verify.engine.run_rows", note)
    with OneLayout(layout).load(pair) as arms:
        assert not run_all(arms, LONG_TASK, [LONG_TASK], repeats=1).failed
    assert max(num_rows) == 16


def test_beside_layouts_there_is_what_they_are_compared_with(pair: Pair) -> None:
    with OneLayout().load(pair) as arms:
        outcome = run_all(arms, TASK, [TASK], repeats=1)
    assert list(outcome.answers) == [PLAIN, FULL]
    plain, full = (answers[0][0].token_ids for answers in outcome.answers.values())
    assert plain == full


def test_a_drafter_without_the_noise_is_told_that_the_session_is_greedy() -> None:
    opened: list[SamplingParams] = []

    def note(*given: Any) -> Future[None]:
        opened.append(given[3])
        return Future()

    async def run() -> None:
        engine = cast(DraftEngine, SimpleNamespace(open=note))
        link = OwnLawLink(engine, cast(WorkerInfo, SimpleNamespace(model_name="fake")))
        link.open("session", 1, (1, 2), SamplingParams(temperature=0.8, seed=3), 2)

    asyncio.run(run())
    assert [(each.temperature, each.seed) for each in opened] == [(0.0, 3)]
