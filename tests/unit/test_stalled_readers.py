"""Clients that stop reading, over real sockets: cut off in time, told so, and able to go on."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from specinfer import AsyncClient, ReaderStalled, RetryPolicy
from specinfer.options import GenerateOptions
from specinfer.server import build_server
from specinfer_router.admission import AdmissionLimits
from specinfer_router.router import RouterLimits
from specinfer_router.servicer import SERVICE, add_generation
from tests.kit.fake_drafter import FakeDrafter
from tests.kit.fake_workers import FakeVerifier, info_of
from tests.kit.gateway import GatewayBench, running_gateway
from tests.kit.sse import StreamReader
from tests.kit.waiting import until

pytestmark = pytest.mark.usefixtures("both_kinds_of_call")

# Only one request at a time, so that another one shows that the stalled one has lost its place.
LIMITS = RouterLimits(admission=AdmissionLimits(max_streams=1), max_events=4, stall_seconds=0.3)
MAX_TOKENS = 900
BODY: dict[str, Any] = {
    "model": "table",
    "prompt": "words",
    "max_tokens": MAX_TOKENS,
    "seed": 3,
    # What makes events large fills what lies between a server and a client that does not read.
    "logprobs": 5,
    "speculation": {"detail": True},
    "stream": True,
}
OPTIONS: GenerateOptions = {"max_tokens": MAX_TOKENS, "seed": 3, "logprobs": 20, "detail": True}
SMALL_BUFFER = 4096


@asynccontextmanager
async def serving() -> AsyncIterator[GatewayBench]:
    async with running_gateway(
        limits=LIMITS,
        verifiers=[FakeVerifier(info_of("verify", max_model_len=2 * MAX_TOKENS))],
        drafters=[FakeDrafter(info_of("draft", max_model_len=2 * MAX_TOKENS))],
    ) as bench:
        yield bench


async def test_an_event_stream_that_is_not_read_is_cut_off_and_can_be_resumed() -> None:
    async with serving() as gateway:
        reader, writer = await small_connection(gateway.url.rpartition("/")[2])
        content = json.dumps(BODY).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n\r\n"
        writer.write(head.encode() + content)
        await gateway.bench.verifiers[0].wait_for("step", 20)
        # Admitted only when the place of the stalled one is free again.
        whole = StreamReader()
        await whole.read(gateway.http, "/v1/completions", BODY)
        # Whoever reads on gets what was on its way, and then the reason.
        late = StreamReader()
        while not late.done:
            late.take((await reader.readline()).decode().rstrip("\r\n"))
        writer.close()
        assert [error["code"] for error in late.errors] == ["reader_stalled"]
        assert 0 < late.offsets[-1] < whole.offsets[-1] == MAX_TOKENS
        late.done = False
        await late.read(gateway.http, "/v1/completions", BODY)
        assert late.text == whole.text
        assert late.offsets[-1] == MAX_TOKENS
        sessions = gateway.bench.verifiers[0].sessions
        await until(lambda: not sessions, "the worker has forgotten all sessions")


async def test_a_grpc_stream_that_is_not_read_is_cut_off_and_can_be_resumed() -> None:
    async with serving() as gateway, grpc_address(gateway) as address:
        async with AsyncClient(address, retry=RetryPolicy(max_attempts=1)) as client:
            whole = await client.generate("words", **OPTIONS)
            stream = client.stream("words", **OPTIONS)
            await anext(stream)
            other = await client.generate("words", **OPTIONS)
            assert other.token_ids == whole.token_ids
            with pytest.raises(ReaderStalled) as stalled:
                await stream.collect()
            assert stalled.value.retryable
            token = stream.resume_token
            assert token is not None
            assert 0 < token.offset < MAX_TOKENS
            rest = await client.resume(*token).collect()
            assert whole.token_ids[: token.offset] + rest.token_ids == whole.token_ids
        # The SDK does the same by itself, unless it is told not to try again.
        async with AsyncClient(address) as client, client.stream("words", **OPTIONS) as stream:
            await anext(stream)
            await client.generate("words", **OPTIONS)
            joined = await stream.collect()
            assert (joined.token_ids, joined.text) == (whole.token_ids, whole.text)


@asynccontextmanager
async def grpc_address(gateway: GatewayBench) -> AsyncIterator[str]:
    server = build_server("127.0.0.1:0", [SERVICE])
    add_generation(server, gateway.bench.router)
    await server.start()
    try:
        yield f"127.0.0.1:{server.port}"
    finally:
        await server.drain(0)


async def small_connection(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection that holds little of what is sent to it."""
    host, _, port = address.rpartition(":")
    link = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
    link.setblocking(False)
    await asyncio.get_running_loop().sock_connect(link, (host, int(port)))
    return await asyncio.open_connection(sock=link, limit=SMALL_BUFFER)
