"""What tests of every level share: real servers on free ports, ended with the session.

Knows no service of ours; each test folder has its own fakes.
"""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from specinfer import AsyncClient, Client
from tests.kit.certificates import Certificates, make_certificates
from tests.kit.triton_interpreter import interpret_without_a_gpu

interpret_without_a_gpu()

NUM_PORT_TRIES = 5
STOP_TIMEOUT_SECONDS = 20.0


@pytest.fixture(scope="session", autouse=True)
def _own_profiles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep step profiles of tests, and of the processes they start, out of the user's cache.

    The native kernels are those that set-up built.
    """
    built = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specinfer/kernels"
    own = tmp_path_factory.mktemp("cache")
    (own / "specinfer").mkdir()
    if built.is_dir():
        (own / "specinfer" / "kernels").symlink_to(built)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(own))
        yield


@pytest.fixture(params=["shared stream", "own calls"])
def both_kinds_of_call(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test twice: clients let their streams share a call, and make one for each."""
    for kind in (AsyncClient, Client):
        defaults = kind.__init__.__kwdefaults__
        assert defaults is not None
        monkeypatch.setitem(defaults, "multiplex", request.param == "shared stream")


def free_port() -> int:
    """Return a loopback port that was free a moment ago."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def redis_binary() -> str:
    """Return the path of redis-server; skip where there is none, fail where CI has none."""
    path = shutil.which("redis-server")
    if path is None and os.environ.get("CI"):
        pytest.fail("redis-server is not installed, and CI must have it")
    if path is None:
        pytest.skip("redis-server is not installed")
    return path


def start_redis(binary: str, folder: Path) -> tuple[subprocess.Popen[str], int]:
    """Start a server that keeps nothing on disk; take another port when one was taken meanwhile."""
    for _ in range(NUM_PORT_TRIES):
        port = free_port()
        command = [binary, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
        process = subprocess.Popen(
            [*command, "--save", "", "--appendonly", "no"], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        # Its log ends, and so does this loop, when the port was taken and it gave up.
        for line in process.stdout:
            if "Ready to accept connections" in line:
                return process, port
        stop(process)
    pytest.fail(f"redis-server found no port in {NUM_PORT_TRIES} tries")


def stop(process: subprocess.Popen[str]) -> None:
    """End the process and close its pipe."""
    process.terminate()
    process.communicate(timeout=STOP_TIMEOUT_SECONDS)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a real Redis server, shared by the whole session: use keys of your own."""
    process, port = start_redis(redis_binary(), tmp_path_factory.mktemp("redis"))
    try:
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        stop(process)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """An authority and what it signed, for 127.0.0.1 and localhost."""
    return make_certificates(tmp_path_factory.mktemp("certificates"))
