"""Resume, Cancel and Explain over the wire."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import pytest

from specinfer.convert import (
    event_from_wire,
    report_from_wire,
    request_from_wire,
    request_to_wire,
    resume_to_wire,
)
from specinfer.errors import InvalidRequest, NotFound, SpecinferError
from specinfer.messages import (
    ChatMessage,
    Finished,
    GenerateRequest,
    Grammar,
    ResumeRequest,
    Started,
    TokensEvent,
    ToolCall,
)
from specinfer.rpc import error_from_rpc, open_channel
from specinfer.server import build_server
from specinfer.v1 import router_pb2, router_pb2_grpc
from specinfer_router.servicer import SERVICE, add_generation
from tests.kit.router import Bench, collected, request_of, running_router


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[Bench, Any]]:
    async with running_router() as bench:
        server = build_server("127.0.0.1:0", [SERVICE])
        add_generation(server, bench.router)
        await server.start()
        async with open_channel(f"127.0.0.1:{server.port}") as channel:
            yield bench, router_pb2_grpc.GenerationServiceStub(channel)
        await server.server.stop(0)


async def failing(call: Callable[[], Awaitable[object]]) -> SpecinferError:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call()
    return error_from_rpc(failed.value)


async def test_a_broken_stream_goes_on_over_the_wire() -> None:
    async with serving() as (bench, stub):
        whole = await bench.generate(request_of())
        call = stub.Generate(request_to_wire(request_of()))
        started = event_from_wire(await call.read())
        first = event_from_wire(await call.read())
        call.cancel()
        assert isinstance(started, Started)
        assert isinstance(first, TokensEvent)
        wire = resume_to_wire(ResumeRequest(started.session_id, len(first.token_ids), "again"))
        events = [event_from_wire(one.event) async for one in stub.Resume(wire)]
        assert isinstance(events[0], Started)
        assert events[0].request_id == "again"
        tokens = [t for e in events if isinstance(e, TokensEvent) for t in e.token_ids]
        assert (*first.token_ids, *tokens) == whole.token_ids


async def test_a_cancelled_session_ends_for_its_reader() -> None:
    async with serving() as (bench, stub):
        bench.verifiers[0].gate.clear()
        wires = aiter(stub.Generate(request_to_wire(request_of(max_tokens=300))))
        started = event_from_wire(await anext(wires))
        assert isinstance(started, Started)
        await stub.Cancel(router_pb2.CancelRequest(session_id=started.session_id))
        bench.verifiers[0].gate.set()
        events = [event_from_wire(wire) async for wire in wires]
        assert isinstance(events[-1], Finished)
        assert events[-1].reason == "cancelled"


async def test_explain_tells_the_rounds_over_the_wire() -> None:
    async with serving() as (_, stub):
        wires = [wire async for wire in stub.Generate(request_to_wire(request_of()))]
        result = collected([event_from_wire(wire) for wire in wires])
        asked = router_pb2.ExplainRequest(request_id=result.started.request_id)
        report = report_from_wire(await stub.Explain(asked))
        assert [one.facts for one in report.rounds] == [event.round for event in result.rounds]
        assert report.timings.total_seconds >= result.finished.timings.total_seconds > 0


async def test_what_is_unknown_or_out_of_reach_is_told_apart() -> None:
    async with serving() as (bench, stub):
        unknown = await failing(lambda: stub.Cancel(router_pb2.CancelRequest(session_id="nobody")))
        assert isinstance(unknown, NotFound)
        nothing = router_pb2.ExplainRequest(request_id="nobody")
        assert isinstance(await failing(lambda: stub.Explain(nothing)), NotFound)
        result = await bench.generate(request_of())
        beyond = ResumeRequest(result.started.session_id, 1_000)

        async def resume() -> list[object]:
            return [wire async for wire in stub.Resume(resume_to_wire(beyond))]

        refused = await failing(resume)
        assert isinstance(refused, InvalidRequest)
        assert (refused.field, bool(refused.request_id)) == ("offset", True)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (request_of(affinity_key="k" * 300), "affinity_key"),
        (request_of(priority=1_000), "priority"),
        (request_of(grammar=Grammar("regex", "(")), "grammar"),
        (request_of(grammar=Grammar("json_schema", "{")), "grammar"),
        (GenerateRequest(messages=(ChatMessage("user", "a"),), tools=("{}",)), "tools"),
        (request_of(request_id="a\nb"), "request_id"),
    ],
)
async def test_extras_out_of_bounds_name_their_field(request_: GenerateRequest, field: str) -> None:
    async with serving() as (_, stub):

        async def call() -> list[object]:
            return [wire async for wire in stub.Generate(request_to_wire(request_))]

        refused = await failing(call)
        assert isinstance(refused, InvalidRequest)
        assert refused.field == field
        assert refused.request_id not in ("", "a\nb")


def test_a_conversation_with_calls_survives_the_wire() -> None:
    messages = (
        ChatMessage("user", "hi", name="ann"),
        ChatMessage("assistant", "", tool_calls=(ToolCall("c1", "add", '{"a": 1}'),)),
        ChatMessage("tool", "2", tool_call_id="c1"),
    )
    request = GenerateRequest(
        messages=messages,
        tools=('{"type": "function"}',),
        grammar=Grammar("choice", '["a", "b"]'),
        prediction="text",
        affinity_key="team",
        priority=-3,
        detail=True,
    )
    assert request_from_wire(request_to_wire(request)) == request
