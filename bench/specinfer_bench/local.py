"""The whole cluster in one process: the router's own loop over engines that it calls directly.

What a benchmark compares the cluster with, to see what processes, frames and gRPC cost. The links
here answer the calls that `specinfer_router.worker_links` sends over the network; everything above
them is the router as it is. This module knows nothing of prompts or reports.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar, cast

import torch
from prometheus_client import CollectorRegistry

from specinfer.errors import Cancelled, InternalError, SpecinferError
from specinfer.messages import (
    ChatMessage,
    DraftResult,
    GenerateRequest,
    RoundFacts,
    ShapeQuery,
    SpeculationOptions,
    TokensEvent,
    VerifyResult,
    WorkerInfo,
    WorkerLoad,
)
from specinfer.metrics import RouterMetrics
from specinfer.sampling import SamplingParams, StopConditions
from specinfer.tree import TokenTree
from specinfer_bench.measure import Sample
from specinfer_bench.options import BenchOptions
from specinfer_draft.engine import DraftEngine
from specinfer_draft.settings import Settings as DraftSettings
from specinfer_draft.worker import Worker as DraftWorker
from specinfer_draft.worker import build_worker as build_drafter
from specinfer_router.answer import Answer
from specinfer_router.breaker import Breaker, BreakerLimits
from specinfer_router.cluster import Cluster
from specinfer_router.crowd import RecentMost
from specinfer_router.hedging import MovingQuantile
from specinfer_router.policy import TreeShapePolicy
from specinfer_router.pool import WorkerPool
from specinfer_router.router import Router
from specinfer_router.settings import RouterSettings
from specinfer_router.store import MemoryStore
from specinfer_router.tokenizer import ServedTokenizer
from specinfer_router.worker_links import DraftLink, VerifyLink
from specinfer_verify.engine import VerifyEngine
from specinfer_verify.settings import Settings as VerifySettings
from specinfer_verify.worker import Worker
from specinfer_verify.worker import build_worker as build_verifier

_Value = TypeVar("_Value")
_Settings = TypeVar("_Settings")
_Worker = TypeVar("_Worker")


def _answer_of(future: Future[_Value]) -> Answer[_Value]:
    """What an engine's thread will say, told on the event loop that asked, as links tell it."""
    answer: Answer[_Value] = Answer()

    def tell(told: asyncio.Future[_Value]) -> None:
        error = None if told.cancelled() else told.exception()
        if told.cancelled():
            answer.fail(Cancelled("the engine gave up"))
        elif isinstance(error, SpecinferError):
            answer.fail(error)
        elif error is not None:
            answer.fail(InternalError(f"{type(error).__name__}: {error}"))
        else:
            answer.succeed(told.result())

    asyncio.wrap_future(future).add_done_callback(tell)
    return answer


class LocalLink:
    """What the router's pools and seats look at, for a worker that is always there."""

    address = "in this process"
    connected = True
    ready = True
    trusted = True
    idle = True
    generation = 1

    def __init__(self, info: WorkerInfo) -> None:
        self.info = info
        self.load = WorkerLoad()
        self.name = info.model_name
        self.num_seats = 0
        self.num_late = 0
        self.heard = 0.0
        self.breaker = Breaker(BreakerLimits())
        self.answer_seconds = MovingQuantile()

    def give_up(self) -> None:
        """There is no other worker to go to."""


class LocalDraftLink(LocalLink):
    """A draft engine behind the methods of DraftLink."""

    def __init__(self, engine: DraftEngine, info: WorkerInfo) -> None:
        super().__init__(info)
        self._engine = engine

    def open(
        self,
        session_id: str,
        epoch: int,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        num_prompt_tokens: int,
        grammar: None = None,
        owner: int = 0,
        traceparent: str = "",
    ) -> Answer[None]:
        """See DraftLink.open; the benchmark asks for no grammar."""
        return _answer_of(
            self._engine.open(session_id, epoch, token_ids, sampling, num_prompt_tokens)
        )

    def propose(
        self,
        session_id: str,
        epoch: int,
        known_len: int,
        new_token_ids: Sequence[int],
        shape: ShapeQuery,
        deadline_seconds: float,
        owner: int = 0,
        traceparent: str = "",
    ) -> Answer[DraftResult]:
        """See DraftLink.propose."""
        return _answer_of(
            self._engine.propose(
                session_id, epoch, known_len, new_token_ids, shape, deadline_seconds
            )
        )

    def forget(self, session_id: str, epoch: int, owner: int = 0) -> Answer[None]:
        """See DraftLink.forget."""
        return _answer_of(self._engine.close(session_id))


class LocalVerifyLink(LocalLink):
    """A verify engine behind the methods of VerifyLink."""

    def __init__(self, engine: VerifyEngine, info: WorkerInfo) -> None:
        super().__init__(info)
        self.recent_seats = RecentMost()
        self._engine = engine

    def open(
        self,
        session_id: str,
        epoch: int,
        token_ids: Sequence[int],
        num_prompt_tokens: int,
        sampling: SamplingParams,
        num_logprobs: int | None,
        grammar: None = None,
        owner: int = 0,
        traceparent: str = "",
    ) -> Answer[None]:
        """See VerifyLink.open; the benchmark asks for no grammar."""
        return _answer_of(
            self._engine.open(
                session_id, epoch, token_ids, sampling, num_prompt_tokens, num_logprobs
            )
        )

    def step(
        self,
        session_id: str,
        epoch: int,
        tree: TokenTree,
        num_tokens: int = 1,
        owner: int = 0,
        traceparent: str = "",
    ) -> Answer[VerifyResult]:
        """See VerifyLink.step."""
        return _answer_of(self._engine.step(session_id, epoch, tree, num_tokens=num_tokens))

    def forget(self, session_id: str, epoch: int, owner: int = 0) -> Answer[None]:
        """See VerifyLink.forget."""
        return _answer_of(self._engine.close(session_id))


