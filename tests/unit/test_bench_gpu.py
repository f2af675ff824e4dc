"""The benches of a GPU as far as a CPU can tell: cases run, work is counted, absence is said."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from specinfer.errors import Unavailable
from specinfer_bench import gpu, gpu_step
from specinfer_bench.suite.parts import all_parts
from specinfer_engine.loader import load_model
from tests.kit.threads import one_thread as one_thread
from tests.kit.tiny_models import write_tiny_llama

ROOT = Path(__file__).resolve().parents[2]


def script(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    """A bench of `bench/kernels`, imported as its neighbours import it."""
    monkeypatch.syspath_prepend(str(ROOT / "bench" / "kernels"))
    return importlib.import_module(name)


@pytest.mark.parametrize("name", ["gpu_attention", "gpu_rows", "gpu_sampling"])
def test_every_candidate_that_needs_no_gpu_runs(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = script(monkeypatch, name)
    monkeypatch.setattr(sys, "argv", [name, "--check"])
    bench.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert all("ran: ours" in line for line in lines)


@pytest.mark.parametrize("name", ["gpu_attention", "gpu_rows", "gpu_sampling"])
def test_a_kernel_bench_says_that_there_is_no_gpu(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = script(monkeypatch, name)
    monkeypatch.setattr(sys, "argv", [name])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device here"):
        bench.main()


def test_the_work_of_attention_is_what_rows_must_read_and_compute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = script(monkeypatch, "gpu_attention")
    timing = script(monkeypatch, "gpu_timing")
    case = bench.Case(context=1000, num_trees=3, tree_size=1, num_heads=8, num_kv_heads=2)
    work = case.work()
    keys_and_values = 3 * 1001 * 2 * 2 * 128 * 2
    queries_and_results = 2 * 3 * 8 * 128 * 2
    assert work.num_bytes == keys_and_values + queries_and_results
    assert work.num_operations == 3 * 1001 * 8 * 128 * 2 * 2
    assert timing.floor_seconds(timing.Work(100, 1000), 10.0, 1000.0) == 10.0
    assert timing.floor_seconds(timing.Work(100, 1000), 1000.0, 10.0) == 100.0
    assert timing.floor_seconds(timing.Work(100), 10.0, 0.0) == 10.0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("linear_kernel", "products"),
        ("fold_kernel", "products"),
        ("nvjet_hsh_64x8_64x16_4x1_v_bz_TNT", "products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32", "products"),
        ("shared_kernel", "attention"),
        ("finish_kernel", "attention"),
        ("norm_kernel", "rest"),
        ("Memcpy HtoD (Pageable -> Device)", "rest"),
        ("void at::native::vectorized_elementwise_kernel<4>", "rest"),
    ],
)
def test_kernels_are_told_apart_by_their_names(name: str, kind: str) -> None:
    assert gpu_step.kernel_kind(name) == kind


def test_kernel_names_are_those_of_the_kernels() -> None:
    folder = ROOT / "kernels" / "specinfer_kernels" / "triton"
    source = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*_device.py"))
    for name in ("linear_kernel", "fold_kernel", "shared_kernel", "finish_kernel", "plan_kernel"):
        assert f"def {name}(" in source
        assert gpu_step.kernel_kind(name) != "rest"


def test_a_step_is_taken_apart_without_a_profiler_too(tmp_path: Path) -> None:
    loaded = load_model(write_tiny_llama(tmp_path / "tiny"), dtype="float32")
    steps = list(gpu_step.step_rows(loaded, True, 1))
    assert [step.num_sequences for step in steps] == [1, 3, 1, 3]
    assert all(step.step_ms > 0 and step.overhead is None for step in steps)
    assert [row.num_rows for row in gpu_step.linear_rows(loaded, True, 1)] == [2]


def test_without_a_gpu_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Unavailable, match="no CUDA device"):
        gpu.measure(["step"])
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert gpu.main() == 2
    assert "Unavailable" in capsys.readouterr().err


def test_the_benches_of_a_gpu_are_no_part_of_make_bench() -> None:
    assert not [part.name for part in all_parts(ROOT) if "gpu" in part.name]
    assert set(gpu.parts()) == {"attention", "linear", "rows", "sampling", "step", "peers"}
