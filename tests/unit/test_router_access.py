"""Keys at a router's two doors, gRPC and HTTP, and draining of both."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from specinfer.convert import request_to_wire
from specinfer.errors import SpecinferError, Unauthenticated
from specinfer.rpc import detailed_error, error_from_rpc, open_channel
from specinfer.server import build_server
from specinfer.v1 import router_pb2, router_pb2_grpc
from specinfer_router.access import KeyLimits
from specinfer_router.admission import AdmissionLimits
from specinfer_router.keys.control import AccessControl
from specinfer_router.keys.file import KeyFile
from specinfer_router.keys.record import key_id_of, new_key
from specinfer_router.router import RouterLimits
from specinfer_router.servicer import SERVICE, add_generation
from tests.kit.router import Bench, request_of, running_router
from tests.unit.test_router_process import line_with, refusal, start_router, workers


async def key_in(path: Path, **limits: int) -> str:
    key, record = new_key("team", limits=KeyLimits(**limits), now=datetime.now(UTC))
    await KeyFile(path).add(record)
    return key


@dataclass
class Door:
    """A router's gRPC service that asks for keys."""

    bench: Bench
    channel: grpc.aio.Channel
    key: str
    access: AccessControl

    @property
    def stub(self) -> Any:
        return router_pb2_grpc.GenerationServiceStub(self.channel)

    async def call(self, name: str, request: Any, token: str | None, **options: Any) -> list[Any]:
        """The answers of a call with this token; raises SpecinferError."""
        metadata = (("authorization", f"Bearer {token}"),) if token else ()
        if name == "Multiplex":
            request = iter([request])
        call = getattr(self.stub, name)(request, metadata=metadata, **options)
        try:
            if hasattr(call, "__aiter__"):
                return [checked(answer) async for answer in call]
            return [await call]
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error

    async def reason(self, name: str, request: Any, token: str | None, **options: Any) -> str:
        """Why a call is refused, or "" when it is not."""
        try:
            await self.call(name, request, token, **options)
        except SpecinferError as error:
            return error.reason
        return ""


def checked(answer: Any) -> Any:
    """What a stream told, unless it is that a call on it failed."""
    if isinstance(answer, router_pb2.MultiplexResponse):
        for told in answer.events:
            if told.HasField("failure"):
                raise detailed_error(told.failure.code, told.failure.detail)
    return answer


@asynccontextmanager
async def door(folder: Path, limits: RouterLimits | None = None, **key: int) -> AsyncIterator[Door]:
    text = await key_in(folder / "keys", **key)
    access = AccessControl(KeyFile(folder / "keys"))
    await access.start()
    async with running_router(limits=limits) as bench:
        server = build_server("127.0.0.1:0", [SERVICE])
        add_generation(server, bench.router, access)
        await server.start()
        async with open_channel(f"127.0.0.1:{server.port}") as channel:
            yield Door(bench, channel, text, access)
        await server.server.stop(0)
    await access.close()


def frame(request: router_pb2.GenerateRequest, **options: Any) -> router_pb2.MultiplexRequest:
    begin = router_pb2.BeginCall(generate=request, room=64, **options)
    return router_pb2.MultiplexRequest(items=[router_pb2.CallItem(call_id=1, begin=begin)])


REQUEST = request_to_wire(request_of(max_tokens=3))
CALLS = [
    ("Generate", REQUEST),
    ("Multiplex", frame(REQUEST)),
    ("Resume", router_pb2.ResumeRequest(session_id="a")),
    ("Cancel", router_pb2.CancelRequest(session_id="a")),
    ("Explain", router_pb2.ExplainRequest(request_id="a")),
    ("GetCapabilities", router_pb2.GetCapabilitiesRequest()),
]


def test_every_method_of_the_service_is_tried_here() -> None:
    service = router_pb2.DESCRIPTOR.services_by_name["GenerationService"]
    assert {method.name for method in service.methods} == {name for name, _ in CALLS}


async def test_every_call_needs_a_key(tmp_path: Path) -> None:
    async with door(tmp_path) as built:
        for name, request in CALLS:
            for token in (None, "sk-wrong", built.key[:-1]):
                assert await built.reason(name, request, token) == "UNAUTHENTICATED", name
            assert await built.reason(name, request, built.key) in ("", "NOT_FOUND"), name


async def test_health_and_reflection_need_none(tmp_path: Path) -> None:
    async with door(tmp_path) as built:
        health: Any = health_pb2_grpc.HealthStub(built.channel)
        answer = await health.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        channel: Any = built.channel
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        listed = [answer async for answer in stub.ServerReflectionInfo(iter([asked]))]
        names = [service.name for service in listed[0].list_services_response.service]
        assert SERVICE in names


async def test_a_key_that_is_withdrawn_makes_no_calls_on_a_stream_that_it_opened(
    tmp_path: Path,
) -> None:
    async with door(tmp_path) as built:
        withdrawn = asyncio.Event()

        async def frames() -> AsyncIterator[router_pb2.MultiplexRequest]:
            yield frame(REQUEST)
            await withdrawn.wait()
            later = frame(REQUEST)
            later.items[0].call_id = 2
            yield later

        metadata = (("authorization", f"Bearer {built.key}"),)
        call = built.stub.Multiplex(frames(), metadata=metadata)
        while not (await call.read()).events[-1].event.HasField("finished"):
            pass
        key_id = key_id_of(built.key)
        assert key_id is not None
        await KeyFile(tmp_path / "keys").remove(key_id)
        await built.access.refresh()
        withdrawn.set()
        with pytest.raises(Unauthenticated):
            checked(await call.read())


