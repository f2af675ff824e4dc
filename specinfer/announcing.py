"""A worker tells the registry that it is there, over and over, and what its KV pool holds.

The registry may be away at any time; serving does not notice. This module knows nothing of gRPC,
models or who reads the registry.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from ipaddress import ip_address
from urllib.parse import urlsplit

from specinfer.errors import InvalidRequest, SpecinferError
from specinfer.messages import WorkerLoad
from specinfer.prefixes import PrefixPublisher
from specinfer.registry import (
    HEARTBEAT_SECONDS,
    RegisteredWorker,
    WorkerRegistry,
    check_address,
)
from specinfer.tasks import end_task
from specinfer.unix_sockets import socket_path

log = logging.getLogger(__name__)

MAX_PAUSE_SECONDS = 1.0
# Longest that an orderly end waits for the registry.
FAREWELL_SECONDS = 1.0
_WIDE = ("", "0.0.0.0", "[::]", "*")


class Announcer:
    """Keeps one worker on the list for as long as it runs."""

    def __init__(
        self,
        registry: WorkerRegistry,
        worker: RegisteredWorker,
        load: Callable[[], WorkerLoad],
        prefixes: PrefixPublisher | None = None,
    ) -> None:
        """Take down whom to announce; `load` is asked at each beat, `prefixes` tells its piece."""
        self._registry = registry
        self._worker = worker
        self._load = load
        self._prefixes = prefixes
        self._draining = False
        self._num_failures = 0
        self._beating = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin, in a task of its own."""
        self._task = asyncio.create_task(self._run(), name="announcer")

    async def drain(self) -> None:
        """Say at once that no new session is taken; beats go on and say so too."""
        self._draining = True
        with suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL_SECONDS):
                await self._beat()

    async def close(self) -> None:
        """Leave the list at once, if the registry can be reached."""
        await end_task(self._task)
        try:
            async with asyncio.timeout(FAREWELL_SECONDS):
                await self._registry.withdraw(self._worker)
                if self._prefixes is not None:
                    await self._prefixes.withdraw()
        except Exception as error:  # whatever it is, the entry expires and the worker ends
            log.info("could not leave %s (%s); the entry expires", self._registry.place, error)

    async def _run(self) -> None:
        while True:
            await self._beat()
            # Workers that were started together, or lost Redis together, are not to come together.
            pause = min(MAX_PAUSE_SECONDS, HEARTBEAT_SECONDS * 2 ** min(self._num_failures, 4))
            await asyncio.sleep(pause * random.uniform(0.8, 1.0))

    async def _beat(self) -> None:
        try:
            async with self._beating:
                load = self._load()
                load = replace(load, draining=load.draining or self._draining)
                await self._registry.announce(replace(self._worker, load=load))
                if self._prefixes is not None:
                    await self._prefixes.publish()
        except SpecinferError as error:
            if self._num_failures == 0:
                log.warning("cannot announce this worker, and go on trying: %s", error.message)
            self._num_failures += 1
            return
        except Exception:
            # A fault of ours is not to take a worker that serves off the list.
            if self._num_failures == 0:
                log.exception("announcing this worker failed; it is tried again")
            self._num_failures += 1
            return
        if self._num_failures:
            log.info("announced again at %s", self._registry.place)
        self._num_failures = 0


async def advertised_address(advertise: str, address: str, port: int, redis_url: str) -> str:
    """Where routers reach a server of this host that listens on `address`.

    A server on loopback is reached there. One that listens everywhere is reached at the address
    that this host has towards Redis, since that is a network which routers share.

    Args:
        advertise: what the operator says, with or without a port; "" to find it out.
        address: what the server was bound to.
        port: the port that it got.
        redis_url: where Redis is.

    Raises:
        InvalidRequest: naming `advertise`, when it cannot be known.
    """
    if advertise:
        host, _, _ = advertise.rpartition(":")
        given = advertise if host and not advertise.endswith("]") else f"{advertise}:{port}"
        check_address(given)
        return given
    host = address.rpartition(":")[0]
    if socket_path(address) is not None:
        host = ""  # a file can be reached from no other host
    elif host in _WIDE:
        host = await asyncio.to_thread(_host_towards, redis_url)
    found = f"{host}:{port}"
    try:
        check_address(found)
    except InvalidRequest as error:
        raise InvalidRequest(
            f"routers cannot be told how to reach {address}; give --advertise HOST:PORT",
            field="advertise",
        ) from error
    return found


def _host_towards(redis_url: str) -> str:
    """This host's address on the way to Redis, or else that of its own name; "" for neither."""
    parts = urlsplit(redis_url)
    found = _address_towards(parts.hostname or "", parts.port or 6379)
    if not found:
        # A name that this host alone has on its loopback says nothing to others.
        found = _address_towards(socket.gethostname(), 9)
        found = "" if not found or ip_address(found).is_loopback else found
    return f"[{found}]" if ":" in found else found


def _address_towards(host: str, port: int) -> str:
    """The address that this host has on the way to another one; "" if there is no way."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        # Nothing is sent: to connect a datagram socket only looks the route up.
        with socket.socket(family, kind) as probe:
            probe.connect(target)
            found: str = probe.getsockname()[0]
    except OSError:
        return ""
    return found.partition("%")[0]
