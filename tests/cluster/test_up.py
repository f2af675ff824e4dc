"""`specinfer up` as a user runs it: a real cluster of processes on a tiny checkpoint."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from specinfer_engine.checkpoint import read_checkpoint
from tests.kit.tiny_models import write_tiny_llama

# Loading torch four times takes a while on a busy machine.
pytestmark = pytest.mark.timeout(300)

COMMAND = [sys.executable, "-m", "specinfer_cli.main"]
END_SECONDS = 60.0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "target": write_tiny_llama(folder / "target"),
        "draft": write_tiny_llama(folder / "draft", noise=0.1),
        "other": write_tiny_llama(folder / "other", vocab_size=300),
    }


@contextmanager
def up(models: dict[str, Path], *more: str) -> Iterator[tuple[subprocess.Popen[str], Any]]:
    """`specinfer up` and what it printed as JSON; killed at the end if it is still there."""
    command = [*COMMAND, "up", "--json", "--grpc", "127.0.0.1:0", "--gateway", "127.0.0.1:0"]
    command += ["--admin", "127.0.0.1:0"]
    pair = ["--model", str(models["target"]), "--draft", str(models["draft"])]
    process = subprocess.Popen(
        [*command, *pair, "--threads", "1", *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            pytest.fail(f"up did not start: {process.communicate()[1]}")
        yield process, json.loads(line)
    finally:
        process.kill()
        process.communicate()


def wait_ended(handles: list[int]) -> None:
    """Wait until every process of a pidfd has ended."""
    for handle in handles:
        assert select.select([handle], [], [], END_SECONDS)[0], "a child is still there"
        os.close(handle)


def generate(address: str, *more: str) -> Any:
    command = [*COMMAND, "generate", "hello there", "--router", address, "--json"]
    done = subprocess.run(
        [*command, "--max-tokens", "24", "--temperature", "0.8", "--seed", "3", *more],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_up_serves_and_an_interrupt_ends_all_children(models: dict[str, Path]) -> None:
    with up(models, "--drafts", "2") as (process, facts):
        assert len(facts["drafters"]) == 2
        handles = [os.pidfd_open(pid) for pid in facts["pids"].values()]
        assert len(handles) == 4
        speculated = generate(facts["router"])
        plain = generate(facts["router"], "--no-speculation")
        assert speculated["token_ids"] == plain["token_ids"]
        assert len(plain["token_ids"]) > 0
        assert plain["statistics"]["num_draft_tokens"] == 0
        assert speculated["statistics"]["num_draft_tokens"] > 0
        process.send_signal(signal.SIGINT)
        wait_ended(handles)
        assert process.wait(END_SECONDS) == 0


def test_nothing_outlives_a_killed_launcher(models: dict[str, Path]) -> None:
    with up(models, "--kv-dtype", "fp8") as (process, facts):
        assert facts["model_hash"] != read_checkpoint(models["target"]).model_hash
        handles = [os.pidfd_open(pid) for pid in facts["pids"].values()]
        process.kill()
        wait_ended(handles)


def test_a_dead_drafter_is_reported_and_missed_by_nobody(models: dict[str, Path]) -> None:
    with up(models) as (process, facts):
        before = generate(facts["router"])
        os.kill(facts["pids"]["draft 1"], signal.SIGKILL)
        assert process.stderr is not None
        assert any("draft 1 was ended by signal 9" in line for line in process.stderr)
        assert generate(facts["router"])["token_ids"] == before["token_ids"]
        os.kill(facts["pids"]["router"], signal.SIGKILL)
        assert process.wait(END_SECONDS) == 1


def test_a_drafter_with_another_vocabulary_is_refused(models: dict[str, Path]) -> None:
    command = [*COMMAND, "up", "--grpc", "127.0.0.1:0", "--gateway", "127.0.0.1:0"]
    command += ["--admin", "127.0.0.1:0"]
    done = subprocess.run(
        [*command, "--model", str(models["target"]), "--draft", str(models["other"])],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 1
    assert "tokenizer" in done.stderr or "vocabulary" in done.stderr
    assert "Traceback" not in done.stderr
