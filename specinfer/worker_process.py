"""How a draft or verify worker's process runs: build, serve, drain, end. Needs the `serve` extra.

This module knows nothing of models, trees or what a tier's service does.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import grpc.aio
from prometheus_client import CollectorRegistry

from specinfer.announcing import Announcer, advertised_address
from specinfer.errors import InternalError, SpecinferError
from specinfer.messages import WorkerInfo, WorkerLoad
from specinfer.metrics import MetricsServer
from specinfer.prefixes import PrefixChanges, PrefixPublisher
from specinfer.redis_registry import RedisPrefixes, RedisRegistry
from specinfer.registry import RegisteredWorker
from specinfer.server import build_server, fastest_loop, serve_until_signal
from specinfer.telemetry import Telemetry, set_up
from specinfer.unix_sockets import socket_path
from specinfer.worker_settings import WorkerSettings

log = logging.getLogger(__name__)

_Settings = TypeVar("_Settings", bound=WorkerSettings)


class WorkerEngine(Protocol):
    """What a process needs of its engine; every method may be called from any thread."""

    @property
    def healthy(self) -> bool:
        """Whether the engine's thread runs."""
        ...

    def start(self) -> None:
        """Start the engine's thread."""
        ...

    def load(self) -> WorkerLoad:
        """How busy the engine is."""
        ...

    def drain(self, timeout: float) -> bool:
        """Refuse new sessions and wait for the open ones; whether they all ended in time."""
        ...

    def stop(self) -> None:
        """End the thread; what is pending fails with Unavailable."""
        ...


class Count(Protocol):
    """Registers a worker's metrics."""

    def __call__(self, registry: CollectorRegistry, *, vllm_names: bool) -> None:
        """Show them in `registry`, under vLLM's names too where that is asked for."""
        ...


@dataclass(frozen=True)
class ServedWorker:
    """A worker that is ready to be served.

    Attributes:
        engine: does the work; not started yet.
        info: what the worker is.
        register: adds the tier's servicer to a server.
        count: lets the engine count in a registry; called before it is started.
        prefixes: what comes to its KV pool and leaves it, to be published; None keeps it private.
    """

    engine: WorkerEngine
    info: WorkerInfo
    register: Callable[[grpc.aio.Server], None]
    count: Count
    prefixes: PrefixChanges | None = None


Build = Callable[[Callable[[], None]], ServedWorker]


async def serve_worker(
    settings: WorkerSettings, *, tier: str, service_name: str, build: Build
) -> None:
    """Serve until a signal ends the process; sessions then have `drain_seconds` to finish.

    Args:
        settings: of the worker.
        tier: "draft" or "verify".
        service_name: full name of its gRPC service.
        build: makes the worker, in a thread of its own; it is given what to call when the engine
            fails, from whatever thread.

    Raises:
        SpecinferError: it cannot start, or its engine failed.
    """
    # Like every port, that of the metrics is taken before anybody waits for a model to load.
    async with _metrics(settings) as registry:
        await _serve(settings, tier, service_name, build, registry)


@asynccontextmanager
async def _metrics(settings: WorkerSettings) -> AsyncGenerator[CollectorRegistry | None, None]:
    """What is shown under `/metrics`, or None where nobody is to see it."""
    if not settings.metrics:
        yield None
        return
    registry = CollectorRegistry()
    server = MetricsServer(
        settings.metrics, registry, tls=settings.tls, insecure_bind=settings.insecure_bind
    )
    await server.start()
    log.info("showing metrics", extra={"metrics_port": server.port})
    try:
        yield registry
    finally:
        await server.stop()


