"""Servers and channels: errors travel with their details, ports and binds are checked."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from specinfer.errors import InternalError, InvalidRequest, ResourceExhausted
from specinfer.probe import main
from specinfer.rpc import TlsSettings, error_from_rpc, open_channel
from specinfer.server import (
    LIVENESS,
    READINESS,
    STARTUP,
    RpcServer,
    build_server,
    reporting_readiness,
    serve_until_signal,
)
from specinfer.v1 import router_pb2, router_pb2_grpc
from tests.kit.certificates import make_certificates
from tests.kit.waiting import until

SERVICE = "specinfer.v1.GenerationService"


class FailingService(router_pb2_grpc.GenerationServiceServicer):
    """Fails every call: with our error, and with a fault."""

    async def Generate(
        self, request: Any, context: Any
    ) -> AsyncIterator[router_pb2.GenerateResponse]:
        yield router_pb2.GenerateResponse()
        if request.model:
            raise InvalidRequest(f"no model {request.model}", request_id=request.model)
        raise ResourceExhausted("full", field="prompt", request_id="r1", retry_after=1.5)

    async def Resume(self, request: Any, context: Any) -> AsyncIterator[router_pb2.ResumeResponse]:
        raise InvalidRequest("no session")
        yield

    async def Cancel(self, request: Any, context: Any) -> Any:
        raise InvalidRequest("no session")

    async def Explain(self, request: Any, context: Any) -> Any:
        raise InvalidRequest("no session")

    async def Multiplex(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:
        raise InvalidRequest("no session")
        yield

    async def GetCapabilities(self, request: Any, context: Any) -> Any:
        raise ValueError("secret")


@pytest.fixture
async def server() -> AsyncIterator[RpcServer]:
    built = build_server("127.0.0.1:0", [SERVICE])
    router_pb2_grpc.add_GenerationServiceServicer_to_server(FailingService(), built.server)
    await built.start()
    yield built
    await built.drain(0)


async def test_our_errors_arrive_with_their_details(server: RpcServer) -> None:
    async with open_channel(f"127.0.0.1:{server.port}") as channel:
        stub = router_pb2_grpc.GenerationServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stub.Generate(router_pb2.GenerateRequest()):
                pass
    error = error_from_rpc(caught.value)
    assert isinstance(error, ResourceExhausted)
    assert (error.message, error.field, error.request_id) == ("full", "prompt", "r1")
    assert error.retry_after == 1.5
    assert error.retryable


async def test_a_long_echo_does_not_change_the_status(server: RpcServer) -> None:
    async with open_channel(f"127.0.0.1:{server.port}") as channel:
        stub = router_pb2_grpc.GenerationServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stub.Generate(router_pb2.GenerateRequest(model="m" * 20_000)):
                pass
    error = error_from_rpc(caught.value)
    assert isinstance(error, InvalidRequest)
    assert error.message.startswith("no model mmm")


async def test_a_fault_tells_no_secrets(server: RpcServer) -> None:
    async with open_channel(f"127.0.0.1:{server.port}") as channel:
        stub = router_pb2_grpc.GenerationServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetCapabilities(router_pb2.GetCapabilitiesRequest())
    error = error_from_rpc(caught.value)
    assert isinstance(error, InternalError)
    assert "secret" not in error.message


async def test_health_is_told_for_each_service(server: RpcServer) -> None:
    async with open_channel(f"127.0.0.1:{server.port}") as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        await server.set_serving(False)
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=SERVICE))
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING


async def health_of(server: RpcServer) -> dict[str, bool]:
    """What the health service says of each of the three names that probes ask for."""
    names = (STARTUP, READINESS, LIVENESS)
    async with open_channel(f"127.0.0.1:{server.port}") as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        answers = [await stub.Check(health_pb2.HealthCheckRequest(service=name)) for name in names]
    serving = health_pb2.HealthCheckResponse.SERVING
    return {name: answer.status == serving for name, answer in zip(names, answers, strict=True)}


async def test_the_three_probes_mean_three_things(server: RpcServer) -> None:
    assert await health_of(server) == {STARTUP: True, READINESS: True, LIVENESS: True}
    await server.set_serving(False)  # draining
    assert await health_of(server) == {STARTUP: True, READINESS: False, LIVENESS: True}
    await server.set_failed()
    assert await health_of(server) == {STARTUP: True, READINESS: False, LIVENESS: False}


async def test_readiness_follows_what_is_served(
    server: RpcServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specinfer.server.READINESS_SECONDS", 0.01)
    ready = [False]
    async with reporting_readiness(server, lambda: ready[0]):
        for wanted in (False, True):
            ready[0] = wanted

            async def told(wanted: bool = wanted) -> bool:
                return (await health_of(server))[READINESS] is wanted

            await until(told, f"readiness {wanted}")
    assert (await health_of(server))[LIVENESS]


async def test_the_container_probe_asks_the_health_service(
    server: RpcServer, capfd: pytest.CaptureFixture[str]
) -> None:
    address = f"127.0.0.1:{server.port}"

    async def probe(*arguments: str) -> int:
        return await asyncio.to_thread(main, [address, *arguments])

    assert [await probe(), await probe("--service", SERVICE)] == [0, 0]
    assert await probe("--service", "nobody") == 1
    await server.set_serving(False)
    assert await probe() == 1
    assert "NOT_SERVING" in capfd.readouterr().err
    assert await probe("--service", LIVENESS) == 0


async def test_the_container_probe_speaks_tls(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = make_certificates(tmp_path)
    tls = TlsSettings(made.ca, made.server.certificate, made.server.key)
    built = build_server("127.0.0.1:0", [SERVICE], tls=tls)
    await built.start()
    address = [f"127.0.0.1:{built.port}", "--tls-ca", str(made.ca)]
    ours = ["--tls-certificate", str(made.client.certificate), "--tls-key", str(made.client.key)]
    assert await asyncio.to_thread(main, [*address, *ours]) == 0
    assert await asyncio.to_thread(main, address) == 1, "the server asks for a certificate"
    await built.drain(0)


def test_the_container_probe_fails_where_nobody_listens(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["127.0.0.1:1", "--timeout", "1"]) == 1
    assert "127.0.0.1:1: [Errno 111]" in capsys.readouterr().err
    assert main(["127.0.0.1:1", "--tls-ca", "/nowhere/ca.pem"]) == 1
    assert "No such file" in capsys.readouterr().err


async def test_a_port_in_use_is_said(server: RpcServer) -> None:
    with pytest.raises(InvalidRequest, match="in use"):
        build_server(f"127.0.0.1:{server.port}", [SERVICE])


async def test_a_wide_plain_bind_has_to_be_allowed() -> None:
    with pytest.raises(InvalidRequest, match="insecure-bind"):
        build_server("0.0.0.0:0", [SERVICE])


async def test_a_failed_engine_ends_the_process_with_an_error(server: RpcServer) -> None:
    failed = asyncio.Event()
    ending = asyncio.create_task(serve_until_signal(server, grace_seconds=60.0, failed=failed))
    failed.set()
    with pytest.raises(InternalError, match="engine"):
        await asyncio.wait_for(ending, 30.0)


async def test_a_second_signal_ends_the_patience(server: RpcServer) -> None:
    draining, never = asyncio.Event(), asyncio.Event()

    async def drain() -> None:
        draining.set()
        await never.wait()

    ending = asyncio.create_task(serve_until_signal(server, grace_seconds=60.0, on_drain=drain))
    await asyncio.sleep(0)  # the task installs its handlers before it waits
    os.kill(os.getpid(), signal.SIGTERM)
    await draining.wait()
    assert not ending.done()
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(ending, 30.0)
