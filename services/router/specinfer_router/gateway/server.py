"""The HTTP server: a socket, TLS and uvicorn in the router's own event loop.

Routes and whoever knows the keys are given to it. This module knows nothing of what they answer, of
sessions, workers or gRPC.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import Sequence
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import Route

from specinfer.errors import InvalidRequest
from specinfer.rpc import TlsSettings
from specinfer.telemetry import Telemetry
from specinfer_router.access import ANYBODY, Caller
from specinfer_router.gateway.connection import PatientProtocol
from specinfer_router.gateway.errors import http_error
from specinfer_router.gateway.middleware import (
    MAX_HEADER_BYTES,
    Authenticate,
    gateway_middleware,
)
from specinfer_router.gateway.origins import LOOPBACK_NAMES

_ORIGIN = re.compile(r"https?://[a-z0-9.-]+(:[0-9]{1,5})?|https?://\[[0-9a-f:]+\](:[0-9]{1,5})?")
MAX_CONNECTIONS = 2048
SEND_BUFFER_BYTES = 64 * 1024
STOP_SECONDS = 2


class Gateway:
    """An HTTP server on the running event loop, started and stopped by whoever owns it.

    Attributes:
        port: where it listens, once bound.
    """

    def __init__(
        self,
        address: str,
        routes: Sequence[Route],
        *,
        open_routes: Sequence[Route] = (),
        authenticate: Authenticate | None = None,
        cors_origins: Sequence[str] = (),
        tls: TlsSettings | None = None,
        insecure_bind: bool = False,
        telemetry: Telemetry | None = None,
    ) -> None:
        """Bind `address` (port 0 takes a free one).

        Args:
            address: host and port.
            routes: what is served to those with a key.
            open_routes: what is served to everybody.
            authenticate: whose key a bearer token is, or None to let everybody in; raises
                SpecinferError.
            cors_origins: web pages of other origins that may call, such as https://chat.example.
            tls: certificate and key to serve with; with `ca` clients have to show a certificate.
            insecure_bind: allow plain text beyond this machine.
            telemetry: where spans go, or None.

        Raises:
            InvalidRequest: the address is none, in use, or reachable from other machines without
                TLS and `insecure_bind` does not allow it; an origin or a TLS file is none.
        """
        host, port = _host_and_port(address)
        if host not in LOOPBACK_NAMES and tls is None and not insecure_bind:
            raise InvalidRequest(
                f"the gateway at {address} can be reached from other machines without TLS; give "
                "certificates, bind to 127.0.0.1, or allow it with --insecure-bind",
                field="gateway",
            )
        check_origins(cors_origins)
        open_paths = frozenset(route.path for route in open_routes)
        application = Starlette(
            routes=[*open_routes, *routes],
            middleware=gateway_middleware(
                authenticate or _anybody,
                open_paths,
                cors_origins,
                only_loopback=host in LOOPBACK_NAMES,
                telemetry=telemetry or Telemetry(),
            ),
            exception_handlers={HTTPException: http_error},
        )
        config = _configuration(application, tls)
        self._socket = _bind(host, port)
        self.port: int = self._socket.getsockname()[1]
        self._server = uvicorn.Server(config)
        self._server.lifespan = config.lifespan_class(config)
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to serve."""
        await self._server.startup(sockets=[self._socket])
        # Not `serve`, which would take the process's signals for itself.
        self._serving = asyncio.create_task(self._server.main_loop(), name="gateway")

    async def stop(self) -> None:
        """Finish what is in progress, for a moment, and end; again it does nothing."""
        serving, self._serving = self._serving, None
        if serving is None:
            self._socket.close()
            return
        self._server.should_exit = True
        await serving
        await self._server.shutdown(sockets=[self._socket])


def check_origins(origins: Sequence[str]) -> None:
    """Raise InvalidRequest for what is no origin; `*` is none, since any page could call then."""
    for origin in origins:
        if not _ORIGIN.fullmatch(origin):
            raise InvalidRequest(
                f"{origin!r} is no origin; one looks like https://chat.example", field="cors_origin"
            )


def _anybody(token: str | None) -> Caller:
    return ANYBODY


def _configuration(application: Starlette, tls: TlsSettings | None) -> uvicorn.Config:
    config = uvicorn.Config(
        application,
        # Bounds the size of headers and the time they take before they are complete.
        http=PatientProtocol,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=STOP_SECONDS,
        **_tls_options(tls),
    )
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise InvalidRequest(
            f"the gateway cannot serve with these certificates: {error}", field="tls"
        ) from error
    return config


def _tls_options(tls: TlsSettings | None) -> dict[str, Any]:
    if tls is None:
        return {}
    if tls.certificate is None or tls.key is None:
        raise InvalidRequest("a TLS server needs a certificate and its key", field="tls")
    options: dict[str, Any] = {"ssl_certfile": tls.certificate, "ssl_keyfile": tls.key}
    if tls.ca is not None:
        options |= {"ssl_ca_certs": str(tls.ca), "ssl_cert_reqs": ssl.CERT_REQUIRED}
    return options


def _host_and_port(address: str) -> tuple[str, int]:
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdecimal() or int(port) > 65535:
        raise InvalidRequest(
            f"{address!r} is no address; one looks like 127.0.0.1:8000", field="gateway"
        )
    return host.strip("[]"), int(port)


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off for sockets that say they are TCP, and leaves it on
    # otherwise: 40 ms before an event that follows another one closely.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Left alone the kernel holds megabytes, whole answers, for a client that does not read, and
        # nobody would notice that it does not.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise InvalidRequest(
            f"the gateway cannot listen on {host}:{port}: {error.strerror}", field="gateway"
        ) from error
    return listener
