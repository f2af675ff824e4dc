"""Children, ports and start-up: what `specinfer up` stands on."""

from __future__ import annotations

import dataclasses
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from specinfer.errors import InvalidRequest, SpecinferError, Unavailable
from specinfer.server import RpcServer, build_server
from specinfer.sync_client import LoopThread
from specinfer_cli.app import app
from specinfer_cli.cluster import ClusterSettings, RunningCluster, running_cluster
from specinfer_cli.models import ModelChoice, choose_models, demo_folder
from specinfer_cli.processes import (
    Child,
    free_port,
    reach_redis,
    start_child,
    stop_children,
    wait_healthy,
)

ROOT = Path(__file__).resolve().parents[2]
# A module of the standard library that serves until a signal comes and speaks no gRPC.
SLEEPER = ("http.server", ["--bind", "127.0.0.1", "0"])
LAUNCHER = """
import sys, pathlib
from specinfer_cli.processes import start_child
child = start_child("sleeper", "http.server", ["--bind", "127.0.0.1", "0"],
                    address="127.0.0.1:1", folder=pathlib.Path(sys.argv[1]))
print(child.process.pid, flush=True)
sys.stdin.read()
"""


def sleeper(folder: Path) -> Child:
    return start_child("sleeper 1", *SLEEPER, address="127.0.0.1:1", folder=folder)


def never() -> bool:
    return False


def test_children_are_stopped(tmp_path: Path) -> None:
    children = [sleeper(tmp_path)]
    assert children[0].running
    stop_children(children, 10)
    assert children[0].process.returncode == -signal.SIGTERM
    assert "was ended by signal 15" in children[0].obituary()
    stop_children(children, 10)


def test_a_child_that_will_not_end_is_killed(tmp_path: Path) -> None:
    (tmp_path / "stubborn.py").write_text(
        "import signal, sys, threading\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "sys.stderr.write('deaf\\n')\n"
        "threading.Event().wait()\n"
    )
    code = (
        "import sys, pathlib\n"
        "from specinfer_cli.processes import start_child, stop_children\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "child = start_child('s', 'stubborn', [], address='', folder=folder)\n"
        "while 'deaf' not in child.tail(): pass\n"
        "stop_children([child], 0.1)\n"
        "print(child.process.returncode)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == "-9\n"


def test_children_do_not_outlive_a_killed_launcher(tmp_path: Path) -> None:
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert launcher.stdout is not None
    assert launcher.stdin is not None
    pid = int(launcher.stdout.readline())
    handle = os.pidfd_open(pid)
    try:
        assert not select.select([handle], [], [], 0)[0]
        launcher.kill()
        launcher.wait(30)
        assert select.select([handle], [], [], 30)[0], "the child is still there"
    finally:
        os.close(handle)
        launcher.stdin.close()
        launcher.stdout.close()


def test_a_child_that_ends_at_start_is_reported_with_its_log(tmp_path: Path) -> None:
    child = start_child("verify 1", "no_such_module", [], address="127.0.0.1:1", folder=tmp_path)
    try:
        with pytest.raises(SpecinferError) as caught:
            wait_healthy([child], time.monotonic() + 30, never)
    finally:
        stop_children([child], 1)
    assert "verify 1 ended with 1" in str(caught.value)
    assert "no_such_module" in str(caught.value)


def test_waiting_ends_in_time_and_on_interrupt(tmp_path: Path) -> None:
    child = sleeper(tmp_path)
    try:
        with pytest.raises(Unavailable, match="not ready in time"):
            wait_healthy([child], time.monotonic() - 1, never)
        with pytest.raises(KeyboardInterrupt):
            wait_healthy([child], time.monotonic() + 30, lambda: True)
    finally:
        stop_children([child], 10)


@contextmanager
def healthy_server() -> Iterator[str]:
    """A server that says no more than that it serves."""

    async def start() -> RpcServer:
        server = build_server("127.0.0.1:0", [])
        await server.start()
        return server

    loop = LoopThread()
    server = loop.run(start())
    try:
        yield f"127.0.0.1:{server.port}"
    finally:
        loop.stop(server.drain(0))


def test_a_healthy_server_is_seen(tmp_path: Path) -> None:
    child = sleeper(tmp_path)
    try:
        with healthy_server() as address:
            child.address = address
            wait_healthy([child], time.monotonic() + 30, never)
    finally:
        stop_children([child], 10)


def test_a_dead_drafter_is_reported_once_and_a_dead_router_ends_it(tmp_path: Path) -> None:
    verify, draft, router = (sleeper(tmp_path) for _ in range(3))
    verify.address, draft.address, draft.name = "v", "d", "draft 1"
    verify.name, router.name = "verify 1", "router"
    cluster = RunningCluster("r", "g", ("v",), ("d",), (verify, draft, router))
    died: list[str] = []
    looks = iter([False, False, True])
    try:
        draft.process.kill()
        draft.process.wait()
        cluster.watch(lambda: next(looks), lambda child: died.append(child.name))
        assert died == ["draft 1"]
        verify.process.kill()
        verify.process.wait()
        with pytest.raises(Unavailable, match="no verify worker"):
            cluster.watch(never, lambda child: died.append(child.name))
        router.process.kill()
        router.process.wait()
        with pytest.raises(Unavailable, match="router"):
            cluster.watch(never, lambda child: None)
    finally:
        stop_children([verify, draft, router], 10)


def test_redis_is_looked_for(redis_server: str) -> None:
    reach_redis(redis_server)
    for url in (f"redis://:secret@127.0.0.1:{free_port()}/0", "no-redis://secret"):
        with pytest.raises(InvalidRequest, match="--redis") as caught:
            reach_redis(url)
        assert "secret" not in caught.value.message


@dataclasses.dataclass
class Starts:
    """Children that would have been started."""

    flags: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    environments: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)

    def start(
        self,
        name: str,
        module: str,
        flags: list[str],
        *,
        address: str,
        folder: Path,
        environment: dict[str, str] | None = None,
    ) -> Any:
        self.flags[name] = flags
        self.environments[name] = environment or {}
        return SimpleNamespace(name=name, address=address)


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> Starts:
    """Clusters start nothing and write down what they would have started."""
    seen = Starts()
    monkeypatch.setattr("specinfer_cli.cluster.start_child", seen.start)
    for name in ("wait_healthy", "stop_children"):
        monkeypatch.setattr(f"specinfer_cli.cluster.{name}", lambda *_: None)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(9)))
    return seen


