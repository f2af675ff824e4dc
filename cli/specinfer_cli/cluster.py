"""A cluster on this machine as child processes: verify workers, draft workers and a router.

`running_cluster` is what `up`, `lossless` and `bench` stand on, and what a test can use. It speaks
to the services by their flags alone and knows nothing of models or requests.
"""

from __future__ import annotations

import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from specinfer.cores import format_cores, usable_cores, whole_cores
from specinfer.errors import InvalidRequest, Unavailable
from specinfer.registry import check_group
from specinfer_cli.cores import CoreShares, share_cores
from specinfer_cli.processes import (
    Child,
    held_address,
    reach_redis,
    start_child,
    stop_children,
    wait_healthy,
)

WATCH_SECONDS = 0.3
WORKER_DRAIN_SECONDS = 1.0


@dataclass(frozen=True)
class ClusterSettings:
    """What to start.

    Attributes:
        model: the target's folder.
        draft: the drafter's folder, or None to decode without guesses.
        name: what clients call the model; "" is the target folder's name.
        num_drafters: draft workers; ignored without a drafter.
        num_verifiers: verify workers.
        redis: URL of the Redis that keeps sessions and lists the workers, or None to keep sessions
            in the router's memory and tell it the workers' addresses.
        group: name that workers and routers find each other by in Redis.
        grpc_address: where the router listens; port 0 takes a free one.
        gateway_address: where it answers health and metrics over HTTP.
        admin_address: where it answers operators, on this machine; "" for nowhere.
        dtype: number format of the target and the drafter.
        keys: file of API keys, "redis" for those in `redis`, or "" to ask for none.
        insecure_bind: let the router listen beyond this machine, without TLS.
        num_threads: compute threads of each worker; None shares the cores of this process out among
            the verify workers and gives each drafter one, see `cores.share_cores`.
        logs: folder for the children's logs; None uses a temporary one.
        startup_seconds: how long the workers may take to load.
        grace_seconds: how long running streams may take to finish at the end.
        unix_sockets: let routers reach the workers over files instead of ports.
        verify_flags, draft_flags, router_flags: further flags, which go before ours.
        worker_environment: variables of every worker, which go before ours and the user's.

    Raises:
        InvalidRequest: naming the option that is out of its range.
    """

    model: Path
    draft: Path | None = None
    name: str = ""
    num_drafters: int = 1
    num_verifiers: int = 1
    redis: str | None = None
    group: str = "default"
    grpc_address: str = "127.0.0.1:0"
    gateway_address: str = "127.0.0.1:0"
    admin_address: str = ""
    keys: str = ""
    insecure_bind: bool = False
    dtype: str = "float32"
    num_threads: int | None = None
    logs: Path | None = None
    startup_seconds: float = 300.0
    grace_seconds: float = 10.0
    unix_sockets: bool = False
    verify_flags: tuple[str, ...] = ()
    draft_flags: tuple[str, ...] = ()
    router_flags: tuple[str, ...] = ()
    worker_environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("num_drafters", "num_verifiers"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"{name} is at least 1", field=name)
        if self.num_threads is not None and self.num_threads < 1:
            raise InvalidRequest("num_threads is at least 1", field="num_threads")
        check_group(self.group)

    @property
    def core_shares(self) -> CoreShares:
        """Cores and threads of each worker; looked up now, and the same at each look."""
        num_drafters = 0 if self.draft is None else self.num_drafters
        cores = whole_cores(usable_cores())
        return share_cores(cores, self.num_verifiers, num_drafters, self.num_threads)


@dataclass(frozen=True)
class RunningCluster:
    """A cluster that serves.

    Attributes:
        router: gRPC address for clients.
        gateway: its HTTP address for health and metrics.
        admin: its gRPC address for operators, or "".
        verifiers, drafters: gRPC addresses of the workers.
        children: the processes, the router last.
    """

    router: str
    gateway: str
    verifiers: tuple[str, ...]
    drafters: tuple[str, ...]
    children: tuple[Child, ...]
    admin: str = ""

    def watch(self, interrupted: Callable[[], bool], died: Callable[[Child], None]) -> None:
        """Wait until `interrupted`, and report each child that ends before, once.

        Raises:
            Unavailable: when the router or the last verify worker has ended.
        """
        reported: set[str] = set()
        while not interrupted():
            for child in self.children:
                if not child.running and child.name not in reported:
                    reported.add(child.name)
                    died(child)
            self._check_alive()
            time.sleep(WATCH_SECONDS)

    def _check_alive(self) -> None:
        if not self.children[-1].running:
            raise Unavailable("the router has ended")
        verifiers = [child for child in self.children if child.address in self.verifiers]
        if not any(child.running for child in verifiers):
            raise Unavailable("no verify worker is left")


def _never() -> bool:
    return False


