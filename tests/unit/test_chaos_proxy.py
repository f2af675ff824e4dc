"""The proxy between two tiers: what it does to bytes, and that it does nothing else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from specinfer_bench.chaos.proxy import CHUNK_BYTES, MAX_CHUNKS, FaultProxy, LinkFault


class Echo:
    """A server that says what it hears, until told to listen no more."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.mute = False

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                self.num_bytes += len(data)
                if not self.mute:
                    writer.write(data)
                    await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()


@asynccontextmanager
async def proxied() -> AsyncIterator[tuple[FaultProxy, Echo]]:
    echo = Echo()
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    proxy = FaultProxy(f"127.0.0.1:{port}")
    await proxy.start()
    try:
        yield proxy, echo
    finally:
        await proxy.stop()
        server.close()


async def connected(proxy: FaultProxy) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = proxy.address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def said(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes
) -> tuple[bytes, float]:
    """What comes back, and after how many seconds."""
    begun = time.monotonic()
    writer.write(data)
    answer = await asyncio.wait_for(reader.readexactly(len(data)), 20)
    return answer, time.monotonic() - begun


async def test_without_a_fault_bytes_pass_and_an_end_is_passed_on() -> None:
    async with proxied() as (proxy, _):
        reader, writer = await connected(proxy)
        data = bytes(range(256)) * 1000
        assert (await said(reader, writer, data))[0] == data
        writer.write(b"last words")
        writer.write_eof()
        assert await reader.read() in (b"last words", b"")
        writer.close()
        assert proxy.num_connections == 1


@pytest.mark.parametrize(
    ("fault", "at_least"),
    [
        (LinkFault(delay=0.1), 0.2),
        (LinkFault(delay=0.1, jitter=0.05), 0.2),
        (LinkFault(bytes_per_second=2000), 0.2),
        (LinkFault(stall_chance=1.0, stall_seconds=0.15), 0.3),
    ],
)
async def test_bytes_come_late_in_order_and_whole(fault: LinkFault, at_least: float) -> None:
    async with proxied() as (proxy, _):
        reader, writer = await connected(proxy)
        await proxy.apply(fault)
        answer, seconds = await said(reader, writer, bytes(range(200)))
        assert answer == bytes(range(200))
        assert seconds >= at_least
        await proxy.apply(LinkFault())
        assert (await said(reader, writer, b"again"))[0] == b"again"
        writer.close()


async def test_a_silent_link_keeps_its_connection_and_goes_on() -> None:
    async with proxied() as (proxy, _):
        reader, writer = await connected(proxy)
        await proxy.apply(LinkFault(blackhole=True))
        writer.write(b"hello")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.2)
        late_reader, late_writer = await connected(proxy)
        late_writer.write(b"later")
        await proxy.apply(LinkFault())
        assert await asyncio.wait_for(reader.readexactly(5), 5) == b"hello"
        assert await asyncio.wait_for(late_reader.readexactly(5), 5) == b"later"
        for each in (writer, late_writer):
            each.close()


async def test_a_cut_link_resets_what_is_there_and_what_comes() -> None:
    async with proxied() as (proxy, _):
        reader, writer = await connected(proxy)
        assert (await said(reader, writer, b"hello"))[0] == b"hello"
        await proxy.apply(LinkFault(refuse=True))
        assert await _ends(reader)
        writer.close()
        reader, writer = await connected(proxy)
        assert await _ends(reader)
        writer.close()
        await proxy.apply(LinkFault())
        reader, writer = await connected(proxy)
        assert (await said(reader, writer, b"hello"))[0] == b"hello"
        writer.close()


async def test_flipped_bytes_are_of_the_servers_way_and_one_a_chunk() -> None:
    async with proxied() as (proxy, echo):
        reader, writer = await connected(proxy)
        await proxy.apply(LinkFault(flip_chance=1.0))
        data = b"\0" * 1000
        answer, _ = await said(reader, writer, data)
        assert echo.num_bytes == len(data)
        assert sum(byte != 0 for byte in answer) >= 1
        writer.close()


async def test_what_waits_in_a_link_is_bounded() -> None:
    async with proxied() as (proxy, echo):
        echo.mute = True
        _, writer = await connected(proxy)
        await proxy.apply(LinkFault(blackhole=True))
        writer.transport.set_write_buffer_limits(high=0)
        sent = await _until_full(writer)
        # The proxy's own queue, and some megabytes for the sockets on both sides.
        assert sent < 2 * MAX_CHUNKS * CHUNK_BYTES + 32 * 2**20
        writer.transport.abort()


async def test_another_target_takes_over() -> None:
    async with proxied() as (proxy, first), proxied() as (other, second):
        reader, writer = await connected(proxy)
        assert (await said(reader, writer, b"one"))[0] == b"one"
        await proxy.retarget(other.address)
        assert await _ends(reader)
        writer.close()
        reader, writer = await connected(proxy)
        assert (await said(reader, writer, b"other"))[0] == b"other"
        assert (first.num_bytes, second.num_bytes) == (3, 5)
        writer.close()


async def test_nobody_behind_the_proxy_looks_like_a_reset() -> None:
    proxy = FaultProxy("127.0.0.1:1")
    await proxy.start()
    reader, writer = await connected(proxy)
    assert await _ends(reader)
    writer.close()
    await proxy.stop()


async def _ends(reader: asyncio.StreamReader) -> bool:
    try:
        return await asyncio.wait_for(reader.read(1), 5) == b""
    except ConnectionError:
        return True


async def _until_full(writer: asyncio.StreamWriter) -> int:
    """Write until nobody takes any more; the bytes that were taken."""
    sent = 0
    while sent < 2**27:
        writer.write(b"x" * CHUNK_BYTES)
        try:
            await asyncio.wait_for(writer.drain(), 0.5)
        except TimeoutError:
            break
        sent += CHUNK_BYTES
    return sent
