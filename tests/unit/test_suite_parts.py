"""The parts of `make bench`: commands that exist, and none that takes the others with it."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from typer.core import TyperGroup
from typer.main import get_command

from specinfer.errors import Unavailable
from specinfer_bench import gpu, gpu_peers, gpu_step
from specinfer_bench.load import cluster as cluster_module
from specinfer_bench.load.__main__ import load_parser
from specinfer_bench.load.cluster import Cluster, demo_cluster
from specinfer_bench.overlap import overlap_parser
from specinfer_bench.peers.__main__ import peers_parser
from specinfer_bench.peers.ablations import ablations_parser
from specinfer_bench.router_cost import router_cost_parser
from specinfer_bench.suite import running, sharing
from specinfer_bench.suite.parts import BY_ADDRESS, BY_FILE, Part, all_parts
from specinfer_bench.suite.running import (
    DONE,
    FAILED,
    LEFT_OUT,
    TIMED_OUT,
    PartResult,
    run_parts,
)
from specinfer_bench.suite.sharing import SharedCluster, grown_cluster
from specinfer_cli.app import app
from tests.kit.waiting import until

ROOT = Path(__file__).resolve().parents[2]
PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "specinfer_bench.load": load_parser,
    "specinfer_bench.peers": peers_parser,
    "specinfer_bench.peers.ablations": ablations_parser,
    "specinfer_bench.router_cost": router_cost_parser,
    "specinfer_bench.overlap": overlap_parser,
    "specinfer_bench.gpu_step": gpu_step.gpu_step_parser,
    "specinfer_bench.gpu_peers": gpu_peers.gpu_peers_parser,
}
WRITE = "import sys, pathlib; pathlib.Path(sys.argv[-1]).write_text('{}')"


@pytest.fixture(autouse=True)
def short_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "LOOK_SECONDS", 0.01)


def part(name: str, code: str, **options: Any) -> Part:
    return Part(name, name, ("python", "-c", code), **{"limit_seconds": 60.0, **options})


def ran(parts: list[Part], folder: Path, seconds: float = 600.0) -> dict[str, PartResult]:
    return dict(run_parts(parts, folder, folder, budget_seconds=seconds))


def test_each_part_is_told_of_and_none_stops_the_others(tmp_path: Path) -> None:
    parts = [
        part("fails", "raise SystemExit('no luck')"),
        part("no-file", "pass"),
        part("prints", "print('12 ms')", writes=False),
        part("works", WRITE),
    ]
    found = dict(run_parts(parts, tmp_path, tmp_path, budget_seconds=600))
    assert [found[each.name].state for each in parts] == [FAILED, FAILED, DONE, DONE]
    assert found["fails"].reason == "exit status 1: no luck"
    assert found["works"].command.endswith("--output works.json")
    assert json.loads((tmp_path / "prints.json").read_text())["lines"] == ["12 ms"]


def test_what_the_time_does_not_reach_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = dict(run_parts([part("late", WRITE)], tmp_path, tmp_path, budget_seconds=1.0))
    assert found["late"].state == LEFT_OUT
    assert not (tmp_path / "late.json").exists()
    hanging = part("hangs", "import threading; threading.Event().wait()", limit_seconds=60.0)
    monkeypatch.setattr(running, "LEAST_SECONDS", 0.0)
    cut = dict(run_parts([hanging], tmp_path, tmp_path, budget_seconds=1.0))["hangs"]
    assert (cut.state, cut.reason) == (LEFT_OUT, "the time was up within it")


async def test_a_part_that_hangs_ends_with_all_it_started(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE)\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "child.wait()"
    )
    hanging = part("hangs", code, limit_seconds=3.0)
    found = (await asyncio.to_thread(ran, [hanging], tmp_path))["hangs"]
    assert (found.state, found.reason) == (TIMED_OUT, "not within 3 seconds")
    pid = int((tmp_path / "pid").read_text())
    await until(lambda: not is_running(pid), "the part's child has ended")


class Clusters:
    """Takes down what is started and ended, and fails at one size."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        # Kept, so that none ends for having been forgotten.
        self.started: list[AbstractContextManager[Cluster]] = []

    def start(self, grow: str, seconds: float) -> AbstractContextManager[Cluster]:
        self.started.append(self._start(grow, seconds))
        return self.started[-1]

    @contextmanager
    def _start(self, grow: str, seconds: float) -> Iterator[Cluster]:
        assert 0 < seconds <= 300
        self.seen.append(f"+{grow}")
        if grow == "7b":
            raise Unavailable("it does not start")
        try:
            yield {"router": f"router-of-{grow}:1"}
        finally:
            self.seen.append(f"-{grow}")


@pytest.fixture
def clusters(monkeypatch: pytest.MonkeyPatch) -> Clusters:
    found = Clusters()
    monkeypatch.setattr(running, "SharedCluster", partial(SharedCluster, start=found.start))
    return found