@pytest.mark.parametrize(("name", "asked"), CALLS[:2])
async def test_a_keys_limits_hold_over_grpc(tmp_path: Path, name: str, asked: Any) -> None:
    async with door(tmp_path, requests_per_minute=2) as built:
        for _ in range(2):
            await built.call(name, asked, built.key)
        with pytest.raises(SpecinferError) as caught:
            await built.call(name, asked, built.key)
        error = caught.value
        assert (error.reason, error.field) == ("RESOURCE_EXHAUSTED", "api_key")
        assert 20 < (error.retry_after or 0) <= 30


async def test_the_tokens_of_a_stream_are_counted(tmp_path: Path) -> None:
    async with door(tmp_path, tokens_per_minute=30) as built:
        # 20 tokens of the prompt and 12 generated.
        request = request_to_wire(request_of(max_tokens=12))
        await built.call("Generate", request, built.key)
        with pytest.raises(SpecinferError, match="tokens_per_minute = 30") as caught:
            await built.call("Generate", request, built.key)
        assert 4 < (caught.value.retry_after or 0) <= 6


@pytest.mark.parametrize("shared", [False, True])
async def test_a_deadline_ends_the_wait_for_a_place(tmp_path: Path, shared: bool) -> None:
    limits = RouterLimits(admission=AdmissionLimits(max_streams=1))
    async with door(tmp_path, limits) as built:
        verifier = built.bench.verifiers[0]
        verifier.gate.clear()
        running = asyncio.create_task(built.call("Generate", REQUEST, built.key))
        await verifier.wait_for("step", 1)
        if shared:
            in_time = frame(REQUEST, timeout_seconds=0.2)
            reason = await built.reason("Multiplex", in_time, built.key)
        else:
            reason = await built.reason("Generate", REQUEST, built.key, timeout=0.2)
        assert reason == "DEADLINE_EXCEEDED"
        verifier.gate.set()
        await running
        assert verifier.actions()["open"] == 1
        await built.bench.router.idle()


async def test_keys_that_are_none_stop_the_process(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("nonsense\n")
    flags = ("--grpc", "127.0.0.1:0", "--gateway", "127.0.0.1:0", "--verify", "127.0.0.1:1")
    assert "keys, line 1" in await refusal(*flags, "--keys", str(tmp_path / "keys"))
    assert "No such file" in await refusal(*flags, "--keys", str(tmp_path / "missing"))
    assert "--redis" in await refusal(*flags, "--keys", "redis")


async def until_status(client: httpx.AsyncClient, status: int, headers: dict[str, str]) -> None:
    """Ask until the answer is this one; the keys are looked at every second."""
    async with asyncio.timeout(20):
        while (await client.get("/v1/models", headers=headers)).status_code != status:
            pass


async def test_a_process_asks_for_keys_and_drains_http_streams(tmp_path: Path) -> None:
    first = {"authorization": f"Bearer {await key_in(tmp_path / 'keys')}"}
    async with workers() as (verifier, drafter):
        process = await start_router(
            *("--grpc", "127.0.0.1:0", "--gateway", "127.0.0.1:0"),
            *("--keys", str(tmp_path / "keys")),
            *("--verify", verifier.address, "--draft", drafter.address),
        )
        serving = await line_with(process, "serving")
        base = f"http://127.0.0.1:{serving['gateway_port']}"
        async with httpx.AsyncClient(base_url=base, timeout=30) as client:
            assert (await client.get("/health/ready")).status_code == 200
            assert (await client.get("/")).headers["content-type"].startswith("text/html")
            assert (await client.get("/v1/models")).status_code == 401
            assert (await client.get("/v1/models", headers=first)).status_code == 200
            second = {"authorization": f"Bearer {await key_in(tmp_path / 'keys')}"}
            await until_status(client, 200, second)

            verifier.gate.clear()
            body = {"model": "table", "prompt": "some words", "max_tokens": 12, "stream": True}
            body["model"] = (await client.get("/v1/models", headers=first)).json()["data"][0]["id"]
            asked = client.stream("POST", "/v1/completions", headers=second, json=body)
            async with asked as answer:
                await verifier.wait_for("step", 1)
                process.send_signal(signal.SIGTERM)
                await line_with(process, "draining")
                assert (await client.get("/health/live")).status_code == 200
                assert (await client.get("/health/ready")).status_code == 503
                verifier.gate.set()
                lines = [line async for line in answer.aiter_lines() if line.startswith("data: ")]
        assert lines[-1] == "data: [DONE]"
        reasons = [
            choice["finish_reason"]
            for line in lines[:-1]
            for choice in json.loads(line.removeprefix("data: "))["choices"]
        ]
        assert reasons[-1] == "length"
        async with asyncio.timeout(20):
            assert await process.wait() == 0
