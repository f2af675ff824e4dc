"""Ways through a cluster: a way of other kernels counts only where the workers ran on them."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from specinfer import Capabilities
from specinfer_cli.cluster import ClusterSettings
from specinfer_cli.lossless_check import Tally
from specinfer_cli.lossless_paths import ALL_PATHS, CheckedPaths, kernels_of
from specinfer_cli.processes import Child
from specinfer_kernels import describe_backend
from specinfer_kernels.native import SWITCH
from specinfer_verify.settings import Settings
from specinfer_verify.worker import build_worker
from tests.kit.tiny_models import write_tiny_llama

WITHOUT = ALL_PATHS[-1]
CAPABILITIES = Capabilities(
    "m", "h", "t", 11, "float32", 64, 32, True, ("match",), True, 1, 1, True, "0.1.0"
)


def checked(*kernels: str) -> CheckedPaths:
    tally = Tally(num_comparisons=1, num_accepted_tokens=1)
    return CheckedPaths(WITHOUT, CAPABILITIES, tally, 1.0, 1, 1, kernels)


def test_negative_control_native_kernels_are_no_proof_for_the_others() -> None:
    assert checked("reference", "reference").lossless
    for kernels in ((), ("",), ("native", "native"), ("reference", "native"), ("reference", "")):
        assert not checked(*kernels).lossless
    fast = dataclasses.replace(checked("native"), paths=ALL_PATHS[1])
    assert fast.lossless, "on another way it is whatever is there"


def test_the_way_without_native_kernels_turns_them_off_and_has_workers_say_so() -> None:
    settings = WITHOUT.over(ClusterSettings(Path("m")), "127.0.0.1:1")
    assert settings.worker_environment[SWITCH] == "off"
    for flags in (settings.verify_flags, settings.draft_flags):
        assert flags[flags.index("--log-level") + 1] == "info"


def test_a_log_is_read_whatever_is_in_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    child = Child("verify 1", subprocess.Popen([sys.executable, "-c", ""]), log, "")
    child.process.wait()
    for text, kernels in (
        ("", ""),
        ('ready\n{"kernels"\n["kernels"]\n{"kernels": 1}\n', ""),
        ('{"message": "x"}\n{"kernels": "reference"}\nready\n', "reference"),
    ):
        log.write_text(text)
        assert kernels_of(child) == kernels


# What a worker does at its start, with its log on stderr.
_START = """
import sys
from pathlib import Path
from specinfer.telemetry import set_up
from tests.unit.test_lossless_paths import start
set_up("specinfer-verify", level="info")
start(Path(sys.argv[1]))
"""


def start(model: Path) -> None:
    build_worker(
        Settings(
            model,
            dtype="float32",
            kv_blocks=2,
            max_rows=2,
            max_tree_nodes=2,
            min_prefill_rows=1,
            profile="off",
        )
    )


def test_a_worker_says_what_it_runs_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, log = write_tiny_llama(tmp_path / "target"), tmp_path / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-c", _START, str(model)],
            stderr=stream,
            env={**os.environ, SWITCH: "off"},
        )
        assert process.wait(60) == 0, log.read_text()
    assert kernels_of(Child("verify 1", process, log, "")) == "reference"
    with caplog.at_level("INFO"):
        start(model)
    said = [getattr(record, "kernels", None) for record in caplog.records]
    assert describe_backend() in said, "the control: not turned off"
