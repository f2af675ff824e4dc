"""A TCP proxy that breaks: it passes bytes on between client and server until told not to.

It cuts after so many bytes from the server, or at once on command, and can stop reading from the
server, which is what a client that stalls looks like. It knows nothing of what the bytes mean.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

CHUNK_BYTES = 4096


class LinkBreaker:
    """A proxy in front of one address.

    Attributes:
        address: where it listens.
        num_connections: connections so far.
        num_cut: connections that it has cut.
        num_bytes: bytes passed to clients since the last `cut_after`, on all connections.
    """

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._server: asyncio.Server | None = None
        self._links: set[asyncio.Task[None]] = set()
        self._limit: int | None = None
        self._flowing = asyncio.Event()
        self._flowing.set()
        self.address = ""
        self.num_connections = 0
        self.num_cut = 0
        self.num_bytes = 0

    async def start(self) -> None:
        """Listen on a free port."""
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()[:2]
        self.address = f"{host}:{port}"

    async def stop(self) -> None:
        """Cut everything and listen no more."""
        assert self._server is not None
        self._server.close()
        self._flowing.set()
        await self.cut()
        await self._server.wait_closed()

    def cut_after(self, num_bytes: int | None) -> None:
        """Cut the connection that carries the byte after so many more from the server, once."""
        self.num_bytes = 0
        self._limit = num_bytes

    async def cut(self) -> None:
        """Close every connection now."""
        links = list(self._links)
        for link in links:
            link.cancel()
        await asyncio.gather(*links, return_exceptions=True)
        self.num_cut += len(links)

    async def lead_to(self, target: str) -> None:
        """Cut everything; whoever connects from now on comes out at another address."""
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        await self.cut()

    def stall(self) -> None:
        """Read nothing more from the server, so that what it sends piles up."""
        self._flowing.clear()

    def flow(self) -> None:
        """Read again."""
        self._flowing.set()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        link = asyncio.create_task(self._link(reader, writer))
        self._links.add(link)
        link.add_done_callback(self._links.discard)

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers = [writer]
        try:
            up_reader, up_writer = await asyncio.open_connection(*self._target)
            writers.append(up_writer)
            ways = [
                asyncio.create_task(self._up(reader, up_writer)),
                asyncio.create_task(self._down(up_reader, writer)),
            ]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        finally:
            for each in writers:
                # In the middle of whatever was said: no end of a stream, no goodbye.
                each.transport.abort()

    async def _up(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(CHUNK_BYTES):
                writer.write(data)
                await writer.drain()

    async def _down(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while True:
                await self._flowing.wait()
                data = await reader.read(CHUNK_BYTES)
                if not data:
                    return
                kept = data if self._limit is None else data[: self._limit - self.num_bytes]
                self.num_bytes += len(kept)
                writer.write(kept)
                await writer.drain()
                if len(kept) < len(data):
                    self._limit = None
                    self.num_cut += 1
                    # What was written has to reach the client before the end does.
                    await _flushed(writer)
                    return


async def _flushed(writer: asyncio.StreamWriter) -> None:
    writer.transport.set_write_buffer_limits(high=0)
    await writer.drain()


@asynccontextmanager
async def broken_link(target: str) -> AsyncIterator[LinkBreaker]:
    """A proxy in front of `target` for the length of the block."""
    link = LinkBreaker(target)
    await link.start()
    try:
        yield link
    finally:
        await link.stop()