def flag(flags: list[str], name: str) -> str | None:
    return flags[flags.index(name) + 1] if name in flags else None


def test_workers_get_cores_of_their_own_or_share_them_all(starts: Starts) -> None:
    settings = ClusterSettings(Path("target"), Path("draft"), num_verifiers=2, num_drafters=2)
    names = ("verify 1", "verify 2", "draft 1", "draft 2")
    for given, threads, cores in (
        (None, "3311", ["0-2", "3-5", "6", "7-8"]),
        (3, "3333", [None] * 4),
    ):
        with running_cluster(dataclasses.replace(settings, num_threads=given)):
            assert [flag(starts.flags[name], "--threads") for name in names] == list(threads)
            assert [flag(starts.flags[name], "--cores") for name in names] == cores


def test_all_are_told_of_redis_and_the_router_alone_of_other_machines(
    starts: Starts, redis_server: str
) -> None:
    settings = ClusterSettings(
        Path("target"), Path("draft"), grpc_address="0.0.0.0:0", redis=redis_server, group="mine"
    )
    with running_cluster(dataclasses.replace(settings, insecure_bind=True)):
        assert "--insecure-bind" in starts.flags["router"]
        assert "--insecure-bind" not in starts.flags["verify 1"]
        for name, kind in (("router", "ROUTER"), ("verify 1", "VERIFY"), ("draft 1", "DRAFT")):
            assert starts.environments[name] == {f"SPECINFER_{kind}_REDIS": redis_server}
            assert starts.flags[name][-2:] == ["--group", "mine"] or name == "router"
        assert "mine" in starts.flags["router"]
        assert not {"--verify", "--draft"} & set(starts.flags["router"]), "they are found"
        assert all(redis_server not in flags for flags in starts.flags.values())
    with running_cluster(dataclasses.replace(settings, grpc_address="127.0.0.1:0", redis=None)):
        assert {"--verify", "--draft"} <= set(starts.flags["router"])
        assert starts.environments["verify 1"] == {}


