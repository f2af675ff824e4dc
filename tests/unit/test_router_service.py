"""The public service over real gRPC: events, typed errors, cancellation, bounds, draining."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import pytest

from specinfer.convert import event_from_wire, request_to_wire
from specinfer.errors import InvalidRequest, NotFound, ResourceExhausted, SpecinferError
from specinfer.messages import (
    ChatMessage,
    Finished,
    GenerateEvent,
    GenerateRequest,
    SpeculationOptions,
    Started,
)
from specinfer.rpc import error_from_rpc, open_channel
from specinfer.sampling import SamplingParams, StopConditions
from specinfer.server import build_server
from specinfer.v1 import router_pb2, router_pb2_grpc
from specinfer_router.admission import AdmissionLimits
from specinfer_router.router import RouterLimits
from specinfer_router.servicer import SERVICE, add_generation
from specinfer_router.store import MemoryStore
from tests.kit.fake_workers import VOCAB_SIZE, FakeVerifier, continuation, info_of
from tests.kit.router import PROMPT, Bench, Generated, collected, request_of, running_router


class Caller:
    """A plain gRPC client of one router."""

    def __init__(self, bench: Bench, stub: Any) -> None:
        self.bench = bench
        self.stub = stub

    async def events(self, request: GenerateRequest) -> list[GenerateEvent]:
        return await self.wire_events(request_to_wire(request))

    async def wire_events(self, request: router_pb2.GenerateRequest) -> list[GenerateEvent]:
        try:
            return [event_from_wire(event) async for event in self.stub.Generate(request)]
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error

    async def generate(self, request: GenerateRequest) -> Generated:
        return collected(await self.events(request))


@asynccontextmanager
async def serving(**parts: Any) -> AsyncIterator[Caller]:
    async with running_router(**parts) as bench:
        server = build_server("127.0.0.1:0", [SERVICE])
        add_generation(server, bench.router)
        await server.start()
        async with open_channel(f"127.0.0.1:{server.port}") as channel:
            yield Caller(bench, router_pb2_grpc.GenerationServiceStub(channel))
        await server.server.stop(0)


@pytest.fixture
async def caller() -> AsyncIterator[Caller]:
    async with serving() as built:
        yield built


async def test_a_prompt_comes_back_as_a_stream(caller: Caller) -> None:
    request = GenerateRequest(
        prompt="remove common whitespace",
        sampling=SamplingParams(seed=9),
        stop=StopConditions(max_tokens=25),
        request_id="mine",
    )
    result = await caller.generate(request)
    assert result.started.request_id == "mine"
    assert (result.started.model, result.started.seed) == ("table", 9)
    assert result.finished.usage.num_prompt_tokens == result.started.num_prompt_tokens > 0
    assert result.finished.usage.num_cached_tokens == 2
    prompt_ids = (await caller.bench.store.load(result.started.session_id)).token_ids[:-25]
    assert result.token_ids == continuation(prompt_ids, 25, seed=9)


async def test_the_router_chooses_and_tells_a_seed_that_repeats_the_tokens(caller: Caller) -> None:
    open_seed = GenerateRequest(
        token_ids=PROMPT, random_seed=True, stop=StopConditions(max_tokens=10)
    )
    first, other = await caller.generate(open_seed), await caller.generate(open_seed)
    assert first.started.seed != other.started.seed
    assert first.started.request_id != other.started.request_id
    again = await caller.generate(request_of(seed=first.started.seed, max_tokens=10))
    assert again.token_ids == first.token_ids != other.token_ids


async def test_a_conversation_goes_through_the_chat_template(caller: Caller) -> None:
    messages = (ChatMessage("user", "words"),)
    result = await caller.generate(
        GenerateRequest(messages=messages, stop=StopConditions(max_tokens=5))
    )
    plain = await caller.generate(
        GenerateRequest(prompt="<|user|>words<|assistant|>", stop=StopConditions(max_tokens=5))
    )
    assert result.token_ids == plain.token_ids


async def test_capabilities_tell_what_the_cluster_is(caller: Caller) -> None:
    wire = await caller.stub.GetCapabilities(router_pb2.GetCapabilitiesRequest())
    assert (wire.model, wire.vocab_size, wire.max_model_len) == ("table", VOCAB_SIZE, 512)
    assert (wire.num_drafters, wire.num_verifiers, wire.chat) == (1, 1, True)
    assert (wire.lossless, wire.row_invariant, wire.max_tree_nodes) == (True, True, 32)


def bad(**changes: Any) -> GenerateRequest:
    given: dict[str, Any] = {"token_ids": PROMPT}
    return GenerateRequest(**(given | changes))


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (bad(token_ids=()), "prompt"),
        (bad(token_ids=None, prompt=""), "prompt"),
        (bad(token_ids=(1, VOCAB_SIZE)), "token_ids"),
        (bad(token_ids=(1,) * 512), "prompt"),
        (bad(token_ids=None, prompt="x" * 100_001), "prompt"),
        (bad(token_ids=None, messages=()), "messages"),
        (bad(stop=StopConditions(max_tokens=493)), "max_tokens"),
        (bad(stop=StopConditions(stop_token_ids=(VOCAB_SIZE,))), "stop_token_ids"),
        (bad(sampling=SamplingParams(logit_bias={VOCAB_SIZE: 1.0})), "logit_bias"),
        (bad(num_logprobs=21), "num_logprobs"),
        (bad(request_id="x" * 129), "request_id"),
        (bad(request_id="line\nbreak"), "request_id"),
        (bad(speculation=SpeculationOptions(max_nodes=1024)), "speculation.max_nodes"),
        (bad(speculation=SpeculationOptions(max_depth=1024)), "speculation.max_depth"),
        (bad(speculation=SpeculationOptions(widths=(40,))), "speculation.widths"),
        (bad(speculation=SpeculationOptions(widths=(0,))), "speculation.widths"),
        (bad(speculation=SpeculationOptions(widths=(1,) * 40)), "speculation.widths"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_bad_requests_name_the_field(
    caller: Caller, request_: GenerateRequest, field: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await caller.events(request_)
    assert refused.value.field == field
    assert refused.value.request_id
    assert not refused.value.retryable
    assert caller.bench.verifiers[0].frames == [], "refused before any work"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"stop": router_pb2.StopConditions(max_tokens=0)}, "max_tokens"),
        ({"stop": router_pb2.StopConditions(stop=["x"] * 17)}, "stop"),
        ({"stop": router_pb2.StopConditions(stop=[""])}, "stop"),
        ({"sampling": {"temperature": -1.0}}, "temperature"),
        ({"sampling": {"temperature": float("nan")}}, "temperature"),
        ({"sampling": {"top_p": 0.0}}, "top_p"),
        ({"sampling": {"seed": 2**63}}, "seed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_bad_values_off_the_wire_name_the_field(
    caller: Caller, change: dict[str, Any], field: str
) -> None:
    wire = router_pb2.GenerateRequest(
        token_ids=router_pb2.TokenIds(token_ids=PROMPT), request_id="mine", **change
    )
    with pytest.raises(InvalidRequest) as refused:
        await caller.wire_events(wire)
    assert (refused.value.field, refused.value.request_id) == (field, "mine")


async def test_no_input_at_all_and_another_model(caller: Caller) -> None:
    with pytest.raises(InvalidRequest):
        await caller.wire_events(router_pb2.GenerateRequest())
    with pytest.raises(NotFound, match="table"):
        await caller.events(bad(model="other"))


async def test_a_model_without_template_says_so() -> None:
    verifier = FakeVerifier(info_of("verify"), chat_template="")
    async with serving(verifiers=[verifier]) as caller:
        with pytest.raises(InvalidRequest, match="prompt instead"):
            await caller.events(GenerateRequest(messages=(ChatMessage("user", "hi"),)))


@pytest.mark.parametrize("num_read", [0, 3])
async def test_a_caller_that_leaves_cancels_its_session(caller: Caller, num_read: int) -> None:
    call = caller.stub.Generate(request_to_wire(request_of(max_tokens=400)))
    session_id = ""
    for _ in range(num_read):
        event = event_from_wire(await call.read())
        if isinstance(event, Started):
            session_id = event.session_id
    await caller.bench.verifiers[0].wait_for("step", 1)
    call.cancel()
    for worker in (caller.bench.verifiers[0], caller.bench.drafters[0]):
        await worker.wait_for("close", 1)
        assert not worker.sessions
    if session_id:
        steps = caller.bench.verifiers[0].num_steps
        await caller.generate(request_of(max_tokens=1))
        assert caller.bench.verifiers[0].num_steps == steps + 1
        assert (await caller.bench.store.load(session_id)).finish_reason == "abandoned"


async def test_a_deadline_of_the_caller_ends_the_session(caller: Caller) -> None:
    caller.bench.verifiers[0].gate.clear()
    call = caller.stub.Generate(request_to_wire(request_of()), timeout=0.3)
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        async for _ in call:
            pass
    assert ended.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    caller.bench.verifiers[0].gate.set()
    await caller.bench.verifiers[0].wait_for("close", 1)


async def test_a_reader_that_stops_reading_holds_nobody_up() -> None:
    limits = RouterLimits(max_events=4, stall_seconds=0.3)
    async with serving(limits=limits) as caller:
        # Logprobs make events large enough to fill the transport's window.
        request = request_of(max_tokens=480, num_logprobs=20)
        call = caller.stub.Generate(request_to_wire(request))
        await call.read()
        quick = await caller.generate(request_of(max_tokens=50))
        assert quick.token_ids == continuation(PROMPT, 50, seed=3)
        await caller.bench.verifiers[0].wait_for("close", 2)
        call.cancel()


async def test_too_many_streams_are_refused_with_a_time_to_come_back() -> None:
    async with serving(
        limits=RouterLimits(admission=AdmissionLimits(max_streams=2, max_waiting=0))
    ) as caller:
        caller.bench.verifiers[0].gate.clear()
        calls = [aiter(caller.stub.Generate(request_to_wire(request_of()))) for _ in range(2)]
        for call in calls:
            await anext(call)
        with pytest.raises(ResourceExhausted) as full:
            await caller.events(request_of())
        assert full.value.retry_after == 1.0
        assert full.value.retryable
        caller.bench.verifiers[0].gate.set()
        for call in calls:
            last = [event_from_wire(event) async for event in call][-1]
            assert isinstance(last, Finished)
        await caller.generate(request_of())


async def test_a_draining_router_finishes_what_runs_and_takes_nothing_new(caller: Caller) -> None:
    caller.bench.verifiers[0].gate.clear()
    running = asyncio.create_task(caller.generate(request_of()))
    await caller.bench.verifiers[0].wait_for("step", 1)
    await caller.bench.router.drain()
    with pytest.raises(SpecinferError, match="shutting down") as refused:
        await caller.events(request_of())
    assert refused.value.retryable
    caller.bench.verifiers[0].gate.set()
    assert (await running).token_ids == continuation(PROMPT, 40, seed=3)
    assert caller.bench.router.not_ready_reason == "draining"


async def test_prompts_and_outputs_never_reach_the_log(
    caller: Caller, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    secret = "remove common whitespace"
    result = await caller.generate(
        GenerateRequest(prompt=secret, stop=StopConditions(max_tokens=20))
    )
    with pytest.raises(SpecinferError):
        await caller.events(GenerateRequest(prompt=secret, stop=StopConditions(max_tokens=10_000)))
    ours = "\n".join(
        record.getMessage() for record in caplog.records if record.name.startswith("specinfer")
    )
    assert secret not in ours
    assert result.text not in ours


class AwayStore(MemoryStore):
    """A store that may be away."""

    away = 0.0

    @property
    def away_seconds(self) -> float:
        return self.away


async def test_a_router_that_refuses_without_its_store_is_not_ready() -> None:
    for needs_store, reason in ((True, "the session store is away"), (False, "")):
        store = AwayStore()
        async with running_router(store=store, limits=RouterLimits(needs_store=needs_store)) as at:
            assert at.router.not_ready_reason == ""
            store.away = 3.0
            assert at.router.not_ready_reason == reason
