"""The thin clients of benchmarks see the events that the router sends, and nothing else."""

from __future__ import annotations

import pytest

from specinfer.errors import InternalError
from specinfer.messages import SpeculationOptions
from specinfer.server import RpcServer, build_server
from specinfer_bench.gateway import compare
from specinfer_bench.spread import spread
from specinfer_bench.wire import GrpcWire, HttpWire
from specinfer_router.servicer import SERVICE, add_generation
from tests.kit.gateway import GatewayBench, completion_body, running_gateway
from tests.kit.router import request_of


async def test_both_doors_bring_the_same_number_of_events() -> None:
    async with running_gateway() as gateway:
        http = HttpWire(gateway.url.rpartition("/")[2])
        server = build_server("127.0.0.1:0", [SERVICE])
        add_generation(server, gateway.bench.router)
        await server.start()
        grpc = GrpcWire(f"127.0.0.1:{server.port}")
        try:
            plain = SpeculationOptions(enabled=False)
            over_grpc = await grpc.run(request_of(max_tokens=24, speculation=plain))
            body = completion_body(stream=True, speculation={"enabled": False})
            # The connection is kept: the second request must not see the rest of the first.
            over_http = [await http.run("/v1/completions", body) for _ in range(2)]
        finally:
            await grpc.close()
            await http.close()
            await server.drain(0)
    assert len(over_grpc.seconds) == 24
    for each in over_http:
        # An event whose bytes are no whole character yet has no text over HTTP.
        assert 2 <= len(each.seconds) <= 24
        assert 0 < each.first_seconds <= each.seconds[-1] <= each.total_seconds
        assert each.event_seconds >= 0


async def test_a_refused_request_is_no_stream() -> None:
    async with running_gateway() as gateway:
        http = HttpWire(gateway.url.rpartition("/")[2])
        with pytest.raises(InternalError, match="400 and no stream"):
            await http.run("/v1/completions", completion_body(stream=True, temperature=-1))
        await http.close()


async def test_the_gateway_is_compared_with_grpc() -> None:
    async with running_gateway() as gateway:
        address, stop = await served(gateway)
        found = await compare(
            address, gateway.url.rpartition("/")[2], None, pairs=2, tokens=12, plain=True
        )
        await stop.drain(0)
    assert (found.pairs, found.events) == (2, 12)
    assert 2 <= found.events_gateway <= 12
    assert found.cpu_event_grpc is None
    assert found.first_grpc.low <= found.first_grpc.median <= found.first_grpc.high


async def served(gateway: GatewayBench) -> tuple[str, RpcServer]:
    server = build_server("127.0.0.1:0", [SERVICE])
    add_generation(server, gateway.bench.router)
    await server.start()
    return f"127.0.0.1:{server.port}", server


def test_the_spread_is_that_of_the_median() -> None:
    found = spread([0.001] * 50 + [0.003] * 51, 1e3)
    assert (found.median, found.low, found.high) == (3.0, 1.0, 3.0)
    assert found == spread([0.001] * 50 + [0.003] * 51, 1e3)
