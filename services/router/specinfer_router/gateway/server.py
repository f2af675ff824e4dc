"""The HTTP server: a socket and uvicorn in the router's own event loop.

Routes are given to it. This module knows nothing of what they answer, of sessions, workers or gRPC.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence

import uvicorn
from starlette.applications import Starlette
from starlette.routing import Route

from specinfer.errors import InvalidRequest

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Gateway:
    """An HTTP server on the running event loop, started and stopped by whoever owns it.

    Attributes:
        port: where it listens, once bound.
    """

    def __init__(
        self, address: str, routes: Sequence[Route], *, insecure_bind: bool = False
    ) -> None:
        """Bind `address` (port 0 takes a free one).

        Raises:
            InvalidRequest: the address is none, in use, or reachable from other machines and
                `insecure_bind` does not allow it.
        """
        host, port = _host_and_port(address)
        if host not in _LOOPBACK and not insecure_bind:
            raise InvalidRequest(
                f"the gateway at {address} can be reached from other machines without TLS; "
                "bind to 127.0.0.1, or allow it with --insecure-bind",
                field="gateway",
            )
        self._socket = _bind(host, port)
        self.port: int = self._socket.getsockname()[1]
        config = uvicorn.Config(
            Starlette(routes=list(routes)),
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=1024,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=10,
        )
        config.load()
        self._server = uvicorn.Server(config)
        self._server.lifespan = config.lifespan_class(config)
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to serve."""
        await self._server.startup(sockets=[self._socket])
        # Not `serve`, which would take the process's signals for itself.
        self._serving = asyncio.create_task(self._server.main_loop(), name="gateway")

    async def stop(self) -> None:
        """Finish what is in progress and end."""
        if self._serving is None:
            self._socket.close()
            return
        self._server.should_exit = True
        await self._serving
        await self._server.shutdown(sockets=[self._socket])


def _host_and_port(address: str) -> tuple[str, int]:
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdecimal() or int(port) > 65535:
        raise InvalidRequest(
            f"{address!r} is no address; one looks like 127.0.0.1:8000", field="gateway"
        )
    return host.strip("[]"), int(port)


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise InvalidRequest(
            f"the gateway cannot listen on {host}:{port}: {error.strerror}", field="gateway"
        ) from error
    return listener
