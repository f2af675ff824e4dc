"""Routers that end under streams: what runs goes on through another one, each token once."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import pytest

from specinfer import AsyncClient, Client, Completion, RetryPolicy, SpeculationOptions
from specinfer.options import GenerateOptions
from specinfer_cli.cluster import ClusterSettings, RunningCluster, running_cluster
from specinfer_cli.processes import Child, free_port, start_child, stop_children, wait_healthy

pytestmark = pytest.mark.timeout(300)

NUM_STREAMS = 6
NUM_TOKENS = 160
OPTIONS: GenerateOptions = {
    "token_ids": [5, 9, 12],
    "max_tokens": NUM_TOKENS,
    "temperature": 0.8,
    "ignore_eos": True,
    # A token a round, so that streams last as long as a restart.
    "speculation": SpeculationOptions(enabled=False),
}
PATIENT = RetryPolicy(max_attempts=20, initial_backoff=0.05, max_backoff=0.5)


class Routers:
    """Two routers on the same workers and the same Redis, which can be ended and started again.

    Attributes:
        addresses: of their gRPC services.
        gateways: of their HTTP services.
    """

    def __init__(self, cluster: RunningCluster, redis_url: str, folder: Path) -> None:
        self.addresses = [f"127.0.0.1:{free_port()}" for _ in range(2)]
        self.gateways = [f"127.0.0.1:{free_port()}" for _ in range(2)]
        self._cluster, self._redis, self._folder = cluster, redis_url, folder
        self._children: dict[int, Child] = {}

    def start(self, number: int) -> None:
        """Start a router and wait until it serves."""
        flags = ["--grpc", self.addresses[number], "--gateway", self.gateways[number]]
        flags += ["--drain-seconds", "20", "--handover-seconds", "0.05"]
        flags += ["--lease-seconds", "2"]
        for flag, addresses in (
            ("--verify", self._cluster.verifiers),
            ("--draft", self._cluster.drafters),
        ):
            for address in addresses:
                flags += [flag, address]
        self._children[number] = start_child(
            f"router {number} {time.monotonic_ns()}",
            "specinfer_router",
            flags,
            address=self.addresses[number],
            folder=self._folder,
            environment={"SPECINFER_ROUTER_REDIS": self._redis},
        )
        deadline = time.monotonic() + 60
        wait_healthy([self._children[number]], deadline, interrupted=lambda: False)

    def tell(self, number: int, which: signal.Signals) -> None:
        """Send a router a signal."""
        self._children[number].process.send_signal(which)

    def ended(self, number: int, seconds: float = 60.0) -> int:
        """The exit status of a router, once it has ended."""
        process = self._children[number].process
        status = process.wait(seconds)
        if process.stdin is not None:
            process.stdin.close()
        return status

    def stop(self) -> None:
        """End both."""
        stop_children(list(self._children.values()), grace_seconds=5.0)


def seeded(seed: int) -> GenerateOptions:
    options: GenerateOptions = {**OPTIONS, "seed": seed}
    return options


@pytest.fixture(scope="module")
def cluster(tiny_settings: ClusterSettings, redis_server: str) -> Iterator[RunningCluster]:
    settings = dataclasses.replace(tiny_settings, name="target", redis=redis_server)
    with running_cluster(settings) as running:
        yield running


@pytest.fixture(scope="module")
def unbroken(cluster: RunningCluster) -> dict[int, Completion]:
    """What each seed gives, from a router that nobody ends."""
    with Client(cluster.router) as client:
        return {seed: client.generate(**seeded(seed)) for seed in range(NUM_STREAMS)}


@contextmanager
def running_routers(cluster: RunningCluster, redis_url: str, folder: Path) -> Iterator[Routers]:
    routers = Routers(cluster, redis_url, folder)
    try:
        routers.start(0)
        routers.start(1)
        yield routers
    finally:
        routers.stop()


class ResumeCounter(grpc.aio.UnaryStreamClientInterceptor):
    """Counts how often a client asked for the rest of a stream."""

    def __init__(self) -> None:
        self.num_resumes = 0

    async def intercept_unary_stream(
        self, continuation: Any, client_call_details: Any, request: Any
    ) -> Any:
        """Pass the call on."""
        self.num_resumes += bytes(client_call_details.method).endswith(b"/Resume")
        return await continuation(client_call_details, request)


class Load:
    """Streams that follow upon each other until told to stop, each compared with its unbroken run.

    Attributes:
        num_ended: streams read to their end.
        num_different: those of them with another text or other tokens.
        resumes: counts how often the rest of one was asked for.
    """

    def __init__(self, addresses: list[str], unbroken: dict[int, Completion]) -> None:
        self.num_ended = self.num_different = 0
        self.resumes = ResumeCounter()
        self._addresses = addresses
        self._unbroken = unbroken
        self._enough = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Return when every stream has brought a token."""
        begun = [asyncio.Event() for _ in range(NUM_STREAMS)]
        self._tasks = [
            asyncio.create_task(self._read_on(seed, begun[seed])) for seed in range(NUM_STREAMS)
        ]
        await asyncio.gather(*(one.wait() for one in begun))

    async def stop(self) -> None:
        """Return when the streams that run have ended; raises what ended one of them."""
        self._enough.set()
        await asyncio.gather(*self._tasks)

    async def _read_on(self, seed: int, begun: asyncio.Event) -> None:
        interceptors = (self.resumes,)
        async with AsyncClient(self._addresses, retry=PATIENT, interceptors=interceptors) as client:
            while not self._enough.is_set():
                async with client.stream(**seeded(seed)) as stream:
                    async for _ in stream:
                        begun.set()
                self._compare(stream.completion, self._unbroken[seed])

    def _compare(self, joined: Completion, whole: Completion) -> None:
        self.num_ended += 1
        self.num_different += (joined.token_ids, joined.text) != (whole.token_ids, whole.text)