def test_a_cluster_that_cannot_serve_starts_nothing(starts: Starts) -> None:
    local = ClusterSettings(Path("target"))
    for settings, flag in (
        (dataclasses.replace(local, grpc_address="0.0.0.0:0"), "--grpc"),
        (dataclasses.replace(local, gateway_address="0.0.0.0:0"), "--gateway"),
        (dataclasses.replace(local, redis=f"redis://127.0.0.1:{free_port()}/0"), "--redis"),
    ):
        with pytest.raises(InvalidRequest, match=flag), running_cluster(settings):
            pytest.fail("it was started")
    assert starts.flags == {}


def test_a_childs_environment_goes_before_ours(tmp_path: Path) -> None:
    (tmp_path / "tell.py").write_text("import os; print(os.environ['TOLD'])\n")
    environment = {"TOLD": "yes", "PYTHONPATH": str(tmp_path)}
    child = start_child("t", "tell", [], address="", folder=tmp_path, environment=environment)
    child.process.wait(60)
    stop_children([child], 1)
    assert child.tail() == "yes"


def test_settings_are_checked() -> None:
    for name in ("num_verifiers", "num_drafters", "num_threads", "group"):
        wrong: dict[str, Any] = {name: "no name" if name == "group" else 0}
        with pytest.raises(InvalidRequest, match=name):
            ClusterSettings(Path(), **wrong)


def test_models_are_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, drafter = tmp_path / "target", tmp_path / "draft"
    target.mkdir()
    drafter.mkdir()
    assert choose_models(target, None) == ModelChoice("target", target, None)
    assert choose_models(target, "none") == ModelChoice("target", target, None)
    assert choose_models(target, str(drafter)) == ModelChoice("target", target, drafter)
    with pytest.raises(InvalidRequest, match="--model"):
        choose_models(tmp_path / "nowhere", None)
    with pytest.raises(InvalidRequest, match="--draft"):
        choose_models(target, str(tmp_path / "nowhere"))
    monkeypatch.setattr("specinfer.__file__", str(tmp_path / "specinfer" / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidRequest, match="give a target model with --model"):
        demo_folder()
    demo = tmp_path / "models" / "demo"
    (demo / "target").mkdir(parents=True)
    assert choose_models(None, None) == ModelChoice("demo", demo / "target", demo / "draft")
    assert choose_models(None, "none") == ModelChoice("demo", demo / "target", None)


@pytest.mark.parametrize("flag", ["--grpc", "--gateway"])
def test_up_names_the_flag_of_a_port_in_use(flag: str, tmp_path: Path) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        taken = f"127.0.0.1:{busy.getsockname()[1]}"
        other = "--gateway" if flag == "--grpc" else "--grpc"
        command = [sys.executable, "-m", "specinfer_cli.main", "up", "--model", str(tmp_path)]
        done = subprocess.run(
            [*command, flag, taken, other, "127.0.0.1:0"],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=ROOT,
            check=False,
        )
    assert done.returncode == 2, done.stderr
    assert f"{flag}: cannot listen on {taken}" in done.stderr


def test_services_read_the_rest_of_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    class Service:
        @staticmethod
        def main() -> int:
            seen.append(sys.argv)
            return 3

    monkeypatch.setattr("sys.argv", ["specinfer"])
    monkeypatch.setattr("specinfer_cli.services.import_extra", lambda module: Service)
    for name in ("router", "draft", "verify"):
        result = CliRunner().invoke(app, [name, "--model", "folder", "--help", "-x"])
        assert result.exit_code == 3
        assert seen[-1] == [f"specinfer_{name}", "--model", "folder", "--help", "-x"]


def test_missing_libraries_are_named() -> None:
    code = (
        "import sys; sys.modules['rich'] = None; sys.modules['rich.console'] = None\n"
        "from specinfer_cli.main import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "pip install 'specinfer[cli]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_extras_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from specinfer_cli.console import import_extra

    def missing(name: str) -> None:
        raise ModuleNotFoundError(name="torch.nn")

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(InvalidRequest, match=r"specinfer\[model\]"):
        import_extra("specinfer_verify")


def test_version_and_help() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout.startswith("specinfer ")
    for command in ("up", "generate", "chat", "lossless", "bench"):
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0
