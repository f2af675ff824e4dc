"""The HTTP API over a router with fake workers, on a free port, and targets that say what is told.

Knows nothing of what tests ask of it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from specinfer.errors import SpecinferError
from specinfer_router.gateway.app import api_routes
from specinfer_router.gateway.server import Gateway
from specinfer_router.gateway.sse import StreamSettings
from specinfer_router.router import Router
from tests.kit.fake_workers import CHAT_TEMPLATE, EOS, FakeSession, FakeVerifier, info_of
from tests.kit.router import Bench, running_router
from tests.kit.tokenizers import byte_level_tokenizer

TOOLS_TEMPLATE = "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}" + CHAT_TEMPLATE


@dataclass
class GatewayBench:
    """A gateway and the router behind it.

    Attributes:
        bench: the router and its fake workers.
        url: where the gateway listens.
        http: a client for requests that no library makes.
        failures: errors that the next calls end with, first one first.
    """

    bench: Bench
    url: str
    http: httpx.AsyncClient
    failures: list[SpecinferError]

    async def chat(self, **body: Any) -> httpx.Response:
        """POST a chat completion of few tokens."""
        return await self.http.post("/v1/chat/completions", json=chat_body(**body))

    async def complete(self, **body: Any) -> httpx.Response:
        """POST a completion of few tokens."""
        return await self.http.post("/v1/completions", json=completion_body(**body))


@dataclass
class ScriptedVerifier(FakeVerifier):
    """A verify worker whose target says one text, whatever it is asked.

    Attributes:
        script: tokens of the text; the end token follows.
    """

    script: Sequence[int] = field(default=())

    def _target(self, token_ids: Sequence[int], session: FakeSession) -> int:
        index = len(token_ids) - session.num_prompt_tokens
        return self.script[index] if index < len(self.script) else EOS


def saying(text: str, **options: Any) -> ScriptedVerifier:
    """A verify worker whose target says `text`."""
    script = byte_level_tokenizer().encode(text).ids
    return ScriptedVerifier(info_of("verify"), script=script, **options)


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
    failures: list[SpecinferError] = []
    async with running_router(**router_options) as bench:

        def get_router() -> Router:
            if failures:
                raise failures.pop(0)
            return bench.router

        gateway = Gateway("127.0.0.1:0", api_routes(get_router, streams=streams))
        await gateway.start()
        url = f"http://127.0.0.1:{gateway.port}"
        async with httpx.AsyncClient(base_url=url, timeout=30) as http:
            try:
                yield GatewayBench(bench, url, http, failures)
            finally:
                await gateway.stop()
