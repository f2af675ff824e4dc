"""A whole cluster of processes with a proxy on every link: routers, workers and Redis.

A link is named after what it leads to: "verify 1", "draft 2", "client grpc 1" and "client http 1"
for the two doors of a router, "redis router 1" for what a process says to Redis. This module knows
nothing of load, of the names of faults or of what is measured.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from specinfer import AsyncClient, Capabilities
from specinfer.errors import InvalidRequest, SpecinferError, Unavailable
from specinfer_bench.chaos import redis as servers
from specinfer_bench.chaos.processes import Process, end_all, free_port, serves
from specinfer_bench.chaos.proxy import FaultProxy, LinkFault

HEAL_SECONDS = 120.0
POLL_SECONDS = 0.1
SMALL_DISK = "16m"
FAKETIME = "/usr/lib/*/faketime/libfaketimeMT.so.1"


@dataclass(frozen=True)
class ClusterOptions:
    """What to start.

    Attributes:
        model: the target's folder.
        draft: the drafter's folder.
        num_routers, num_verifiers, num_drafters: processes of each kind.
        dtype: number format of both models.
        kv_blocks: KV blocks of each verify worker; None takes its own default.
        replica: also start a second Redis that follows the first one.
        small_disk: keep Redis's files on a file system that can be filled; needs root.
        skew: seconds by which the clocks of processes are wrong, by name.
        worker_flags, router_flags: more flags.
    """

    model: Path
    draft: Path
    num_routers: int = 2
    num_verifiers: int = 2
    num_drafters: int = 2
    dtype: str = "float32"
    kv_blocks: int | None = None
    replica: bool = False
    small_disk: bool = False
    skew: tuple[tuple[str, float], ...] = ()
    worker_flags: tuple[str, ...] = ()
    router_flags: tuple[str, ...] = ()


@dataclass
class ChaosCluster:
    """A cluster that can be broken.

    Attributes:
        options: what was asked for.
        folder: logs and Redis's data.
        processes: by name.
        links: by name.
        addresses: where processes listen themselves, by name; of routers, gRPC.
        metrics: where routers and workers show their metrics over HTTP, by name.
        redis_port: where the first Redis listens.
    """

    options: ClusterOptions
    folder: Path
    processes: dict[str, Process] = field(default_factory=dict)
    links: dict[str, FaultProxy] = field(default_factory=dict)
    addresses: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, str] = field(default_factory=dict)
    redis_port: int = 0

    @property
    def routers(self) -> tuple[str, ...]:
        """gRPC addresses for clients, through their links."""
        return self._clients("grpc")

    @property
    def gateways(self) -> tuple[str, ...]:
        """HTTP addresses for clients, through their links."""
        return self._clients("http")

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        return self.options.model.name

    @property
    def redis_folder(self) -> Path:
        """Where the first Redis keeps its files."""
        return self.folder / "redis"

    def matching(self, pattern: str) -> list[Process]:
        """The processes of a name with wildcards; raises InvalidRequest when there are none."""
        found = [one for name, one in self.processes.items() if fnmatchcase(name, pattern)]
        if not found:
            raise InvalidRequest(f"no process is called {pattern}", field="name")
        return found

    async def apply(self, pattern: str, fault: LinkFault) -> None:
        """Do something to every link of a name with wildcards."""
        found = [link for name, link in self.links.items() if fnmatchcase(name, pattern)]
        if not found:
            raise InvalidRequest(f"no link is called {pattern}", field="name")
        await asyncio.gather(*(link.apply(fault) for link in found))

    async def heal(self) -> None:
        """Mend all links, start what has ended, and wait until every router sees every worker.

        Raises:
            SpecinferError: a process does not come back.
        """
        servers.empty(self.redis_folder)
        await self.apply("*", LinkFault())
        for process in self.processes.values():
            process.send(signal.SIGCONT)
            if not process.running:
                process.launch()
        await asyncio.gather(*(process.wait_ready() for process in self.processes.values()))
        deadline = time.monotonic() + HEAL_SECONDS
        for name in self._names("router"):
            await self._whole(name, deadline)

    async def capabilities(self, router: str) -> Capabilities:
        """What a router says of the cluster, asked directly."""
        async with AsyncClient(self.addresses[router], timeout=5.0) as client:
            return await client.capabilities()

    async def _whole(self, router: str, deadline: float) -> None:
        wanted = (self.options.num_verifiers, self.options.num_drafters)
        found = (-1, -1)
        while found != wanted:
            if time.monotonic() > deadline:
                raise Unavailable(f"{router} sees {found} verify and draft workers, not {wanted}")
            await asyncio.sleep(POLL_SECONDS)
            try:
                told = await self.capabilities(router)
            except SpecinferError:
                continue
            found = (told.num_verifiers, told.num_drafters)

    def _clients(self, kind: str) -> tuple[str, ...]:
        numbers = range(1, self.options.num_routers + 1)
        return tuple(self.links[f"client {kind} {number}"].address for number in numbers)

    def _names(self, kind: str) -> list[str]:
        return [name for name in self.processes if name.rstrip("0123456789 ") == kind]

    async def start(self) -> None:
        """Start everything and wait until it is whole; raises SpecinferError when it does not."""
        self._add_redis()
        await self.processes["redis"].start()
        if self.options.replica:
            await self.processes["replica"].start()
        for kind, number in (
            ("verify", self.options.num_verifiers),
            ("draft", self.options.num_drafters),
        ):
            for index in range(1, number + 1):
                await self._add_worker(kind, index)
        for index in range(1, self.options.num_routers + 1):
            await self._add_router(index)
        await self.heal()

    async def stop(self) -> None:
        """End everything."""
        for link in self.links.values():
            await link.stop()
        await end_all([one for name, one in self.processes.items() if name != "redis"])
        await end_all([one for name, one in self.processes.items() if name == "redis"])
        if self.options.small_disk:
            servers.unmount(self.redis_folder)

    async def _link(self, name: str, target: str) -> str:
        link = self.links[name] = FaultProxy(target, seed=len(self.links))
        await link.start()
        return link.address

    def _add_redis(self) -> None:
        self.redis_folder.mkdir()
        if self.options.small_disk:
            servers.mount_small(self.redis_folder, SMALL_DISK)
        self.redis_port = free_port()
        self._add(
            "redis",
            servers.redis_command(self.redis_port, self.redis_folder),
            servers.answers(self.redis_port),
            f"127.0.0.1:{self.redis_port}",
        )
        if self.options.replica:
            folder = self.folder / "replica"
            folder.mkdir()
            port = free_port()
            self._add(
                "replica",
                servers.redis_command(port, folder, self.redis_port),
                servers.answers(port, replica=True),
                f"127.0.0.1:{port}",
            )

    async def _add_worker(self, kind: str, index: int) -> None:
        name, address = f"{kind} {index}", f"127.0.0.1:{free_port()}"
        link = await self._link(name, address)
        self.metrics[name] = f"127.0.0.1:{free_port()}"
        model = self.options.model if kind == "verify" else self.options.draft
        flags = ["--address", address, "--advertise", link, "--model", str(model)]
        flags += ["--name", self.options.model.name, "--dtype", self.options.dtype]
        flags += ["--worker-id", name.replace(" ", "-"), "--threads", "1"]
        flags += ["--metrics", self.metrics[name]]
        if kind == "verify" and self.options.kv_blocks is not None:
            flags += ["--kv-blocks", str(self.options.kv_blocks)]
        flags += self.options.worker_flags
        self._add_service(name, f"specinfer_{kind}", flags, address, await self._redis_of(name))

    async def _add_router(self, index: int) -> None:
        # It is told of no worker: they are found in Redis, by the addresses of their links.
        name, address = f"router {index}", f"127.0.0.1:{free_port()}"
        gateway = f"127.0.0.1:{free_port()}"
        self.metrics[name] = gateway
        await self._link(f"client grpc {index}", address)
        await self._link(f"client http {index}", gateway)
        flags = ["--grpc", address, "--gateway", gateway]
        flags += self.options.router_flags
        self._add_service(name, "specinfer_router", flags, address, await self._redis_of(name))

    async def _redis_of(self, name: str) -> str:
        link = await self._link(f"redis {name}", f"127.0.0.1:{self.redis_port}")
        return f"redis://{link}/0"

    def _add_service(
        self, name: str, module: str, flags: list[str], address: str, redis_url: str
    ) -> None:
        environment = {f"{module.upper()}_REDIS": redis_url}
        seconds = dict(self.options.skew).get(name)
        if seconds is not None:
            environment |= _skewed(seconds)
        command = [sys.executable, "-m", module, *flags]
        self._add(name, command, serves(address), address, environment)

    def _add(
        self,
        name: str,
        command: list[str],
        ready: servers.Check,
        address: str,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        log = self.folder / f"{name.replace(' ', '-')}.log"
        self.processes[name] = Process(name, command, log, ready, environment or {})
        self.addresses[name] = address


@asynccontextmanager
async def chaos_cluster(
    options: ClusterOptions, logs: Path | None = None
) -> AsyncIterator[ChaosCluster]:
    """A cluster for the length of the block; `logs` keeps its folder.

    Raises:
        SpecinferError: a process does not start.
    """
    with tempfile.TemporaryDirectory(prefix="specinfer-chaos-") as temporary:
        folder = logs or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        cluster = ChaosCluster(options, folder)
        try:
            await cluster.start()
            yield cluster
        finally:
            await cluster.stop()


def faketime() -> Path | None:
    """The library that gives a process a wrong clock, or None where it is not installed."""
    return next(iter(sorted(Path("/").glob(FAKETIME.lstrip("/")))), None)


def _skewed(seconds: float) -> dict[str, str]:
    library = faketime()
    if library is None:
        raise Unavailable("libfaketime is not installed")
    # Timers go on as they are: a clock that is wrong, not one that jumps.
    return {
        "LD_PRELOAD": str(library),
        "FAKETIME": f"{seconds:+.0f}s",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
