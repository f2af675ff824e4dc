"""Every ablation draws the same tokens, and takes out what it says it takes out."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from contextlib import ExitStack
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
from specinfer_kernels.packed_linear import layouts
from tests.kit.tiny_models import write_tiny_llama

TASK = Task("", (1, 5, 9, 20, 7), max_tokens=12, temperature=0.8, seed=3)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = write_tiny_llama(tmp_path_factory.mktemp("pair") / "target")
    return Pair(folder, folder, "float32", 1, frozenset({2}), Path("unused"))


def test_every_arm_draws_the_same_tokens_from_weights_in_its_own_layout(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    laid_out: list[str] = []
    build = PackedLinear.__init__

    def spy(self: PackedLinear, weight: Any, bias: Any, layout: Any) -> None:
        laid_out.append(layout)
        build(self, weight, bias, layout)

    monkeypatch.setattr(PackedLinear, "__init__", spy)
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
    assert "plain" in laid_out
    assert laid_out[0] != "plain" or layouts(torch.empty(16, 16)) == ("plain",)


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