async def _serve(
    settings: WorkerSettings,
    tier: str,
    service_name: str,
    build: Build,
    registry: CollectorRegistry | None,
) -> None:
    server = build_server(
        settings.address,
        [service_name],
        tls=settings.tls,
        insecure_bind=settings.insecure_bind,
        enable_reflection=settings.reflection,
    )
    # What routers are told is settled before anybody waits for a model to load.
    address = await _address(settings, server.port)
    loop = asyncio.get_running_loop()
    failed = asyncio.Event()

    def report_failure() -> None:
        loop.call_soon_threadsafe(failed.set)

    worker = await _built(build, report_failure)
    worker.register(server.server)
    if registry is not None:
        worker.count(registry, vllm_names=settings.vllm_metrics)
    worker.engine.start()
    await server.start()

    async def drain() -> None:
        waiting = asyncio.to_thread(worker.engine.drain, settings.drain_seconds)
        # Routers hear of it while the engine refuses new sessions and waits for the open ones.
        await asyncio.gather(waiting, *(announcer.drain() for announcer in announcers))

    announcers: list[Announcer] = []
    try:
        async with AsyncExitStack() as stack:
            if address:
                announcers.append(await _announced(settings, tier, address, worker, stack))
            ending = asyncio.create_task(
                serve_until_signal(server, grace_seconds=1.0, on_drain=drain, failed=failed)
            )
            await asyncio.sleep(0)  # whoever reads the next line may send a signal: it listens
            unix = socket_path(settings.address) is not None
            where = f"at {settings.address}" if unix else f"on port {server.port}"
            print(f"{tier} worker {worker.info.worker_id} ready {where}", flush=True)
            await ending
        if failed.is_set():
            raise InternalError("the engine failed while it drained; the log above says why")
    finally:
        await asyncio.to_thread(worker.engine.stop)


async def _built(build: Build, report_failure: Callable[[], None]) -> ServedWorker:
    """Build in a thread that is gone afterwards, and its compute threads with it.

    OpenMP counts the teams of all threads that are left: with more threads than cores it sends
    those that wait to sleep at once, and the engine's thread would pay for that in every product.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="build") as thread:
        return await asyncio.get_running_loop().run_in_executor(thread, build, report_failure)


async def _address(settings: WorkerSettings, port: int) -> str:
    """What routers are told to reach us at, or "" when nobody is told."""
    if not settings.redis:
        return ""
    return await advertised_address(settings.advertise, settings.address, port, settings.redis)


async def _announced(
    settings: WorkerSettings, tier: str, address: str, worker: ServedWorker, stack: AsyncExitStack
) -> Announcer:
    """Put the worker on the list, and off it at the end of `stack`."""
    connection = settings.redis_settings
    assert connection is not None
    info, prefixes = worker.info, None
    registry = RedisRegistry(connection, settings.group)
    stack.push_async_callback(registry.close)
    if worker.prefixes is not None:
        directory = RedisPrefixes(connection, settings.group)
        stack.push_async_callback(directory.close)
        prefixes = PrefixPublisher(directory, info.worker_id, worker.prefixes)
    listed = RegisteredWorker(tier, info.worker_id, address, info.model_hash, info.version)
    announcer = Announcer(registry, listed, worker.engine.load, prefixes)
    stack.push_async_callback(announcer.close)
    announcer.start()
    return announcer


def run_worker(
    program: str,
    read: Callable[[], _Settings],
    serve: Callable[[_Settings, Telemetry], Coroutine[Any, Any, None]],
) -> int:
    """Exit status 0 after a drain, 1 with one line when it cannot start or its engine fails.

    Args:
        program: name of the process, such as "specinfer_verify".
        read: reads the settings.
        serve: makes the coroutine that serves under them.
    """
    telemetry = Telemetry()
    try:
        settings = read()
        telemetry = set_up(
            program.replace("_", "-"),
            level=settings.log_level,
            traces=settings.traces,
            instance=settings.worker_id,
        )
        with asyncio.Runner(loop_factory=fastest_loop()) as runner:
            runner.run(serve(settings, telemetry))
    except SpecinferError as error:
        print(f"{program}: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        telemetry.shut_down()
    return 0
