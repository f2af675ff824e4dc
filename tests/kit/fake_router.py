"""A router without models: it speaks the real protocol and does what a test scripts.

Runs on a thread of its own, so that tests with and without an event loop can call it. By default
every request is answered by tokens that depend on its input and seed alone, in groups of three
when it may be speculated on.
"""

from __future__ import annotations

import asyncio
import threading
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc.aio

from specinfer.convert import capabilities_to_wire, event_to_wire, request_from_wire
from specinfer.errors import SpecinferError
from specinfer.messages import (
    Capabilities,
    Finished,
    GenerateEvent,
    GenerateRequest,
    RoundFacts,
    SpeculationSummary,
    Started,
    TokenLogprob,
    TokensEvent,
    Usage,
)
from specinfer.server import build_server
from specinfer.sync_client import LoopThread
from specinfer.v1 import router_pb2, router_pb2_grpc

SERVICE = "specinfer.v1.GenerationService"
VOCABULARY = 997
RANDOM_SEED = 4242
GROUP = 3

Script = Callable[[GenerateRequest, int], AsyncIterator[GenerateEvent]]


def capabilities(*, chat: bool = True) -> Capabilities:
    """What the fake says of itself."""
    return Capabilities(
        model="fake",
        model_hash="a" * 64,
        tokenizer_hash="b" * 64,
        vocab_size=VOCABULARY,
        dtype="float32",
        max_model_len=512,
        max_tree_nodes=64,
        row_invariant=True,
        acceptance_rules=("match",),
        lossless=True,
        num_drafters=1,
        num_verifiers=1,
        chat=chat,
        version="0",
    )


def fake_tokens(request: GenerateRequest, count: int) -> list[int]:
    """Tokens that depend on the input and, when sampled, on the seed."""
    sampling = request.sampling
    seed = 0 if sampling.greedy else (RANDOM_SEED if request.random_seed else sampling.seed + 1)
    text = f"{request.prompt}{request.token_ids}{request.messages}{seed}"
    state = zlib.crc32(text.encode())
    return [zlib.crc32(f"{state}/{index}".encode()) % VOCABULARY for index in range(count)]


def started_event(request: GenerateRequest) -> Started:
    """The first event of a request."""
    seed = RANDOM_SEED if request.random_seed else request.sampling.seed
    return Started(request.request_id, f"session-{request.request_id}", "fake", seed, 7)


def tokens_event(request: GenerateRequest, offset: int, token_ids: list[int]) -> TokensEvent:
    """The event of one round; each token reads as ` w` and its number."""
    logprobs: tuple[TokenLogprob, ...] = ()
    if request.num_logprobs is not None:
        logprobs = tuple(TokenLogprob(t, -0.5, ((t, -0.5), (t + 1, -1.5))) for t in token_ids)
    accepted = len(token_ids) - 1
    facts = RoundFacts(offset + 1, accepted, accepted, "", 0.001, 0.002, 0.0, 0.0005, 0.0001)
    text = "".join(f" w{token}" for token in token_ids)
    return TokensEvent(offset, text, tuple(token_ids), accepted, logprobs, facts)


def finished_event(num_tokens: int, num_rounds: int) -> Finished:
    """The last event of a request that reached its length."""
    accepted = num_tokens - num_rounds
    summary = SpeculationSummary(
        num_rounds, num_rounds, accepted, accepted, (accepted,) if accepted else (), ()
    )
    return Finished("length", "", Usage(7, num_tokens, 2), summary)


async def answer(request: GenerateRequest, attempt: int) -> AsyncIterator[GenerateEvent]:
    """The default script."""
    token_ids = fake_tokens(request, request.stop.max_tokens or 9)
    size = GROUP if request.speculation.enabled else 1
    yield started_event(request)
    starts = range(0, len(token_ids), size)
    for offset in starts:
        yield tokens_event(request, offset, token_ids[offset : offset + size])
    yield finished_event(len(token_ids), len(starts))


class FakeRouter(router_pb2_grpc.GenerationServiceServicer):
    """The servicer, and what it saw.

    Attributes:
        script: events for a request and the number of its call, from 1.
        requests: every request, in order of arrival.
        metadata: its metadata.
        cancelled: set once a caller has left a stream early.
        address: where it listens.
    """

    def __init__(self, script: Script = answer, capabilities: Capabilities | None = None) -> None:
        self.script = script
        self.capabilities = capabilities
        self.requests: list[GenerateRequest] = []
        self.metadata: list[dict[str, str]] = []
        self.failures: list[SpecinferError] = []
        self.cancelled = threading.Event()
        self.address = ""

    async def Generate(
        self, request: Any, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[router_pb2.GenerateResponse]:
        self.requests.append(request_from_wire(request))
        self.metadata.append({str(k): str(v) for k, v in context.invocation_metadata() or ()})
        attempt = int(self.metadata[-1].get("x-attempt", "0"))
        try:
            async for event in self.script(self.requests[-1], attempt):
                yield event_to_wire(event)
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise

    async def GetCapabilities(self, request: Any, context: Any) -> Any:
        if self.failures:
            raise self.failures.pop(0)
        return capabilities_to_wire(self.capabilities or capabilities())


@contextmanager
def running(router: FakeRouter) -> Iterator[FakeRouter]:
    """Serve on a free port until the block ends."""
    loop = LoopThread()

    async def start() -> Any:
        server = build_server("127.0.0.1:0", [SERVICE])
        router_pb2_grpc.add_GenerationServiceServicer_to_server(router, server.server)
        await server.start()
        return server

    server = loop.run(start())
    router.address = f"127.0.0.1:{server.port}"
    try:
        yield router
    finally:
        loop.stop(server.drain(0))
