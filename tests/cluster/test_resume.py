"""Connections that break in the middle of a stream: it goes on, with each token exactly once."""

from __future__ import annotations

import dataclasses
import random
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from specinfer import AsyncClient, Client, Completion, RetryPolicy, SpeculationOptions
from specinfer.errors import Unavailable
from specinfer.options import GenerateOptions
from specinfer.redis_connection import RedisSettings
from specinfer_cli.cluster import ClusterSettings, RunningCluster, running_cluster
from specinfer_cli.processes import free_port, start_child, stop_children, wait_healthy
from specinfer_router.store import ABANDONED, RedisStore
from tests.kit.link_breaker import LinkBreaker, broken_link
from tests.kit.sse import StreamReader

pytestmark = pytest.mark.timeout(300)

NUM_BREAKS = 20
MOST_OF_THEM = 14
PROMPT = [5, 9, 12]
OPTIONS: GenerateOptions = {
    "token_ids": PROMPT,
    "max_tokens": 96,
    "temperature": 0.8,
    "seed": 11,
    "ignore_eos": True,
    "speculation": SpeculationOptions(widths=(2, 1, 1)),
}
BODY: dict[str, Any] = {
    "model": "target",
    "prompt": PROMPT,
    "max_tokens": 96,
    "temperature": 0.8,
    "seed": 11,
    "ignore_eos": True,
    "speculation": {"widths": [2, 1, 1]},
    "stream": True,
    "stream_options": {"include_usage": True},
}
COMPLETIONS = "/v1/completions"
QUICKLY = RetryPolicy(max_attempts=8, initial_backoff=0.01)
NEVER = RetryPolicy(max_attempts=1)


@dataclass(frozen=True)
class TwoRouters:
    """A cluster with a second router on the same workers and the same Redis."""

    first: RunningCluster
    second: str
    second_gateway: str