KEEP = "import sys, json, pathlib; pathlib.Path(sys.argv[-1]).write_text(json.dumps({'got': %s}))"
TOLD = KEEP % "sys.argv[1:3]"
READ = KEEP % "json.load(open(sys.argv[2]))"


def test_parts_in_a_row_share_a_cluster_of_one_size(tmp_path: Path, clusters: Clusters) -> None:
    parts = [
        part("a", TOLD, grow="200m", joins=BY_ADDRESS),
        part("b", READ, grow="200m", joins=BY_FILE),
        part("c", TOLD, grow="1b", joins=BY_ADDRESS),
        part("alone", TOLD, grow="1b"),
        part("d", TOLD, grow="1b", joins=BY_ADDRESS),
    ]
    found = ran(parts, tmp_path)
    assert {each.state for each in found.values()} == {DONE}
    assert clusters.seen == ["+200m", "-200m", "+1b", "-1b", "+1b", "-1b"]
    files = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in found}
    assert {name: file["got"] for name, file in files.items()} == {
        "a": ["--router", "router-of-200m:1"],
        "b": {"router": "router-of-200m:1"},
        "c": ["--router", "router-of-1b:1"],
        "alone": ["--grow", "1b"],
        "d": ["--router", "router-of-1b:1"],
    }
    for each in parts:
        setup = files[each.name]["setup"]
        assert f"--grow {each.grow} --output" in setup["command"], "it runs by itself"
        assert (setup["grow"], setup["shared_cluster"]) == (each.grow, each.name == "b")


def test_a_part_that_fails_takes_its_cluster_with_it(tmp_path: Path, clusters: Clusters) -> None:
    parts = [
        part("fails", "raise SystemExit('no')", grow="200m", joins=BY_ADDRESS),
        part("works", TOLD, grow="200m", joins=BY_ADDRESS),
        part("too-large", TOLD, grow="7b", joins=BY_ADDRESS),
        part("too-large-again", TOLD, grow="7b", joins=BY_ADDRESS),
        part("after", TOLD, grow="200m", joins=BY_ADDRESS),
    ]
    found = ran(parts, tmp_path)
    assert [each.state for each in found.values()] == [FAILED, DONE, FAILED, FAILED, DONE]
    assert found["too-large-again"].reason == "it does not start"
    assert clusters.seen == ["+200m", "-200m", "+200m", "-200m", "+7b", "+200m", "-200m"]


