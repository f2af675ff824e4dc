"""A router in front of fake workers, as the tests of the router need it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry

from specinfer.messages import (
    Finished,
    GenerateEvent,
    GenerateRequest,
    ShapeQuery,
    SpeculationOptions,
    Started,
    TokensEvent,
)
from specinfer.metrics import RouterMetrics
from specinfer.sampling import SamplingParams, StopConditions
from specinfer_router.building import load_tokenizer
from specinfer_router.cluster import Cluster
from specinfer_router.links import LinkLimits
from specinfer_router.opening import SeatLimits
from specinfer_router.policy import StaticShape, TreeShapePolicy
from specinfer_router.router import Router, RouterLimits
from specinfer_router.store import MemoryStore, SessionStore
from tests.kit.fake_drafter import FakeDrafter
from tests.kit.fake_workers import FakeVerifier, info_of

PROMPT = tuple(range(5, 25))
FAST_LINKS = LinkLimits(min_backoff=0.01, max_backoff=0.05)


@dataclass(frozen=True)
class Generated:
    """One request's stream, put together."""

    started: Started
    rounds: tuple[TokensEvent, ...]
    finished: Finished

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token for event in self.rounds for token in event.token_ids)

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.rounds)

    @property
    def reasons(self) -> list[str]:
        return [event.round.root_only_reason for event in self.rounds]


@dataclass
class Bench:
    """A router and what stands behind it."""

    router: Router
    cluster: Cluster
    store: SessionStore
    registry: CollectorRegistry
    verifiers: list[FakeVerifier]
    drafters: list[FakeDrafter]

    async def generate(self, request: GenerateRequest) -> Generated:
        """Run one request to its end."""
        async with aclosing(self.router.generate(request)) as events:
            return collected([event async for event in events])


def collected(events: Iterable[GenerateEvent]) -> Generated:
    """A stream's events by kind; fails unless they come in the order that is promised."""
    started, *rounds, finished = events
    assert isinstance(started, Started)
    assert isinstance(finished, Finished)
    token_events = [event for event in rounds if isinstance(event, TokensEvent)]
    assert len(token_events) == len(rounds)
    offset = 0
    for event in token_events:
        assert event.offset == offset
        offset += len(event.token_ids)
    assert finished.usage.num_completion_tokens == offset
    return Generated(started, tuple(token_events), finished)


def request_of(
    *,
    token_ids: tuple[int, ...] = PROMPT,
    max_tokens: int | None = 40,
    seed: int = 3,
    stop: tuple[str, ...] = (),
    speculation: SpeculationOptions | None = None,
    **changes: Any,
) -> GenerateRequest:
    """A request with few words."""
    return GenerateRequest(
        token_ids=token_ids,
        sampling=SamplingParams(seed=seed),
        stop=StopConditions(max_tokens=max_tokens, stop=stop),
        speculation=speculation or SpeculationOptions(),
        **changes,
    )


@asynccontextmanager
async def running_router(
    *,
    verifiers: list[FakeVerifier] | None = None,
    drafters: list[FakeDrafter] | None = None,
    store: SessionStore | None = None,
    policy: TreeShapePolicy | None = None,
    limits: RouterLimits | None = None,
    links: LinkLimits = FAST_LINKS,
) -> AsyncIterator[Bench]:
    """A router with one verifier and one drafter, or with those given."""
    if verifiers is None:
        verifiers = [FakeVerifier(info_of("verify"))]
    if drafters is None:
        drafters = [FakeDrafter(info_of("draft"))]
    workers = [*verifiers, *drafters]
    await asyncio.gather(*(worker.start() for worker in workers))
    cluster = Cluster(
        [worker.address for worker in verifiers],
        [worker.address for worker in drafters],
        limits=links,
    )
    try:
        await cluster.start(seconds=10)
        registry = CollectorRegistry()
        kept = MemoryStore() if store is None else store
        router = Router(
            cluster,
            store=kept,
            tokenizer=await load_tokenizer(cluster, 100_000),
            policy=policy or StaticShape(ShapeQuery(max_nodes=8, max_depth=5)),
            metrics=RouterMetrics(registry, "table"),
            version="test",
            limits=limits or RouterLimits(max_tree_nodes=32, seats=SeatLimits(propose_seconds=2.0)),
        )
        yield Bench(router, cluster, kept, registry, verifiers, drafters)
        router.close()
    finally:
        await cluster.close()
        await asyncio.gather(*(worker.stop() for worker in workers))
