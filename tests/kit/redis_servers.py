"""Real Redis servers of one test alone: killed, paused, replicated, behind TLS, or as a cluster.

Knows nothing of what is kept in them.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.conftest import free_port, redis_binary

WAIT_SECONDS = 20.0


class RedisServer:
    """A server on a free port whose data lies in `folder`."""

    def __init__(self, folder: Path, *options: str, port: int = 0) -> None:
        self.folder = folder
        self.options = options
        self.port = port or free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        folder.mkdir(parents=True, exist_ok=True)
        self.process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        command = [redis_binary(), "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        command += ["--dir", str(self.folder), "--appendonly", "yes", "--appendfsync", "always"]
        process = subprocess.Popen([*command, *self.options], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if "Ready to accept connections" in line:
                return process
        pytest.fail("redis-server did not start")

    def kill(self) -> None:
        """End it as a crash would."""
        self.process.kill()
        self.process.communicate(timeout=WAIT_SECONDS)

    def restart(self, *, lose_data: bool = False) -> None:
        """Start it again on its port, with what the disk holds or with nothing."""
        if lose_data:
            shutil.rmtree(self.folder)
            self.folder.mkdir()
        self.process = self._start()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """It runs and does not answer."""
        os.kill(self.process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.process.pid, signal.SIGCONT)

    def stop(self) -> None:
        """End it."""
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGCONT)
        self.process.kill()
        self.process.communicate(timeout=WAIT_SECONDS)


def redis_cli(port: int, *arguments: str) -> str:
    """What a command answers."""
    command = ["redis-cli", "-p", str(port), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip()


def start_cluster(folder: Path) -> list[RedisServer]:
    """Three primaries that share the slots."""
    options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "2000")
    # The bus takes the port 10000 above, which must exist.
    ports: list[int] = []
    while len(ports) < 3:
        port = free_port()
        if port < 55_000 and port not in ports and _is_free(port + 10_000):
            ports.append(port)
    nodes = [RedisServer(folder / str(port), *options, port=port) for port in ports]
    addresses = [f"127.0.0.1:{port}" for port in ports]
    redis_cli(ports[0], "--cluster", "create", *addresses, "--cluster-yes")
    deadline = time.monotonic() + WAIT_SECONDS
    while not all("cluster_state:ok" in redis_cli(port, "cluster", "info") for port in ports):
        assert time.monotonic() < deadline, "the cluster did not form"
    return nodes


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def acl_file(path: Path, line: str, password: str) -> Path:
    """An ACL file with one user of ours; the default user may do nothing."""
    path.write_text(f"user default off\n{line.replace('PASSWORD', password)}\n", encoding="utf-8")
    return path


def documented_acl_line(document: Path) -> str:
    """The line of the documents that begins with "user specinfer"."""
    lines: Sequence[str] = document.read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith("user specinfer "))
