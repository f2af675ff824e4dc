"""One process that can be killed, stopped, asked to end and started again, always the same one.

This module knows nothing of what a process does; it is told how to see that one is ready.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from specinfer.errors import SpecinferError, Unavailable

TAIL_BYTES = 4096
POLL_SECONDS = 0.05
CHECK_SECONDS = 2.0
START_SECONDS = 120.0
END_SECONDS = 60.0
# Compute threads that wait actively would keep those of other workers from the cores.
OPENMP_SPINS = "10000"


@dataclass
class Process:
    """A process of the cluster.

    Attributes:
        name: what people call it, such as "verify 1".
        command: program and arguments.
        log: file that everything it prints is added to.
        ready: whether it serves; asked until it says so.
        environment: variables beside our own.
        num_starts: how often it was started.
    """

    name: str
    command: Sequence[str]
    log: Path
    ready: Callable[[], Awaitable[bool]]
    environment: Mapping[str, str] = field(default_factory=dict)
    num_starts: int = 0
    _process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        """Whether it is there, stopped or not."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Its process id; raises SpecinferError before its first start."""
        return self._started().pid

    def launch(self) -> None:
        """Start it without waiting for it."""
        self.num_starts += 1
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*_bound_to_us(), *self.command],
                # The services end with this pipe, however we end.
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={"GOMP_SPINCOUNT": OPENMP_SPINS, **os.environ, **self.environment},
                start_new_session=True,
            )

    async def wait_ready(self, seconds: float = START_SECONDS) -> None:
        """Wait until it serves.

        Raises:
            SpecinferError: it has ended, with the end of its log.
            Unavailable: it does not serve in time.
        """
        deadline = time.monotonic() + seconds
        while not await self.ready():
            if not self.running:
                raise SpecinferError(f"{self.name} ended; its last lines:\n{self.tail()}")
            if time.monotonic() > deadline:
                raise Unavailable(f"{self.name} is not ready in time\n{self.tail()}")
            await asyncio.sleep(POLL_SECONDS)

    async def start(self) -> None:
        """Start it and wait until it serves; raises what `wait_ready` does."""
        self.launch()
        await self.wait_ready()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to it, if it is there."""
        if self.running:
            self._started().send_signal(number)

    async def ended(self, seconds: float = END_SECONDS) -> int:
        """Its exit status, once it has ended; raises Unavailable when it does not in time."""
        process = self._started()
        deadline = time.monotonic() + seconds
        while process.poll() is None:
            if time.monotonic() > deadline:
                raise Unavailable(f"{self.name} does not end\n{self.tail()}")
            await asyncio.sleep(POLL_SECONDS)
        if process.stdin is not None:
            process.stdin.close()
        return process.returncode

    async def kill(self) -> None:
        """End it at once, without a word to it."""
        self.send(signal.SIGKILL)
        await self.ended()

    async def terminate(self) -> int:
        """Ask it to end and wait; its exit status."""
        self.send(signal.SIGTERM)
        return await self.ended()

    def tail(self) -> str:
        """The end of what it printed."""
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - TAIL_BYTES))
            return log.read().decode(errors="replace")

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise SpecinferError(f"{self.name} was never started")
        return self._process


async def end_all(processes: Sequence[Process], seconds: float = 10.0) -> None:
    """End what still runs: by request, and by force once the time is up."""
    for process in processes:
        process.send(signal.SIGCONT)
        process.send(signal.SIGTERM)
    for process in processes:
        if process.num_starts:
            try:
                await process.ended(seconds)
            except Unavailable:
                await process.kill()


def serves(address: str) -> Callable[[], Awaitable[bool]]:
    """A check of gRPC's health protocol at an address."""

    async def check() -> bool:
        async with grpc.aio.insecure_channel(address) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            try:
                answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=CHECK_SECONDS)
            except grpc.aio.AioRpcError:
                return False
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    return check


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _bound_to_us() -> list[str]:
    """What makes the kernel end a process when this one is gone, where there is such a thing."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []
