"""What `/metrics` answers, and a small server for processes that have no other HTTP port.

Prometheus's text, or OpenMetrics with exemplars for whoever asks for it. This module knows nothing
of what is counted.
"""

from __future__ import annotations

import asyncio
import ssl
from contextlib import suppress
from dataclasses import dataclass

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from specinfer.errors import InvalidRequest
from specinfer.rpc import TlsSettings

MAX_CONNECTIONS = 16
MAX_HEAD_BYTES = 8 * 1024
CONNECTION_SECONDS = 5.0
_LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")


def expose(registry: CollectorRegistry, accept: str | None = None) -> tuple[bytes, str]:
    """The metrics and their content type, in the format that an Accept header asks for."""
    encode, content_type = choose_encoder(accept or "")
    return encode(registry), content_type


async def expose_aside(registry: CollectorRegistry, accept: str | None = None) -> tuple[bytes, str]:
    """As `expose`: the values are of this moment, and a thread writes them out.

    Writing takes ten times as long as reading, and the event loop has rounds to serve.
    """
    encode, content_type = choose_encoder(accept or "")
    taken = _Taken(tuple(registry.collect()))
    return await asyncio.to_thread(encode, taken), content_type


@dataclass(frozen=True)
class _Taken(Collector):
    """Metrics as they were."""

    families: tuple[Metric, ...]

    def collect(self) -> tuple[Metric, ...]:
        return self.families


class MetricsServer:
    """Answers `GET /metrics` and nothing else, one request a connection.

    Attributes:
        port: where it listens, once started.
    """

    def __init__(
        self,
        address: str,
        registry: CollectorRegistry,
        *,
        tls: TlsSettings | None = None,
        insecure_bind: bool = False,
    ) -> None:
        """Take down where to listen; port 0 takes a free one.

        Raises:
            InvalidRequest: the address is none, or reachable from other machines without TLS and
                `insecure_bind` does not allow it; a TLS file is none.
        """
        host, _, port = address.rpartition(":")
        if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
            raise InvalidRequest(
                f"{address!r} is no address; one looks like 127.0.0.1:9100", field="metrics"
            )
        if host not in _LOOPBACK and tls is None and not insecure_bind:
            raise InvalidRequest(
                f"the metrics at {address} can be reached from other machines without TLS; give "
                "certificates, bind to 127.0.0.1, or allow it with --insecure-bind",
                field="metrics",
            )
        self.port = int(port)
        self._address = address
        self._host = host.strip("[]")
        self._registry = registry
        self._tls = None if tls is None else _tls_context(tls)
        # In the order of their arrival, as far as they have not sent a request yet.
        self._waiting: dict[asyncio.StreamWriter, None] = {}
        self._num_connections = 0
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Begin to serve; raises InvalidRequest when the port is in use."""
        try:
            self._server = await asyncio.start_server(
                self._serve, self._host, self.port, ssl=self._tls, limit=MAX_HEAD_BYTES
            )
        except OSError as error:
            raise InvalidRequest(
                f"cannot listen on {self._address} for metrics: {error}", field="metrics"
            ) from error
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """End; connections in progress have a few seconds at most anyway."""
        server, self._server = self._server, None
        if server is not None:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._num_connections += 1
        try:
            if self._make_room():
                self._waiting[writer] = None
                async with asyncio.timeout(CONNECTION_SECONDS):
                    head = await reader.readuntil(b"\r\n\r\n")
                    self._waiting.pop(writer, None)
                    writer.write(await self._answer(head))
                    await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # whoever sends no request in time, or goes away, gets no answer
        finally:
            self._num_connections -= 1
            self._waiting.pop(writer, None)
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    def _make_room(self) -> bool:
        """Whether one more may stay: the oldest that has sent no request goes for it.

        Idle sockets would else keep Prometheus out for as long as somebody opens new ones.
        """
        if self._num_connections > MAX_CONNECTIONS and self._waiting:
            oldest = next(iter(self._waiting))
            del self._waiting[oldest]
            oldest.transport.abort()
            return True
        return self._num_connections <= MAX_CONNECTIONS

    async def _answer(self, head: bytes) -> bytes:
        request, *lines = head.decode("latin-1").split("\r\n")
        method, _, rest = request.partition(" ")
        path = rest.partition(" ")[0].partition("?")[0]
        if path != "/metrics":
            return _response("404 Not Found", b"only /metrics is here\n", "text/plain")
        if method not in ("GET", "HEAD"):
            return _response("405 Method Not Allowed", b"only GET is answered\n", "text/plain")
        headers = [line.partition(":") for line in lines]
        accepted = ",".join(v.strip() for name, _, v in headers if name.lower() == "accept")
        body, content_type = await expose_aside(self._registry, accepted)
        return _response("200 OK", body, content_type, with_body=method == "GET")


def _response(status: str, body: bytes, content_type: str, *, with_body: bool = True) -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
        "X-Content-Type-Options: nosniff\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + (body if with_body else b"")


def _tls_context(tls: TlsSettings) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        if tls.certificate is None:
            raise InvalidRequest("metrics over TLS need a certificate and its key", field="tls")
        context.load_cert_chain(tls.certificate, tls.key)
        if tls.ca is not None:
            context.load_verify_locations(tls.ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ssl.SSLError) as error:
        raise InvalidRequest(
            f"the metrics cannot be served with these certificates: {error}", field="tls"
        ) from error
    return context
