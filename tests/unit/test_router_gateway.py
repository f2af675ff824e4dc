"""Health, readiness and metrics over HTTP, and addresses that cannot be served."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import httpx
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from specinfer.errors import InvalidRequest
from specinfer.messages import SpeculationOptions
from specinfer_router.gateway.operator import operator_routes
from specinfer_router.gateway.server import Gateway
from tests.kit.router import Bench, request_of, running_router


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with running_router() as built:
        yield built


@pytest.fixture
async def http(bench: Bench) -> AsyncIterator[httpx.AsyncClient]:
    routes = operator_routes(lambda: bench.router.not_ready_reason, bench.registry)
    gateway = Gateway("127.0.0.1:0", routes)
    await gateway.start()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{gateway.port}") as client:
        yield client
    await gateway.stop()


async def test_live_and_ready(bench: Bench, http: httpx.AsyncClient) -> None:
    assert (await http.get("/health/live")).json() == {"status": "live"}
    assert (await http.get("/health/ready")).status_code == 200
    assert (await http.get("/health")).json() == {"status": "ready"}
    await bench.router.drain()
    assert (await http.get("/health")).status_code == 503
    ready = await http.get("/health/ready")
    assert (ready.status_code, ready.json()["reason"]) == (503, "draining")
    assert (await http.get("/health/live")).status_code == 200


async def test_not_ready_without_a_verify_worker(bench: Bench, http: httpx.AsyncClient) -> None:
    link = bench.cluster.verifiers.links[0]
    broken = asyncio.Event()
    waiting = link.open("a", 0, [1], 1, request_of().sampling, None)
    await waiting
    bench.verifiers[0].gate.clear()
    hanging = link.forget("a", 0)
    hanging.watch(broken.set)
    await bench.verifiers[0].kill()
    await broken.wait()
    ready = await http.get("/health/ready")
    assert (ready.status_code, ready.json()["reason"]) == (503, "no verify worker is ready")


def samples(text: str) -> dict[tuple[str, str], float]:
    """Values by name and by the label that is not the model."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {key: value for key, value in sample.labels.items() if key != "model_name"}
            found[sample.name, "".join(labels.values())] = sample.value
    return found


async def test_metrics_count_what_happened(bench: Bench, http: httpx.AsyncClient) -> None:
    results = [await bench.generate(request_of(seed=seed)) for seed in range(3)]
    off = SpeculationOptions(enabled=False)
    await bench.generate(request_of(speculation=off, max_tokens=5))
    seen = samples((await http.get("/metrics")).text)
    speculation = [result.finished.speculation for result in results]
    prefix = "specinfer_spec_decode_num_"
    assert seen[prefix + "drafts_total", ""] == sum(s.num_drafts for s in speculation)
    assert seen[prefix + "draft_tokens_total", ""] == sum(s.num_draft_tokens for s in speculation)
    accepted = sum(s.num_accepted_tokens for s in speculation)
    assert seen[prefix + "accepted_tokens_total", ""] == accepted
    first = sum(s.num_accepted_tokens_per_pos[0] for s in speculation)
    assert seen[prefix + "accepted_tokens_per_pos_total", "0"] == first
    assert seen["specinfer_root_only_rounds_total", "disabled"] == 5
    assert seen["specinfer_generation_tokens_total", ""] == 125
    assert seen["specinfer_prompt_tokens_total", ""] == 80
    assert seen["specinfer_requests_total", "length"] == 4
    assert seen["specinfer_num_sessions_running", ""] == 0
    assert seen["specinfer_num_requests_waiting", ""] == 0
    assert seen["specinfer_time_to_first_token_seconds_count", ""] == 4
    rounds = sum(s.num_rounds for s in speculation) + 5
    assert seen["specinfer_round_seconds_count", "verify"] == rounds


async def test_errors_are_counted_by_reason(bench: Bench, http: httpx.AsyncClient) -> None:
    with pytest.raises(InvalidRequest):
        await bench.generate(request_of(token_ids=()))
    seen = samples((await http.get("/metrics")).text)
    assert seen["specinfer_requests_total", "invalid_request"] == 1


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1", "127.0.0.1:99999", "127.0.0.1:x"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(InvalidRequest, match="address"):
        Gateway(address, [])


def test_a_port_in_use_is_said() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InvalidRequest, match="cannot listen"):
            Gateway(f"127.0.0.1:{taken.getsockname()[1]}", [])


async def test_binding_wide_needs_a_flag() -> None:
    with pytest.raises(InvalidRequest, match="--insecure-bind"):
        Gateway("0.0.0.0:0", [])
    gateway = Gateway("0.0.0.0:0", operator_routes(str, CollectorRegistry()), insecure_bind=True)
    await gateway.stop()


def test_metrics_with_a_port_of_their_own_are_not_at_the_gateway() -> None:
    paths = {route.path for route in operator_routes(str, None)}
    assert paths == {"/health", "/health/live", "/health/ready"}