@pytest.fixture(scope="module")
def routers(
    tiny_settings: ClusterSettings,
    redis_server: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[TwoRouters]:
    settings = dataclasses.replace(tiny_settings, name="target", redis=redis_server, group="resume")
    with (
        running_cluster(settings) as first,
        second_router(first, settings, tmp_path_factory.mktemp("second")) as both,
    ):
        yield both


@contextmanager
def second_router(
    first: RunningCluster, settings: ClusterSettings, folder: Path
) -> Iterator[TwoRouters]:
    grpc, gateway = (f"127.0.0.1:{free_port()}" for _ in range(2))
    flags = ["--grpc", grpc, "--gateway", gateway, "--drain-seconds", "2"]
    flags += ["--group", settings.group]
    child = start_child(
        "second router",
        "specinfer_router",
        flags,
        address=grpc,
        folder=folder,
        environment={"SPECINFER_ROUTER_REDIS": settings.redis or ""},
    )
    try:
        wait_healthy([child], deadline=float("inf"), interrupted=lambda: False)
        yield TwoRouters(first, grpc, gateway)
    finally:
        stop_children([child], grace_seconds=5.0)


@pytest.fixture(scope="module")
def unbroken(routers: TwoRouters) -> Completion:
    with Client(routers.first.router) as client:
        completion = client.generate(**OPTIONS)
    assert completion.speculation.num_accepted_tokens > 0
    return completion


def places(num_bytes: int) -> list[int]:
    """Where to break a stream of so many bytes, the same at each run."""
    return sorted(random.Random(20).sample(range(1, num_bytes), NUM_BREAKS))


async def broken_at(link: LinkBreaker, num_bytes: int) -> tuple[Completion, bool]:
    """A stream whose connection breaks; and whether it had begun by then."""
    async with AsyncClient(link.address, retry=QUICKLY) as client:
        link.cut_after(num_bytes)
        begun = False
        async with client.stream(**OPTIONS) as stream:
            async for _ in stream:
                begun = begun or link.num_connections == 1
            return stream.completion, begun


async def test_grpc_streams_go_on_where_they_broke(
    routers: TwoRouters, unbroken: Completion
) -> None:
    async with broken_link(routers.first.router) as link:
        async with AsyncClient(link.address) as client:
            whole = await client.generate(**OPTIONS)
        num_bytes = link.num_bytes
    assert whole.token_ids == unbroken.token_ids
    num_begun = 0
    for place in places(num_bytes):
        async with broken_link(routers.first.router) as link:
            joined, begun = await broken_at(link, place)
            assert link.num_cut == 1, place
        num_begun += begun
        assert joined.token_ids == unbroken.token_ids, place
        assert joined.text == unbroken.text, place
        assert joined.usage.num_completion_tokens == len(unbroken.token_ids), place
        assert joined.finish_reason == unbroken.finish_reason
    # Most breaks fell after the first tokens, where a retry could not have helped.
    assert num_begun >= MOST_OF_THEM


async def test_event_streams_go_on_where_they_broke(
    routers: TwoRouters, unbroken: Completion
) -> None:
    gateway = routers.first.gateway
    async with broken_link(gateway) as link, http_client(link.address) as http:
        whole = StreamReader()
        await whole.read_all(http, COMPLETIONS, BODY)
        num_bytes = link.num_bytes
    assert (whole.text, whole.breaks) == (unbroken.text, [])
    num_begun = 0
    for place in places(num_bytes):
        async with broken_link(gateway) as link, http_client(link.address) as http:
            link.cut_after(place)
            reader = StreamReader()
            await reader.read_all(http, COMPLETIONS, BODY)
            assert (link.num_cut, len(reader.breaks)) == (1, 1), place
        num_begun += reader.breaks[0] > 0
        assert reader.text == unbroken.text, place
        assert reader.finish_reason == unbroken.finish_reason
        assert reader.usage is not None
        assert reader.usage["completion_tokens"] == len(unbroken.token_ids), place
        assert (reader.offsets[-1], reader.errors) == (len(unbroken.token_ids), [])
    assert num_begun >= MOST_OF_THEM


async def test_another_router_goes_on_with_a_stream(
    routers: TwoRouters, unbroken: Completion
) -> None:
    async with broken_link(routers.first.router) as link:
        async with AsyncClient(link.address, retry=NEVER) as client:
            stream = client.stream(**OPTIONS)
            head = await anext(stream)
            await link.cut()
            with pytest.raises(Unavailable):
                await stream.collect()
            token = stream.resume_token
        assert token is not None
        assert 0 < token.offset < len(unbroken.token_ids)
        async with AsyncClient(routers.second) as client:
            rest = await client.resume(*token).collect()
    assert head.token_ids == unbroken.token_ids[: len(head.token_ids)]
    assert unbroken.token_ids[: token.offset] + rest.token_ids == unbroken.token_ids
    assert unbroken.text.endswith(rest.text)
    assert rest.usage.num_completion_tokens == len(unbroken.token_ids)


async def test_a_client_of_two_routers_goes_on_by_itself(
    routers: TwoRouters, unbroken: Completion
) -> None:
    async with broken_link(routers.first.router) as link:
        addresses = [link.address, routers.second]
        async with (
            AsyncClient(addresses, retry=QUICKLY) as client,
            client.stream(**OPTIONS) as stream,
        ):
            await anext(stream)
            await link.stop()
            joined = await stream.collect()
        assert link.num_cut == 1
    assert (joined.token_ids, joined.text) == (unbroken.token_ids, unbroken.text)


async def test_another_gateway_goes_on_with_an_event_stream(
    routers: TwoRouters, unbroken: Completion
) -> None:
    reader = StreamReader()
    async with broken_link(routers.first.gateway) as link, http_client(link.address) as http:
        link.cut_after(4000)
        with pytest.raises(httpx.TransportError):
            await reader.read(http, COMPLETIONS, BODY)
    assert 0 < reader.offsets[-1] < len(unbroken.token_ids)
    async with http_client(routers.second_gateway) as http:
        await reader.read(http, COMPLETIONS, BODY)
    assert reader.done
    assert (reader.text, reader.offsets[-1]) == (unbroken.text, len(unbroken.token_ids))


@pytest.mark.parametrize("mistake", [-1, 1])
async def test_an_offset_that_is_off_by_one_is_seen(
    routers: TwoRouters, unbroken: Completion, mistake: int
) -> None:
    """What these tests compare would catch a token lost or told twice."""
    half = len(unbroken.token_ids) // 2
    head = unbroken.token_ids[:half]
    async with AsyncClient(routers.first.router) as client:
        right = await client.resume(unbroken.session_id, half).collect()
        wrong = await client.resume(unbroken.session_id, half + mistake).collect()
    assert head + right.token_ids == unbroken.token_ids
    assert head + wrong.token_ids != unbroken.token_ids
    texts = [await read_from(routers, f"{unbroken.session_id}:{half + by}") for by in (0, mistake)]
    assert texts == [right.text, wrong.text]
    assert unbroken.text.endswith(right.text)
    assert texts[0] != texts[1]


async def read_from(routers: TwoRouters, last_id: str) -> str:
    reader = StreamReader(last_id=last_id)
    async with http_client(routers.first.gateway) as http:
        await reader.read(http, COMPLETIONS, BODY)
    return reader.text


def http_client(address: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"http://{address}", timeout=60.0)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
async def test_tokens_that_redis_has_lost_are_made_again(
    routers: TwoRouters, redis_server: str, temperature: float
) -> None:
    options: GenerateOptions = {**OPTIONS, "temperature": temperature, "logprobs": 1}
    chance = random.Random(3)
    async with AsyncClient(routers.first.router) as client:
        whole = await client.generate(**options)
        stop = whole.text[len(whole.text) // 2 :][:6]
        stopping: GenerateOptions = {**options, "stop": (stop,)}
        stopped = await client.generate(**stopping)
        for unbroken in (whole, stopped):
            num_tokens = len(unbroken.token_ids)
            for _ in range(3):
                offset = chance.randrange(2, num_tokens)
                kept = chance.randrange(offset)
                session_id = await with_loss(redis_server, unbroken, kept)
                rest = await client.resume(session_id, offset).collect()
                assert unbroken.token_ids[:offset] + rest.token_ids == unbroken.token_ids
                assert rest.logprobs == unbroken.logprobs[offset:]
                assert unbroken.text.endswith(rest.text)
                again = await client.resume(session_id, 0).collect()
                assert again.text == unbroken.text
                assert rest.finish_reason == unbroken.finish_reason


async def with_loss(redis_url: str, unbroken: Completion, kept: int) -> str:
    """A session of the same terms of which Redis has the first tokens alone."""
    store = RedisStore(RedisSettings(redis_url))
    record = await store.load(unbroken.session_id)
    prompt = record.token_ids[: record.terms.num_prompt_tokens]
    session_id = uuid.uuid4().hex
    await store.create(
        record._replace(session_id=session_id, token_ids=prompt, epoch=0, owner=0, finish_reason="")
    )
    if kept:
        await store.commit(session_id, 0, record.output_ids[:kept])
    await store.finish(session_id, ABANDONED)
    await store.close()
    return session_id
