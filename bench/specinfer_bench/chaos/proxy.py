"""A TCP proxy that stands between two tiers and does to their bytes what networks do.

It passes bytes on, late, slowly, in stalls, damaged or not at all, or cuts every connection. What
waits in it is bounded: beyond that it stops reading, as a full socket would. It knows nothing of
what the bytes mean.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

CHUNK_BYTES = 16 * 1024
MAX_CHUNKS = 64


@dataclass(frozen=True)
class LinkFault:
    """What is wrong with a link; the default is nothing.

    Attributes:
        delay: seconds that every byte is late, in each direction.
        jitter: seconds more, at most, chosen at random for each chunk; order is kept.
        bytes_per_second: bandwidth of each direction; 0 has no bound.
        stall_chance: share of chunks that come late by `stall_seconds`, as after a lost packet.
        stall_seconds: how late those are.
        flip_chance: share of chunks from the server in which one byte is another.
        blackhole: nothing is passed on, and nobody is told.
        refuse: connections are cut, and new ones too.
    """

    delay: float = 0.0
    jitter: float = 0.0
    bytes_per_second: int = 0
    stall_chance: float = 0.0
    stall_seconds: float = 0.0
    flip_chance: float = 0.0
    blackhole: bool = False
    refuse: bool = False


class _Chunk(NamedTuple):
    due: float
    data: bytes


class FaultProxy:
    """A proxy in front of one address.

    Attributes:
        address: where it listens, once started.
        num_connections: connections so far.
    """

    def __init__(self, target: str, *, seed: int = 0) -> None:
        """Stand in front of `target`, HOST:PORT; `seed` decides what is left to chance."""
        self.address = ""
        self.num_connections = 0
        self._target = target
        self._fault = LinkFault()
        self._chance = random.Random(seed)
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._server: asyncio.Server | None = None
        self._links: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen on a free loopback port."""
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()[:2]
        self.address = f"{host}:{port}"

    async def stop(self) -> None:
        """Cut everything and listen no more."""
        if self._server is not None:
            self._server.close()
        self._flowing.set()
        await self.cut()

    async def apply(self, fault: LinkFault) -> None:
        """Do this to the link from now on; LinkFault() mends it."""
        self._fault = fault
        if fault.blackhole:
            self._flowing.clear()
        else:
            self._flowing.set()
        if fault.refuse:
            await self.cut()

    async def cut(self) -> None:
        """Reset every connection now; new ones are served."""
        links = list(self._links)
        for link in links:
            link.cancel()
        await asyncio.gather(*links, return_exceptions=True)

    async def retarget(self, target: str) -> None:
        """Stand in front of another address, as a service does after a failover."""
        self._target = target
        await self.cut()

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        if self._fault.refuse:
            writer.transport.abort()
            return
        link = asyncio.create_task(self._link(reader, writer))
        self._links.add(link)
        link.add_done_callback(self._links.discard)

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers = [writer]
        host, _, port = self._target.rpartition(":")
        try:
            await self._flowing.wait()
            up_reader, up_writer = await asyncio.open_connection(host, int(port))
            writers.append(up_writer)
            ways = [
                asyncio.create_task(self._way(reader, up_writer, bytes)),
                asyncio.create_task(self._way(up_reader, writer, self._damaged)),
            ]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        except OSError:
            pass  # nobody listens there: the other side is reset below
        finally:
            for each in writers:
                each.transport.abort()

    async def _way(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        change: Callable[[bytes], bytes],
    ) -> None:
        chunks: asyncio.Queue[_Chunk] = asyncio.Queue(MAX_CHUNKS)
        taking = asyncio.create_task(self._take(reader, chunks))
        try:
            with suppress(ConnectionError):
                while data := await self._next(chunks):
                    writer.write(change(data))
                    await writer.drain()
                await _flushed(writer)
        finally:
            taking.cancel()
            await asyncio.gather(taking, return_exceptions=True)

    async def _take(self, reader: asyncio.StreamReader, chunks: asyncio.Queue[_Chunk]) -> None:
        due = 0.0
        data = b"-"
        while data:
            try:
                data = await reader.read(CHUNK_BYTES)
            except ConnectionError:
                data = b""
            # Never before the chunk ahead of it: TCP keeps the order.
            due = max(due, asyncio.get_running_loop().time() + self._lateness())
            await chunks.put(_Chunk(due, data))

    async def _next(self, chunks: asyncio.Queue[_Chunk]) -> bytes:
        chunk = await chunks.get()
        wait = chunk.due - asyncio.get_running_loop().time()
        if wait > 0:
            await asyncio.sleep(wait)
        if self._fault.bytes_per_second:
            await asyncio.sleep(len(chunk.data) / self._fault.bytes_per_second)
        await self._flowing.wait()
        return chunk.data

    def _lateness(self) -> float:
        fault = self._fault
        late = fault.delay + fault.jitter * self._chance.random()
        if fault.stall_chance and self._chance.random() < fault.stall_chance:
            late += fault.stall_seconds
        return late

    def _damaged(self, data: bytes) -> bytes:
        if not self._fault.flip_chance or self._chance.random() >= self._fault.flip_chance:
            return data
        changed = bytearray(data)
        changed[self._chance.randrange(len(changed))] ^= 1 << self._chance.randrange(8)
        return bytes(changed)


async def _flushed(writer: asyncio.StreamWriter) -> None:
    """Wait until the other side's socket has taken all, so that an end does not overtake it."""
    writer.transport.set_write_buffer_limits(high=0)
    await writer.drain()
