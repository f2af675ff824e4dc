"""Child processes and ports: start, watch, read the end of the log, stop all.

This module knows nothing of what the children do beyond gRPC's health protocol.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from specinfer.errors import InvalidRequest, SpecinferError, Unavailable

OPENMP_SPINS = "10000"
TAIL_LINES = 15
TAIL_BYTES = 16 * 1024
POLL_SECONDS = 0.05
HEALTH_TIMEOUT_SECONDS = 2.0
REDIS_TIMEOUT_SECONDS = 5.0
LOOPBACK = ("localhost", "::1")


@dataclass
class Child:
    """A running child.

    Attributes:
        name: what people call it, such as "verify 1".
        process: the process.
        log: file with all it printed.
        address: where its gRPC server listens.
    """

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    address: str

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    def tail(self) -> str:
        """The last lines it printed."""
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - TAIL_BYTES))
            text = log.read().decode(errors="replace")
        return "\n".join(text.splitlines()[-TAIL_LINES:])

    def obituary(self) -> str:
        """How it ended and what it said last."""
        status = self.process.poll()
        how = f"was ended by signal {-status}" if status and status < 0 else f"ended with {status}"
        return f"{self.name} {how}; its last lines:\n{self.tail() or '(nothing)'}"


def start_child(
    name: str,
    module: str,
    arguments: Sequence[str],
    *,
    address: str,
    folder: Path,
    environment: Mapping[str, str] | None = None,
) -> Child:
    """Start `python -m module arguments` in a process group of its own, its output in a file.

    `environment` goes before our own.

    The group keeps a Ctrl-C in the terminal from reaching the children before we have decided in
    which order they end.
    """
    path = folder / f"{name.replace(' ', '-')}.log"
    with path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "specinfer_cli.child", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            # Workers share the cores: compute threads that wait actively in one keep another's
            # from running. The user's own setting goes before ours.
            env={"GOMP_SPINCOUNT": OPENMP_SPINS, **os.environ, **(environment or {})},
            start_new_session=True,
        )
    return Child(name, process, path, address)


def wait_healthy(
    children: Sequence[Child], deadline: float, interrupted: Callable[[], bool]
) -> None:
    """Wait until every child serves, by time.monotonic().

    Raises:
        SpecinferError: when one has ended, with the end of its log.
        Unavailable: when the deadline has passed.
        KeyboardInterrupt: when `interrupted` says so.
    """
    for child in children:
        with grpc.insecure_channel(child.address) as channel:
            while not _serving(channel):
                if interrupted():
                    raise KeyboardInterrupt
                for other in children:
                    if not other.running:
                        raise SpecinferError(other.obituary())
                if time.monotonic() > deadline:
                    raise Unavailable(f"{child.name} is not ready in time\n{child.tail()}")
                time.sleep(POLL_SECONDS)


def _serving(channel: grpc.Channel) -> bool:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    stub: Any = health_pb2_grpc.HealthStub(channel)
    try:
        answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=HEALTH_TIMEOUT_SECONDS)
    except grpc.RpcError:
        return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def stop_children(children: Sequence[Child], grace_seconds: float) -> None:
    """Ask all to end, wait, and kill what is still there. Safe to call for ended children."""
    for child in children:
        if child.running:
            child.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + grace_seconds
    try:
        for child in children:
            child.process.wait(max(0.0, deadline - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        for child in children:
            child.process.kill()
    for child in children:
        child.process.wait()
        if child.process.stdin is not None:
            child.process.stdin.close()


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def held_address(flag: str, address: str, *, insecure_bind: bool = False) -> Iterator[str]:
    """The address with a port of its own instead of port 0, kept for a child in the block.

    A child takes seconds to start, in which the system would give a free port to the next that
    connects somewhere. One that is bound it gives to nobody, and as long as nothing listens there
    a server may.

    Raises:
        InvalidRequest: naming the flag, when the address is none, its port is in use, or it can be
            reached from other machines and `insecure_bind` does not allow it.
    """
    host, port = _host_and_port(flag, address)
    bare = host.strip("[]")
    if not (insecure_bind or bare in LOOPBACK or bare.startswith("127.")):
        raise InvalidRequest(
            f"{flag}: {address} can be reached from other machines, without TLS: "
            "take 127.0.0.1, or allow it with --insecure-bind",
            field=flag.lstrip("-"),
        )
    with socket.socket(socket.AF_INET6 if ":" in bare else socket.AF_INET) as holder:
        # A port whose last connection has just ended may be bound; one that is listened on not.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            holder.bind((bare, port))
        except OSError as error:
            raise InvalidRequest(
                f"{flag}: cannot listen on {address}: {error.strerror or error}; "
                f"choose another port, or 0 for a free one",
                field=flag.lstrip("-"),
            ) from error
        yield f"{host}:{holder.getsockname()[1]}"


def _host_and_port(flag: str, address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise InvalidRequest(f"{flag} is HOST:PORT, got {address!r}", field=flag.lstrip("-"))
    return host, int(port)


def reach_redis(url: str) -> None:
    """Ask a Redis server for a sign of life; raises InvalidRequest when there is none.

    The message leaves the URL out, since it may hold a password.
    """
    import redis

    try:
        with redis.Redis.from_url(
            url,
            socket_timeout=REDIS_TIMEOUT_SECONDS,
            socket_connect_timeout=REDIS_TIMEOUT_SECONDS,
        ) as client:
            client.ping()
    except (redis.RedisError, OSError, ValueError) as error:
        raise InvalidRequest(f"--redis: no answer: {error}", field="redis") from error
