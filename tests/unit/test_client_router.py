"""The SDK against the real router: streams that are torn at any byte, taken over, cancelled."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from specinfer import (
    AsyncClient,
    Completion,
    NotFound,
    ResumeToken,
    RetryPolicy,
)
from specinfer.server import build_server
from specinfer_router.servicer import SERVICE, add_generation
from specinfer_router.store import MemoryStore
from tests.kit.link_breaker import LinkBreaker, broken_link
from tests.kit.router import PROMPT, Bench, running_router

pytestmark = pytest.mark.usefixtures("both_kinds_of_call")

FAST = RetryPolicy(max_attempts=4, initial_backoff=0.001, max_backoff=0.05)
NUM_TOKENS = 120


@dataclass
class Cluster:
    """A router behind a link that breaks."""

    bench: Bench
    address: str
    link: LinkBreaker


@asynccontextmanager
async def serving(**parts: Any) -> AsyncIterator[Cluster]:
    async with running_router(**parts) as bench:
        server = build_server("127.0.0.1:0", [SERVICE])
        add_generation(server, bench.router)
        await server.start()
        address = f"127.0.0.1:{server.port}"
        try:
            async with broken_link(address) as link:
                yield Cluster(bench, address, link)
        finally:
            await server.drain(0)


def same(joined: Completion, whole: Completion) -> None:
    assert joined.token_ids == whole.token_ids
    assert joined.text == whole.text
    assert joined.logprobs == whole.logprobs
    assert joined.finish_reason == whole.finish_reason
    assert joined.usage.num_completion_tokens == whole.usage.num_completion_tokens


async def test_a_stream_torn_at_any_byte_loses_and_repeats_nothing() -> None:
    chance = random.Random(7)
    options: dict[str, Any] = {"token_ids": PROMPT, "max_tokens": NUM_TOKENS, "seed": 3}
    async with serving() as cluster:
        link = cluster.link
        async with AsyncClient(link.address, timeout=60, retry=FAST) as client:
            await client.capabilities()
            link.cut_after(None)
            whole = await client.generate(**options)
            num_bytes = link.num_bytes
            for _ in range(20):
                before = link.num_cut
                link.cut_after(chance.randrange(1, num_bytes))
                joined = await client.generate(**options)
                assert link.num_cut == before + 1
                same(joined, whole)
                assert len(joined.rounds) == joined.speculation.num_rounds


async def test_another_router_with_the_same_store_goes_on() -> None:
    store = MemoryStore()
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(serving(store=store))
        second = await stack.enter_async_context(serving(store=store))
        addresses = [first.link.address, second.address]
        client = await stack.enter_async_context(AsyncClient(addresses, timeout=60, retry=FAST))
        whole = await client.generate(token_ids=PROMPT, max_tokens=NUM_TOKENS, seed=3)
        stream = client.stream(token_ids=PROMPT, max_tokens=NUM_TOKENS, seed=3)
        await anext(stream)
        await first.link.stop()
        same(await stream.collect(), whole)


async def test_a_session_is_taken_over_and_cancelled() -> None:
    options: dict[str, Any] = {"token_ids": PROMPT, "max_tokens": NUM_TOKENS, "seed": 3}
    async with (
        serving() as cluster,
        AsyncClient(cluster.address, timeout=60, retry=FAST) as client,
    ):
        whole = await client.generate(**options)
        async with client.stream(**options) as stream:
            head = (await anext(stream)).token_ids
        token = stream.resume_token or ResumeToken("", 0)
        rest = await client.resume(*token).collect()
        assert head + rest.token_ids == whole.token_ids
        assert rest.usage.num_completion_tokens == NUM_TOKENS
        report = await client.explain(rest.request_id)
        assert report.session_id == token.session_id
        await client.cancel(token.session_id)
        with pytest.raises(NotFound):
            await client.resume("nobody").collect()
        with pytest.raises(NotFound):
            await client.cancel("nobody")