async def test_a_rolling_restart_of_both_routers_is_not_noticed(
    cluster: RunningCluster,
    unbroken: dict[int, Completion],
    redis_server: str,
    tmp_path: Path,
) -> None:
    with running_routers(cluster, redis_server, tmp_path) as routers:
        load = Load(routers.addresses, unbroken)
        await load.start()
        for number in (0, 1):
            routers.tell(number, signal.SIGTERM)
            assert await asyncio.to_thread(routers.ended, number) == 0
            await asyncio.to_thread(routers.start, number)
        await load.stop()
    assert load.num_ended >= NUM_STREAMS
    assert load.num_different == 0
    # Both ends met streams, or nothing was shown here.
    assert load.resumes.num_resumes >= 2


async def test_one_router_that_restarts_is_waited_for(
    cluster: RunningCluster,
    unbroken: dict[int, Completion],
    redis_server: str,
    tmp_path: Path,
) -> None:
    with running_routers(cluster, redis_server, tmp_path) as routers:
        async with (
            AsyncClient(routers.addresses[0]) as client,
            client.stream(**seeded(1)) as stream,
        ):
            await anext(stream)
            routers.tell(0, signal.SIGTERM)
            reading = asyncio.create_task(stream.collect())
            assert await asyncio.to_thread(routers.ended, 0) == 0
            await asyncio.to_thread(routers.start, 0)
            joined = await reading
        assert (joined.token_ids, joined.text) == (unbroken[1].token_ids, unbroken[1].text)


async def test_a_response_without_a_reader_outlives_its_router(
    cluster: RunningCluster, redis_server: str, tmp_path: Path
) -> None:
    body = {
        "model": "target",
        "input": "words",
        "max_output_tokens": NUM_TOKENS,
        "seed": 4,
        "speculation": {"enabled": False},
    }
    with running_routers(cluster, redis_server, tmp_path) as routers:
        async with http(routers.gateways[1]) as second:
            whole = (await second.post("/v1/responses", json=body)).json()
        for how in (signal.SIGTERM, signal.SIGKILL):
            async with http(routers.gateways[0]) as first:
                begun = await first.post("/v1/responses", json=body | {"background": True})
                path = f"/v1/responses/{begun.json()['id']}"
            routers.tell(0, how)
            async with http(routers.gateways[1]) as second:
                ended = await end_of(second, path)
            assert ended["status"] == whole["status"]
            assert text_of(ended) == text_of(whole)
            await asyncio.to_thread(routers.ended, 0)
            await asyncio.to_thread(routers.start, 0)


async def end_of(gateway: httpx.AsyncClient, path: str) -> dict[str, Any]:
    """A response once it has ended, by plain reads: nobody asks for it to go on."""
    async with asyncio.timeout(60):
        while True:
            response: dict[str, Any] = (await gateway.get(path)).json()
            if response["status"] not in ("queued", "in_progress"):
                return response
            await asyncio.sleep(0.1)


def text_of(response: dict[str, Any]) -> str:
    return "".join(part["text"] for item in response["output"] for part in item["content"])


def http(address: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"http://{address}", timeout=60.0)
