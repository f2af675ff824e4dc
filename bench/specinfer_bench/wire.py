"""Two clients as thin as their protocols allow, so that a comparison sees servers and not clients.

One speaks gRPC without parsing its messages, the other HTTP/1.1 on a bare socket; both note when
each event came and look into it afterwards. This module knows nothing of what is compared.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from dataclasses import dataclass
from typing import Any

import grpc.aio

from specinfer.convert import request_to_wire
from specinfer.errors import InternalError, Unavailable
from specinfer.messages import GenerateRequest
from specinfer.rpc import open_channel

GENERATE = "/specinfer.v1.GenerationService/Generate"
MAX_LINE_BYTES = 1 << 20


@dataclass(frozen=True)
class Arrivals:
    """When the tokens of one stream came, in seconds since the call.

    Attributes:
        seconds: arrival of each event that carries tokens, in order.
        total_seconds: the end of the stream.
    """

    seconds: tuple[float, ...]
    total_seconds: float

    @property
    def first_seconds(self) -> float:
        """Time to the first tokens."""
        return self.seconds[0]

    @property
    def event_seconds(self) -> float:
        """Mean time from one event to the next."""
        return (self.seconds[-1] - self.seconds[0]) / (len(self.seconds) - 1)


class GrpcWire:
    """A gRPC channel that hands out messages as bytes."""

    def __init__(self, address: str) -> None:
        self._channel = open_channel(address)
        self._generate: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = (
            self._channel.unary_stream(GENERATE)
        )

    async def run(self, request: GenerateRequest) -> Arrivals:
        """Stream one request; the first message starts the stream and the last one ends it."""
        wire = request_to_wire(request).SerializeToString()
        begun = time.perf_counter()
        times = [time.perf_counter() async for _ in self._generate(wire)]
        ended = time.perf_counter()
        return _arrivals(begun, times[1:-1], ended)

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close(None)


class HttpWire:
    """One HTTP/1.1 connection that is kept open between requests.

    With `receive_bytes` it holds no more than about that much of what nobody has read.
    """

    def __init__(self, address: str, receive_bytes: int = 0) -> None:
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        self._receive_bytes = receive_bytes
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def run(self, path: str, body: dict[str, Any]) -> Arrivals:
        """Stream one request's server-sent events.

        Raises:
            InternalError: when the answer is not a stream of events.
        """
        reader, writer = await self._connected()
        message = self._message(path, body)
        begun = time.perf_counter()
        writer.write(message)
        status, _ = await _head(reader)
        chunks: list[tuple[float, bytes]] = []
        while size := int(await reader.readline(), 16):
            chunk = await reader.readexactly(size + 2)
            chunks.append((time.perf_counter(), chunk))
        await reader.readline()
        ended = time.perf_counter()
        if status != 200:
            raise InternalError(f"the gateway answered {status}: {chunks!r}")
        return _arrivals(begun, [when for when, chunk in chunks if _has_tokens(chunk)], ended)

    async def open(self, path: str, body: dict[str, Any]) -> str:
        """Begin a stream and read its head alone; returns the request's id."""
        reader, writer = await self._connected()
        writer.write(self._message(path, body))
        status, request_id = await _head(reader)
        if status != 200:
            raise InternalError(f"the gateway answered {status}")
        return request_id

    async def close(self) -> None:
        """Close the connection."""
        if self._streams is not None:
            self._streams[1].close()
            await self._streams[1].wait_closed()

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._streams is None:
            try:
                self._streams = await self._connect()
            except OSError as error:
                raise Unavailable(f"no gateway at {self._host}:{self._port}: {error}") from error
        return self._streams

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if not self._receive_bytes:
            return await asyncio.open_connection(self._host, self._port, limit=MAX_LINE_BYTES)
        link = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._receive_bytes)
        link.setblocking(False)
        await asyncio.get_running_loop().sock_connect(link, (self._host, self._port))
        return await asyncio.open_connection(sock=link, limit=self._receive_bytes)

    def _message(self, path: str, body: dict[str, Any]) -> bytes:
        content = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nhost: {self._host}:{self._port}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
        )
        return head.encode() + content


async def _head(reader: asyncio.StreamReader) -> tuple[int, str]:
    """Read an answer's head; returns its status and the request's id. The body comes in chunks."""
    status = int((await reader.readline()).split()[1])
    headers: dict[bytes, bytes] = {}
    while (line := await reader.readline()) != b"\r\n":
        name, _, value = line.lower().partition(b":")
        headers[name] = value.strip()
    if headers.get(b"transfer-encoding") != b"chunked":
        raise InternalError(f"the gateway answered {status} and no stream")
    return status, headers.get(b"x-request-id", b"").decode()


def _has_tokens(chunk: bytes) -> bool:
    """Whether one chunk of the body holds an event with text."""
    for line in chunk.split(b"\n"):
        if not line.startswith(b"data: {"):
            continue
        for choice in json.loads(line[6:]).get("choices", ()):
            # What the end brings with it comes without a round of its own.
            if choice.get("finish_reason") is not None:
                continue
            if choice.get("text") or choice.get("delta", {}).get("content"):
                return True
    return False


def _arrivals(begun: float, times: list[float], ended: float) -> Arrivals:
    if len(times) < 2:
        raise InternalError(f"a stream of {len(times)} events cannot be compared")
    return Arrivals(tuple(when - begun for when in times), ended - begun)
