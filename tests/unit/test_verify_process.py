"""The verify worker as a process: settings, start, SIGTERM, and starts that must fail clearly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from specinfer.errors import InvalidCheckpoint, InvalidRequest, Unavailable
from specinfer.sampling import SamplingParams
from specinfer.tree import TokenTree
from specinfer_verify.__main__ import main
from specinfer_verify.settings import Settings, parse_settings
from specinfer_verify.worker import build_worker
from tests.kit.tiny_models import write_tiny_llama

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("", "kernels", "engine", "services/verify")
TIMEOUT = 60.0


def environment(**extra: str) -> dict[str, str]:
    path = os.pathsep.join(str(ROOT / folder) for folder in FOLDERS)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **extra}


def start(*arguments: str, **extra: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "specinfer_verify", *arguments],
        env=environment(**extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_worker_serves_until_sigterm_and_then_ends_in_order(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "target")
    process = start("--address=127.0.0.1:0", "--kv-blocks=64", SPECINFER_VERIFY_MODEL=str(model))
    try:
        assert process.stdout is not None
        assert "ready on port" in process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    assert process.returncode == 0, errors


def test_a_worker_shows_its_metrics_where_it_is_told_to(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "target")
    process = start(
        *("--address=127.0.0.1:0", "--kv-blocks=64", f"--model={model}"),
        *("--metrics=127.0.0.1:0", "--vllm-metrics"),
    )
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        lines = (json.loads(line) for line in process.stderr if line.startswith("{"))
        port = next(line["metrics_port"] for line in lines if "metrics_port" in line)
        assert "ready on port" in process.stdout.readline()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=TIMEOUT) as answer:
            text = answer.read().decode()
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    free = 'specinfer_kv_blocks{model_name="target",state="free",tier="verify"} 64.0'
    assert free in text
    assert 'vllm:kv_cache_usage_perc{engine="0",model_name="target"} 0.0' in text
    assert "process_resident_memory_bytes" in text


def test_a_missing_checkpoint_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "nothing"
    monkeypatch.setattr(sys, "argv", ["verify", "--address=127.0.0.1:0", f"--model={model}"])
    assert main() == 1
    assert "nothing is not a folder" in capsys.readouterr().err


def test_a_built_worker_describes_itself_and_decodes(tmp_path: Path) -> None:
    settings = Settings(
        model=write_tiny_llama(tmp_path / "target"),
        dtype="float32",
        kv_blocks=8,
        max_rows=32,
        max_tree_nodes=16,
        min_prefill_rows=16,
    )
    worker = build_worker(settings)
    assert worker.info.max_model_len == 128, "the pool is shorter than the model"
    assert worker.info.num_blocks == 8
    assert [cost.num_rows for cost in worker.info.step_costs] == [1, 2, 4, 8, 12, 16, 24, 32]
    worker.engine.start()
    worker.engine.open("a", 0, (5, 6), SamplingParams(), 2)
    assert worker.engine.step("a", 0, TokenTree.root_only(6)).result(TIMEOUT).epoch == 1
    worker.engine.stop()
    with pytest.raises(Unavailable):
        worker.engine.step("a", 1, TokenTree.root_only(6))


def test_memory_decides_the_number_of_blocks() -> None:
    settings = Settings(model=Path("m"), kv_memory=1, block_size=16)
    assert settings.num_blocks(bytes_per_token=1024) == 64
    assert Settings(model=Path("m"), kv_blocks=7).num_blocks(1024) == 7
    with pytest.raises(InvalidRequest) as caught:
        settings.num_blocks(bytes_per_token=1 << 20)
    assert caught.value.field == "kv_memory"


def test_flags_win_over_the_environment() -> None:
    variables = {"SPECINFER_VERIFY_MODEL": "/models/a", "SPECINFER_VERIFY_MAX_ROWS": "128"}
    settings = parse_settings(["--max-rows=64", "--max-tree-nodes=8"], variables)
    assert (settings.model, settings.max_rows, settings.tls) == (Path("/models/a"), 64, None)


@pytest.mark.parametrize("field", ["kv_memory", "block_size", "max_rows", "kv_blocks"])
def test_zero_is_refused(field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_settings(["--model=m", f"--{field.replace('_', '-')}=0"], {})
    assert caught.value.field == field


@pytest.mark.parametrize("field", ["yield_seconds", "session_idle_seconds", "drain_seconds"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_times_are_0_or_more(field: str, value: float) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Settings(model=Path("m"), **{field: value})  # type: ignore[arg-type]
    assert caught.value.field == field


def test_contradicting_limits_are_refused(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "target")
    with pytest.raises(InvalidRequest, match="max_tree_nodes"):
        build_worker(Settings(model=model, kv_blocks=8, max_rows=16, max_tree_nodes=32))
    with pytest.raises(InvalidCheckpoint, match="dtype"):
        build_worker(Settings(model=model, kv_blocks=8, dtype="int4"))
