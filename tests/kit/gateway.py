"""The HTTP API over a router with fake workers, on a free port."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from specinfer_router.gateway.app import api_routes
from specinfer_router.gateway.server import Gateway
from specinfer_router.gateway.sse import StreamSettings
from specinfer_router.router import Router
from tests.kit.router import Bench, running_router


@dataclass
class GatewayBench:
    """A gateway and the router behind it.

    Attributes:
        bench: the router and its fake workers.
        url: where the gateway listens.
        http: a client for requests that no library makes.
    """

    bench: Bench
    url: str
    http: httpx.AsyncClient

    async def chat(self, **body: Any) -> httpx.Response:
        """POST a chat completion of few tokens."""
        return await self.http.post("/v1/chat/completions", json=chat_body(**body))

    async def complete(self, **body: Any) -> httpx.Response:
        """POST a completion of few tokens."""
        return await self.http.post("/v1/completions", json=completion_body(**body))


def chat_body(**changes: Any) -> dict[str, Any]:
    """A chat completion's body."""
    body = {
        "model": "table",
        "messages": [{"role": "user", "content": "words"}],
        "max_tokens": 24,
        "seed": 3,
    }
    return body | changes


def completion_body(**changes: Any) -> dict[str, Any]:
    """A completion's body."""
    return {"model": "table", "prompt": "words", "max_tokens": 24, "seed": 3} | changes


@asynccontextmanager
async def running_gateway(
    *, streams: StreamSettings | None = None, **router_options: Any
) -> AsyncIterator[GatewayBench]:
    """A gateway over `running_router`."""
    async with running_router(**router_options) as bench:

        def get_router() -> Router:
            return bench.router

        gateway = Gateway("127.0.0.1:0", api_routes(get_router, streams=streams))
        await gateway.start()
        url = f"http://127.0.0.1:{gateway.port}"
        async with httpx.AsyncClient(base_url=url, timeout=30) as http:
            try:
                yield GatewayBench(bench, url, http)
            finally:
                await gateway.stop()