def test_a_cluster_ends_with_the_run_and_its_start_counts(
    tmp_path: Path, clusters: Clusters, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = part("one", TOLD, grow="200m", joins=BY_ADDRESS)
    run = run_parts([one, one], tmp_path, tmp_path, budget_seconds=600)
    assert next(run)[1].state == DONE
    run.close()
    assert clusters.seen == ["+200m", "-200m"]
    # A start that takes all the time leaves none for the part.
    clock = iter([0.0, 0.0, 1.0, 599.0, 600.0])
    monkeypatch.setattr(running, "busy_cores", lambda _: 0.0)
    monkeypatch.setattr(running, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert ran([one], tmp_path)["one"].state == LEFT_OUT


ENDED = """
import contextlib, pathlib, sys
from specinfer_bench.ending import exit_on_term
from specinfer_bench.suite import running
from specinfer_bench.suite.parts import Part
from specinfer_bench.suite.sharing import SharedCluster

folder = pathlib.Path(sys.argv[1])

@contextlib.contextmanager
def start(grow, seconds):
    try:
        yield {"router": "here:1"}
    finally:
        (folder / "ended").touch()

exit_on_term()
running.SharedCluster = lambda: SharedCluster(start)
code = "import pathlib, sys, threading as t; pathlib.Path(sys.argv[-1]).touch(); t.Event().wait()"
part = Part("begun", "begun", ("python", "-c", code), 600.0, grow="200m", joins="--router")
for _ in running.run_parts([part], folder, folder, 600.0):
    pass
"""


async def test_whoever_is_told_to_end_ends_the_cluster_too(tmp_path: Path) -> None:
    command = (sys.executable, "-c", ENDED, str(tmp_path))
    process = await asyncio.create_subprocess_exec(*command)
    try:
        await until(lambda: (tmp_path / ".begun.json").exists(), "the part has begun", seconds=30)
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 30) == 128 + 15
    finally:
        if process.returncode is None:
            process.kill()
    assert (tmp_path / "ended").exists()


@pytest.mark.parametrize("text", ["[1, 2]", '{"cut": '])
def test_a_file_that_is_none_of_ours_fails_its_part_alone(tmp_path: Path, text: str) -> None:
    write = f"import sys, pathlib; pathlib.Path(sys.argv[-1]).write_text({text!r})"
    found = ran([part("bad", write), part("good", WRITE)], tmp_path)
    assert [each.state for each in found.values()] == [FAILED, DONE]
    assert "none of ours" in found["bad"].reason


def test_a_file_of_yesterday_is_not_todays_and_stays_until_there_is_one(tmp_path: Path) -> None:
    yesterday, broken_off = tmp_path / "silent.json", tmp_path / ".silent.json"
    for file in (yesterday, broken_off):
        file.write_text('{"of": "yesterday"}')
    assert ran([part("silent", "pass")], tmp_path)["silent"].reason == "it left no file"
    assert yesterday.read_text() == '{"of": "yesterday"}'
    assert not broken_off.exists()
    assert ran([part("silent", WRITE)], tmp_path)["silent"].state == DONE
    assert "of" not in json.loads(yesterday.read_text())
    assert not broken_off.exists()


EVERY_PART = (*all_parts(ROOT), *gpu.parts().values())


@pytest.mark.parametrize("each", EVERY_PART, ids=lambda each: each.name)
def test_every_part_is_a_command_that_exists(each: Part) -> None:
    joins = (each.joins, "of-it") if each.joins else ()
    for words in (each.command, (*each.words, *joins)):
        head, *rest = [word for word in words if word != "python"]
        if each.writes:
            rest += ["--output", "file.json"]
        if head == "specinfer":
            command = cast(TyperGroup, get_command(app))
            with command.make_context("specinfer", rest[:1], resilient_parsing=True) as context:
                found = command.get_command(context, rest[0])
                assert found is not None
                found.make_context(rest[0], rest[1:], parent=context)
        elif head == "-m":
            PARSERS[rest[0]]().parse_args(rest[1:])
        else:
            assert (ROOT / head).is_file()


def test_the_demo_cluster_serves_the_target_that_was_grown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    @contextmanager
    def started(flags: list[str], seconds: float) -> Iterator[Cluster]:
        asked.extend((*flags, seconds))
        yield {}

    monkeypatch.setattr(cluster_module, "started_cluster", started)
    monkeypatch.setattr(cluster_module, "grown_target", lambda *words: tmp_path / str(words[1]))
    with demo_cluster("1b", seconds=3.0):
        assert asked[asked.index("--model") + 1] == str(tmp_path / "1b")
        assert asked[asked.index("--draft") + 1] == str(ROOT / "models/demo/draft")
        assert asked[-1] == 3.0


def grow_by(line: str, folder: Path, patch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """Have a line of shell for growing; what the cluster is asked for is in the list."""
    asked: list[tuple[str, float]] = []

    @contextmanager
    def demo(grow: str, seconds: float) -> Iterator[Cluster]:
        asked.append((grow, seconds))
        yield {}

    python = folder / "python"
    python.write_text(f"#!/bin/sh\n{line}\n")
    python.chmod(0o755)
    patch.setattr(sharing, "demo_cluster", demo)
    patch.setattr(sys, "executable", str(python))
    return asked


@pytest.mark.parametrize(
    ("line", "seconds", "reason"),
    [("exit 3", 60.0, "ended with 3"), ("exec sleep 600", 0.3, "not grow within 0 seconds")],
)
def test_a_target_that_does_not_grow_has_no_cluster(
    line: str, seconds: float, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = grow_by(line, tmp_path, monkeypatch)
    with pytest.raises(Unavailable, match=reason), grown_cluster("200m", seconds):
        pytest.fail("a cluster of nothing")
    assert not asked


def test_growing_and_starting_have_their_time_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = grow_by("exit 0", tmp_path, monkeypatch)
    with grown_cluster("200m", 60.0):
        ((grow, seconds),) = asked
    assert grow == "200m"
    assert 0.0 < seconds < 60.0


OWNER = """
import threading
from specinfer_bench.load import cluster

cluster.COMMAND_LINE = "stands_in"
with cluster.started_cluster([]) as found:
    print(found["model"], flush=True)
    threading.Event().wait()
"""
STANDS_IN = """
import json, os, threading

facts = dict.fromkeys(("router", "gateway", "model_hash", "dtype"), "")
print(json.dumps({**facts, "model": os.getpid()}), flush=True)
threading.Event().wait()
"""


async def test_a_cluster_does_not_outlive_one_who_is_killed(tmp_path: Path) -> None:
    (tmp_path / "stands_in.py").write_text(STANDS_IN)
    owner = await asyncio.create_subprocess_exec(
        sys.executable, "-c", OWNER, stdout=asyncio.subprocess.PIPE, cwd=tmp_path
    )
    assert owner.stdout is not None
    pid = int(await asyncio.wait_for(owner.stdout.readline(), 30))
    assert is_running(pid)
    owner.kill()
    await owner.wait()
    await until(lambda: not is_running(pid), "the cluster has ended", seconds=30)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_the_parts_have_names_of_their_own_and_the_kernels_are_found() -> None:
    names = [each.name for each in all_parts(ROOT)]
    assert len(set(names)) == len(names)
    assert "kernels-tree-attention" in names
    assert "kernels-timing" not in names
