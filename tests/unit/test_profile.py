"""T(rows, context) at a worker's start: what is measured, and what is believed of a file."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from specinfer.errors import InvalidRequest
from specinfer.messages import StepCost
from specinfer.worker_settings import KEEP, OFF, RENEW, WorkerSettings
from specinfer_engine import profiling, step_profile
from specinfer_engine.batch import SequenceRows
from specinfer_engine.loader import load_model
from specinfer_engine.profile_cache import (
    MAX_BYTES,
    MAX_FILES,
    profile_key,
    read_profile,
    user_folder,
    write_profile,
)
from specinfer_engine.profiling import profile_steps
from specinfer_engine.runner import Runner
from specinfer_engine.step_profile import (
    ProfileGrid,
    StepProfile,
    measure_step_costs,
    still_true,
)
from specinfer_kernels import backends
from tests.kit.tiny_models import write_tiny_llama

COSTS = (StepCost(1, 128, 0.05), StepCost(8, 128, 0.058), StepCost(1, 1024, 0.06))
PROFILE = StepProfile(COSTS, 1.5e9)
SPIKY = ProfileGrid((1, 2, 8), (128, 1024))
KEY = {"model": "abc", "device": "a machine"}


@dataclass
class ClockedRunner:
    """Passes that take what they are told, by a clock of their own."""

    block_size: int = 16
    now: float = 0.0
    factor: float = 1.0
    passes: list[tuple[int, int]] = field(default_factory=list)
    busy: range = range(0)
    spikes: dict[tuple[int, int], float] = field(default_factory=dict)

    def forward(self, rows: Sequence[SequenceRows]) -> list[Tensor]:
        (sequence,) = rows
        context = sequence.context_len
        self.passes.append((len(sequence.token_ids), context))
        factor = self.factor * (3.0 if len(self.passes) in self.busy else 1.0)
        factor *= self.spikes.get((len(sequence.token_ids), context), 1.0)
        self.now += factor * (0.01 * len(sequence.token_ids) + 1e-5 * context)
        return [torch.zeros(1, 1)]


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> ClockedRunner:
    made = ClockedRunner()
    monkeypatch.setattr("specinfer_engine.step_profile.time.perf_counter", lambda: made.now)
    return made


def test_every_point_of_the_grid_is_measured(runner: ClockedRunner) -> None:
    costs = measure_step_costs(runner, ProfileGrid((1, 8), (128, 1024)))
    assert [(cost.num_rows, cost.context_len) for cost in costs] == [
        *((1, 128), (8, 128), (1, 1024), (8, 1024))
    ]
    assert [cost.seconds for cost in costs] == pytest.approx([0.01128, 0.08128, 0.02024, 0.09024])


def test_a_slow_model_is_measured_less_often_and_at_fewer_contexts(runner: ClockedRunner) -> None:
    runner.factor = 40.0
    costs = measure_step_costs(runner, ProfileGrid((1, 2, 8), (128, 1024, 4096)))
    assert [cost.num_rows for cost in costs[:3]] == [1, 2, 8], "the shortest context is whole"
    assert {cost.context_len for cost in costs} < {128, 1024, 4096}
    assert runner.now < 30.0


def test_a_machine_that_is_away_for_a_while_changes_no_cost(runner: ClockedRunner) -> None:
    grid = ProfileGrid((1, 2, 8, 16), (128, 1024))
    runner.factor = 0.1
    quiet = measure_step_costs(runner, grid)
    busy = ClockedRunner(factor=0.1, busy=range(2, 20))

    def clock() -> float:
        return busy.now

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("specinfer_engine.step_profile.time.perf_counter", clock)
        found = measure_step_costs(busy, grid)
    for one, other in zip(quiet, found, strict=True):
        assert other.seconds == pytest.approx(one.seconds)
    assert len({*busy.passes[4:12]}) == 8, "every point has its turn before any has another"


def test_more_rows_or_context_never_cost_less(runner: ClockedRunner) -> None:
    runner.spikes = {(2, 128): 9.0, (8, 128): 9.0}
    costs = {(c.num_rows, c.context_len): c.seconds for c in measure_step_costs(runner, SPIKY)}
    assert costs[2, 128] == costs[2, 1024] == pytest.approx(0.03024)
    assert costs[8, 128] == costs[8, 1024] == pytest.approx(0.09024)
    assert costs[1, 128] == pytest.approx(0.01128), "what is cheaper stays"


def test_only_what_fits_is_measured() -> None:
    grid = ProfileGrid((1, 4, 32), (100, 1000))
    assert grid.within(200) == ProfileGrid((1, 4, 32), (100, 168))
    assert grid.within(32) == ProfileGrid((1, 4), (28,)), "both contexts shrink to one"


def test_costs_that_are_not_true_any_more_are_noticed(runner: ClockedRunner) -> None:
    costs = measure_step_costs(runner, ProfileGrid((1, 8), (128, 1024)))
    assert still_true(runner, costs)
    for factor in (0.5, 2.0):
        runner.factor = factor
        assert not still_true(runner, costs)


def test_costs_are_looked_at_again_only_until_they_agree(runner: ClockedRunner) -> None:
    costs = measure_step_costs(runner, ProfileGrid((1, 8), (128,)))
    runner.passes.clear()
    assert still_true(runner, costs)
    assert len(runner.passes) == 2 * 3, "a pass that does not count and two that do"
    # Three slow passes: the first point's last two looks and both of the other's are quick.
    runner.passes.clear()
    runner.busy = range(1, 4)
    assert still_true(runner, costs)


@pytest.mark.parametrize("slow_look", [2, 3])
def test_a_slow_look_does_not_make_a_stale_cost_true(runner: ClockedRunner, slow_look: int) -> None:
    runner.factor = 3.0
    stale = measure_step_costs(runner, ProfileGrid((8,), (128,)))
    # The first pass does not count; of those that do, one takes what all took then.
    runner.passes.clear()
    runner.factor, runner.busy = 1.0, range(slow_look, slow_look + 1)
    assert not still_true(runner, stale)


def test_what_is_kept_is_found_again_under_its_key_alone(tmp_path: Path) -> None:
    folder = tmp_path / "profiles"
    assert read_profile(folder, KEY) is None
    write_profile(folder, KEY, PROFILE)
    assert read_profile(folder, KEY) == PROFILE
    assert read_profile(folder, KEY | {"model": "abd"}) is None
    assert [path.suffix for path in folder.iterdir()] == [".json"], "nothing half written is left"


def broken(costs: object, key: object = KEY, measured_at: object = 1.5e9) -> str:
    return json.dumps({"key": key, "measured_at": measured_at, "costs": costs})


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", "\xff", "[" * 100_000, " " * (MAX_BYTES + 1)),
        *(broken([]), broken(None), broken([[1, 2]]), broken([[1, 128, 0.5]], {"model": "abd"})),
        *(broken([[0, 1, 0.5]]), broken([[1, -1, 0.5]]), broken([[1, 1, 0.0]])),
        *(broken([[1, 1, "0.5"]]), broken([[True, 1, 0.5]]), broken([[1, 1, 1]])),
        *('{"key": {}}', broken([[1, 1, 1e999]]), broken([[1, 1, float("nan")]])),
        *(broken([[1, 1, 0.5]], measured_at=at) for at in (None, "now", 0.0, float("nan"), 1e999)),
    ],
    ids=range(25),
)
def test_a_broken_file_is_not_believed(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_profile(tmp_path, KEY, PROFILE)
    (path,) = tmp_path.glob("*.json")
    path.write_text(text, encoding="latin-1")
    assert read_profile(tmp_path, KEY) is None
    assert "broken" in caplog.text


def test_a_folder_that_cannot_be_written_stops_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    write_profile(tmp_path / "file", KEY, PROFILE)
    assert "not kept" in caplog.text
    assert read_profile(tmp_path / "file", KEY) is None


def test_the_oldest_files_make_room(tmp_path: Path) -> None:
    for index in range(MAX_FILES + 5):
        key = KEY | {"model": str(index)}
        write_profile(tmp_path, key, PROFILE)
        newest = max(tmp_path.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        os.utime(newest, (index, index))
    assert len(list(tmp_path.iterdir())) == MAX_FILES
    assert read_profile(tmp_path, KEY | {"model": "0"}) is None
    assert read_profile(tmp_path, KEY | {"model": str(MAX_FILES + 4)}) == PROFILE


def test_a_file_that_another_worker_took_away_stops_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Listed, and not there: as it is for whoever looks just after the other one's unlink.
    (tmp_path / "gone.json").symlink_to(tmp_path / "nowhere")
    write_profile(tmp_path, KEY, PROFILE)
    assert not caplog.records
    assert read_profile(tmp_path, KEY) == PROFILE


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    folder = write_tiny_llama(tmp_path_factory.mktemp("profile") / "model")
    return Runner(load_model(folder, dtype="float32"), num_blocks=8)


def test_a_key_names_everything_that_a_cost_hangs_on(real: Runner) -> None:
    key = profile_key(real.loaded, rows=(1, 2))
    assert set(key) == {
        *("model", "dtype", "device", "threads", "backend", "version", "code", "rows")
    }
    assert key == profile_key(real.loaded, rows=(1, 2))
    other = replace(real.loaded, model_hash="0" * 64)
    assert profile_key(other, rows=(1, 2)) != key


def test_a_key_tells_what_multiplies_bfloat16(
    real: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for products in ("pairs", "matrices"):
        monkeypatch.setattr(backends, "bfloat16_products", lambda products=products: products)
        monkeypatch.setattr(backends, "native_failure", lambda: None)
        found.append(profile_key(real.loaded)["backend"])
    assert found == ["native, bfloat16 by pairs", "native, bfloat16 by matrices"]
    monkeypatch.setattr(backends, "native_failure", lambda: "no compiler")
    assert profile_key(real.loaded)["backend"] == "reference"


def test_costs_are_kept_for_the_next_start_unless_told_otherwise(
    real: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiling, "WORTH_KEEPING_SECONDS", 0.0)
    monkeypatch.setattr(step_profile, "AGREEMENT", 1e9)
    grid = ProfileGrid((1, 4), (16, 32))
    first = profile_steps(real, grid, KEEP, tmp_path)
    assert [cost.context_len for cost in first.costs] == [16, 16, 32, 32]
    assert profile_steps(real, grid, KEEP, tmp_path) == first
    renewed = profile_steps(real, grid, RENEW, tmp_path)
    assert renewed != first
    assert profile_steps(real, grid, OFF, tmp_path) != renewed
    assert profile_steps(real, grid, KEEP, tmp_path) == renewed
    monkeypatch.setattr(step_profile, "AGREEMENT", 1e-9)
    assert profile_steps(real, grid, KEEP, tmp_path) != renewed, "not true any more"


def test_what_is_measured_in_no_time_leaves_no_file(real: Runner, tmp_path: Path) -> None:
    profile_steps(real, ProfileGrid((1,), (16,)), KEEP, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_folder() == tmp_path / "specinfer" / "profiles"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_folder() == tmp_path / ".cache" / "specinfer" / "profiles"


def test_another_word_for_profile_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="--profile"):
        WorkerSettings(model=Path("m"), profile="always")