@dataclass(frozen=True)
class LocalCluster:
    """What a Router asks of a Cluster."""

    target: WorkerInfo
    verifiers: WorkerPool[VerifyLink]
    drafters: WorkerPool[DraftLink]

    @property
    def max_session_tokens(self) -> int:
        """Longest session in tokens."""
        return min(self.target.max_model_len, self.target.num_blocks * self.target.block_size)

    @property
    def max_tree_nodes(self) -> int:
        """Largest tree, root included."""
        return self.target.max_tree_nodes


@contextmanager
def local_router(
    model: Path, draft: Path, dtype: str, policy: TreeShapePolicy | None = None
) -> Iterator[Router]:
    """A router, a verify engine and a draft engine in this process, ended with the block.

    Args:
        model: folder of the target's checkpoint.
        draft: folder of the drafter's.
        dtype: of both.
        policy: how trees are chosen; None takes what a router takes by its default.

    Raises:
        InvalidCheckpoint: when a folder cannot be served.
    """
    verifier = built(build_verifier, VerifySettings(model=model, dtype=dtype))
    drafter = built_drafter(DraftSettings(model=draft, dtype=dtype))
    with running(drafter.engine), running(verifier.engine):
        yield router_over(verifier, drafter, policy=policy)


def built(build: Callable[[_Settings], _Worker], settings: _Settings) -> _Worker:
    """A worker built in a thread that ends, as workers do it: its compute threads end with it.

    OpenMP's threads belong to the thread that computes with them, and where there are more of them
    than cores they sleep at every wait.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(build, settings).result()


def built_drafter(settings: DraftSettings) -> DraftWorker:
    """A drafter whose engine computes on its own thread alone, as a cluster's on few cores does.

    With a team of its own beside the verifier's there would be more threads than cores.
    """
    before = torch.get_num_threads()
    worker = built(build_drafter, replace(settings, threads=1))
    torch.set_num_threads(before)
    worker.engine.prepare_with(compute_alone)
    return worker


def compute_alone() -> None:
    """Have the calling thread compute without others; those that begin later do as before."""
    # A thread that never asked takes, at its first product, what was last set anywhere.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(1) as other:
        other.submit(torch.set_num_threads, before).result()


@contextmanager
def running(engine: DraftEngine | VerifyEngine) -> Iterator[None]:
    """Start an engine and stop it with the block."""
    engine.start()
    try:
        yield
    finally:
        engine.stop()


def router_over(
    worker: Worker,
    drafter: DraftWorker,
    draft: LocalDraftLink | None = None,
    policy: TreeShapePolicy | None = None,
) -> Router:
    """A router over two workers of this process, whose engines run; several may share them.

    `draft` goes before the usual link to the drafter, `policy` before the router's default.
    """
    # The casts say what the classes above are for: they stand where the network's links stand.
    verify = LocalVerifyLink(worker.engine, worker.info)
    draft = draft or LocalDraftLink(drafter.engine, drafter.info)
    cluster = LocalCluster(
        worker.info,
        WorkerPool([cast(VerifyLink, verify)], asyncio.Event()),
        WorkerPool([cast(DraftLink, draft)], asyncio.Event()),
    )
    files = worker.loaded.tokenizer_files
    settings = RouterSettings(verify=(verify.address,))
    return Router(
        cast(Cluster, cluster),
        store=MemoryStore(max_sessions=1024, ttl_seconds=60.0),
        tokenizer=ServedTokenizer(
            files.tokenizer_json,
            chat_template=files.chat_template or "",
            eos_token_ids=worker.loaded.eos_token_ids,
            bos_token=files.bos_token,
            eos_token=files.eos_token,
        ),
        policy=policy
        or settings.shape_policy(worker.info.step_costs, lambda: drafter.info.step_costs),
        metrics=RouterMetrics(CollectorRegistry(), worker.info.model_name),
        version=worker.info.version,
        limits=settings.limits(worker.info.step_costs),
    )


async def run_local(router: Router, prompt: str, seed: int, options: BenchOptions) -> Sample:
    """One prompt through a router of this process; the times are those of `run_prompt`."""
    chat = router.capabilities().chat
    request = GenerateRequest(
        prompt=None if chat else prompt,
        messages=(ChatMessage("user", prompt),) if chat else None,
        sampling=SamplingParams(temperature=options.temperature, seed=seed),
        stop=StopConditions(max_tokens=options.max_tokens),
        speculation=SpeculationOptions(),
    )
    return await run_request(router, request)


async def run_request(router: Router, request: GenerateRequest) -> Sample:
    """One request through a router of this process; raises what the router raises."""
    begun = time.perf_counter()
    first: float | None = None
    token_ids: list[int] = []
    rounds: list[RoundFacts] = []
    async for event in router.generate(request):
        if isinstance(event, TokensEvent):
            first = first or time.perf_counter()
            token_ids.extend(event.token_ids)
            rounds.append(event.round)
    ended = time.perf_counter()
    return Sample(tuple(token_ids), ended - begun, (first or ended) - begun, tuple(rounds))
