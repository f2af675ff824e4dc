"""The draft worker as a process and with real models: settings, start, SIGTERM, agreement."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from specinfer.errors import InvalidRequest, Unavailable
from specinfer.messages import ShapeQuery
from specinfer.sampling import SamplingParams
from specinfer_draft.__main__ import main
from specinfer_draft.settings import Settings, parse_settings
from specinfer_draft.worker import Worker, build_worker
from specinfer_engine.acceptance import match_walk
from specinfer_engine.batch import SequenceRows
from specinfer_engine.loader import load_model
from specinfer_engine.logits import process_logits
from specinfer_engine.runner import Runner
from tests.kit.tiny_models import write_tiny_llama

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("", "kernels", "engine", "services/draft")
TIMEOUT = 60.0
PROMPT = (5, 6, 7, 8, 9)
CHAIN = ShapeQuery(max_nodes=4, max_depth=4, widths=(1, 1, 1, 1))


def environment(**extra: str) -> dict[str, str]:
    path = os.pathsep.join(str(ROOT / folder) for folder in FOLDERS)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **extra}


def test_a_worker_serves_until_sigterm_and_then_ends_in_order(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "draft")
    process = subprocess.Popen(
        [sys.executable, "-m", "specinfer_draft", "--address=127.0.0.1:0", "--kv-blocks=64"],
        env=environment(SPECINFER_DRAFT_MODEL=str(model)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert "ready on port" in process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    assert process.returncode == 0, errors


def test_a_missing_checkpoint_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "nothing"
    monkeypatch.setattr(sys, "argv", ["draft", "--address=127.0.0.1:0", f"--model={model}"])
    assert main() == 1
    assert "nothing is not a folder" in capsys.readouterr().err


def test_flags_win_over_the_environment() -> None:
    settings = parse_settings(
        ["--model=m", "--threads=2"],
        {"SPECINFER_DRAFT_THREADS": "1", "SPECINFER_DRAFT_SCORE_FLOOR": "-3.5"},
    )
    assert (settings.threads, settings.score_floor, settings.tls) == (2, -3.5, None)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kv_memory": 0},
        {"kv_blocks": 0},
        {"block_size": 0},
        {"max_sessions": 0},
        {"threads": -1},
        {"drain_seconds": -1.0},
        {"spread": -0.5},
        {"spread": float("nan")},
        {"least_reach": float("nan")},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest):
        Settings(model=Path("m"), **wrong)  # type: ignore[arg-type]


def test_memory_that_holds_no_block_is_refused() -> None:
    settings = Settings(model=Path("m"), kv_memory=1)
    assert settings.num_blocks(1 << 10) == 64
    with pytest.raises(InvalidRequest, match="no block"):
        settings.num_blocks(1 << 20)


def test_settings_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path)
    settings = Settings(model=folder, dtype="float32", max_tree_nodes=64, max_rows=32, kv_blocks=8)
    with pytest.raises(InvalidRequest, match="max_tree_nodes"):
        build_worker(settings)


def test_a_built_worker_describes_itself(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "draft")
    worker = build_worker(Settings(model=folder, dtype="float32", kv_blocks=8, name="t"))
    info = worker.info
    assert (info.model_name, info.vocab_size, info.dtype) == ("t", 512, "float32")
    assert info.max_model_len == 128, "the pool is shorter than the model"
    assert info.worker_id.startswith("draft-")
    assert info.tokenizer_hash
    assert info.acceptance_rules == ()
    assert [cost.num_rows for cost in info.step_costs] == [1, 4, 16, 64]
    worker.engine.start()
    worker.engine.stop()
    with pytest.raises(Unavailable):
        worker.engine.close("a")


@pytest.fixture(scope="module", params=["off", "on"])
def worker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Worker:
    folder = write_tiny_llama(tmp_path_factory.mktemp("draft"))
    built = build_worker(
        Settings(model=folder, dtype="float32", kv_blocks=64, threads=1, ahead=request.param)
    )
    built.engine.start()
    return built


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.8, seed=5),
        SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.3, seed=6),
    ],
    ids=["greedy", "sampled", "penalised"],
)
@torch.inference_mode()
def test_a_real_drafter_that_is_the_target_is_always_right(
    worker: Worker, tmp_path: Path, sampling: SamplingParams
) -> None:
    target = Runner(
        load_model(write_tiny_llama(tmp_path), dtype="float32"), num_blocks=16, block_size=16
    )
    tokens, known, new = list(PROMPT), len(PROMPT), list[int]()
    worker.engine.open("a", 0, PROMPT, sampling).result(TIMEOUT)
    for epoch in range(5):
        tree = worker.engine.propose("a", epoch, known, new, CHAIN).result(TIMEOUT).tree
        context = [*tokens, *tree.token_ids[1:]]
        rows = SequenceRows.chain(context, 0, range(16), range(len(tokens) - 1, len(context)))
        (logits,) = target.forward([rows])
        laws = [
            process_logits(row, sampling, PROMPT, context[len(PROMPT) : len(tokens) + depth])
            for depth, row in enumerate(logits)
        ]
        walk = match_walk(
            tree,
            lambda node, laws=laws: laws[node],  # type: ignore[misc]
            base_len=len(tokens) - 1,
            seed=sampling.seed,
            greedy=sampling.greedy,
        )
        assert walk.path == (1, 2, 3, 4)
        known, new = len(tokens), [*tree.token_ids[1:], walk.tail]
        tokens += new
    worker.engine.close("a").result(TIMEOUT)