@contextmanager
def running_cluster(
    settings: ClusterSettings, interrupted: Callable[[], bool] = _never
) -> Iterator[RunningCluster]:
    """Start a cluster, wait until it is healthy, and end every process with the block.

    Args:
        settings: what to start.
        interrupted: looked at while waiting; True gives the start up.

    Raises:
        InvalidRequest: when an address is in use or not of this machine alone, or Redis is not
            there.
        SpecinferError: when a child ends during the start, with the last lines of its log.
        Unavailable: when the cluster is not healthy in time.
        KeyboardInterrupt: when interrupted.
    """
    with tempfile.TemporaryDirectory(prefix="specinfer-") as temporary, ExitStack() as held:
        # What the router would refuse is told before anybody waits for workers to load.
        router, gateway, admin = _router_addresses(settings, held)
        if settings.redis is not None:
            reach_redis(settings.redis)
        children: list[Child] = []
        folder = settings.logs or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            sockets = Path(temporary) if settings.unix_sockets else None
            verifiers, drafters = _start_workers(settings, folder, sockets, children, held)
            deadline = time.monotonic() + settings.startup_seconds
            wait_healthy(children, deadline, interrupted)
            flags = _router_flags(settings, router, gateway, verifiers, drafters)
            flags += ["--admin", admin]
            children.append(
                start_child(
                    "router",
                    "specinfer_router",
                    flags,
                    address=router,
                    folder=folder,
                    environment=_environment(settings, "router"),
                )
            )
            wait_healthy(children, deadline, interrupted)
            yield RunningCluster(router, gateway, verifiers, drafters, tuple(children), admin)
        finally:
            # The router first: its streams need the workers to finish.
            stop_children(children[-1:], settings.grace_seconds)
            stop_children(children[:-1], settings.grace_seconds)


def _router_addresses(settings: ClusterSettings, held: ExitStack) -> tuple[str, str, str]:
    """Where the router listens: for clients, over HTTP and, or "", for operators."""
    hold, insecure, admin = held.enter_context, settings.insecure_bind, settings.admin_address
    grpc = hold(held_address("--grpc", settings.grpc_address, insecure_bind=insecure))
    gateway = hold(held_address("--gateway", settings.gateway_address, insecure_bind=insecure))
    addresses = grpc, gateway, hold(held_address("--admin", admin)) if admin else ""
    if len(set(addresses)) < len(addresses):
        raise InvalidRequest(
            f"two of --grpc, --gateway and --admin are {max(addresses, key=addresses.count)}; "
            "each needs a port of its own",
            field="grpc",
        )
    return addresses


def _start_workers(
    settings: ClusterSettings,
    folder: Path,
    sockets: Path | None,
    children: list[Child],
    held: ExitStack,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Start all workers at once; returns the addresses of the verifiers and of the drafters."""
    kinds = [("verify", settings.model)] * settings.num_verifiers
    if settings.draft is not None:
        kinds += [("draft", settings.draft)] * settings.num_drafters
    addresses: dict[str, list[str]] = {"verify": [], "draft": []}
    for kind, model in kinds:
        index = len(addresses[kind])
        if sockets is not None:
            address = f"unix:{sockets / f'{kind}-{index + 1}'}.sock"
        else:
            address = held.enter_context(held_address("--address", "127.0.0.1:0"))
        addresses[kind].append(address)
        children.append(
            start_child(
                f"{kind} {len(addresses[kind])}",
                f"specinfer_{kind}",
                _worker_flags(settings, kind, index, address, model),
                address=address,
                folder=folder,
                environment=_environment(settings, kind),
            )
        )
    return tuple(addresses["verify"]), tuple(addresses["draft"])


def _worker_flags(
    settings: ClusterSettings, kind: str, index: int, address: str, model: Path
) -> list[str]:
    shares = settings.core_shares
    cores = (shares.verify if kind == "verify" else shares.draft)[index]
    threads = shares.verify_threads if kind == "verify" else shares.draft_threads
    return [
        *("--address", address),
        *("--model", str(model)),
        *("--name", settings.name or settings.model.name),
        *("--dtype", settings.dtype),
        *("--threads", str(threads)),
        *(("--cores", format_cores(cores)) if cores else ()),
        # The router has drained before the workers are asked to end.
        *("--drain-seconds", str(WORKER_DRAIN_SECONDS)),
        *("--group", settings.group),
        *(settings.verify_flags if kind == "verify" else settings.draft_flags),
    ]


def _router_flags(
    settings: ClusterSettings,
    router: str,
    gateway: str,
    verifiers: tuple[str, ...],
    drafters: tuple[str, ...],
) -> list[str]:
    flags = ["--grpc", router, "--gateway", gateway]
    flags += ["--drain-seconds", str(settings.grace_seconds), "--group", settings.group]
    # With a Redis the router finds them there, as it does all others of the group.
    if settings.redis is None:
        for address in verifiers:
            flags += ["--verify", address]
        for address in drafters:
            flags += ["--draft", address]
    if settings.keys:
        flags += ["--keys", settings.keys]
    if settings.insecure_bind:
        flags.append("--insecure-bind")
    return [*flags, *settings.router_flags]


def _environment(settings: ClusterSettings, kind: str) -> dict[str, str]:
    ours = {} if kind == "router" else dict(settings.worker_environment)
    # The URL may hold a password, and everybody on the machine may read a command line.
    if settings.redis is not None:
        ours[f"SPECINFER_{kind.upper()}_REDIS"] = settings.redis
    return ours


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set instead of ending the process; main thread only.

    A second signal raises KeyboardInterrupt, which ends the patience of `stop_children`.
    """
    event = threading.Event()

    def stop(number: int, frame: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
