"""Events leave the gateway when they are written: no waiting for more to put into a packet."""

from __future__ import annotations

import asyncio
import socket

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from specinfer_router.gateway.server import Gateway


async def test_small_writes_are_not_held_back() -> None:
    flags: list[int] = []

    async def tell(request: Request) -> Response:
        connections = gateway._server.server_state.connections
        sockets = [each.transport.get_extra_info("socket") for each in connections]
        flags.extend(each.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for each in sockets)
        return PlainTextResponse("")

    gateway = Gateway("127.0.0.1:0", [Route("/tell", tell)])
    await gateway.start()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(b"GET /tell HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n")
        assert (await reader.readline()).split()[1] == b"200"
        writer.close()
    finally:
        await gateway.stop()
    assert len(flags) == 1
    assert flags[0]
