"""A server that is slow to answer a new connection is waited for, not given up after a moment."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import grpc.aio

from specinfer.rpc import SERVER_OPTIONS, open_channel

# Longer than the pause before an attempt that is made again.
SLOW_SECONDS = 0.5


async def test_a_slow_handshake_is_no_failure() -> None:
    server = grpc.aio.server(options=SERVER_OPTIONS)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    attempts = 0

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
        writer.close()

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal attempts
        attempts += 1
        await asyncio.sleep(SLOW_SECONDS)
        there, back = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(carry(reader, back), carry(there, writer))

    proxy = await asyncio.start_server(slow, "127.0.0.1", 0)
    address = proxy.sockets[0].getsockname()
    async with open_channel(f"{address[0]}:{address[1]}") as channel:
        async with asyncio.timeout(4):
            await channel.channel_ready()
    assert attempts == 1
    proxy.close()
    await server.stop(0)
