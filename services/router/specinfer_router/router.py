"""Admits requests and makes sessions of them; what the gRPC servicer and the gateway both call.

This module knows nothing of protobuf or HTTP.
"""

from __future__ import annotations

import logging
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace

from specinfer.errors import ResourceExhausted, SpecinferError, Unavailable
from specinfer.messages import (
    Capabilities,
    Finished,
    GenerateEvent,
    GenerateRequest,
    Started,
)
from specinfer.metrics import RouterMetrics
from specinfer.telemetry import Telemetry
from specinfer_router.checks import check_request, check_token_ids, completion_room
from specinfer_router.completion import Completion
from specinfer_router.policy import TreeShapePolicy
from specinfer_router.pool import Cluster
from specinfer_router.seats import DraftSeat, VerifySeat
from specinfer_router.session import Session, SessionLimits
from specinfer_router.store import SessionRecord, SessionStore
from specinfer_router.stream import buffered
from specinfer_router.tokenizer import ServedTokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RouterLimits:
    """Bounds of what a router takes on.

    Attributes:
        max_streams: most requests at once.
        max_tree_nodes: largest tree that a request may ask for, root included.
        max_events: how far a session may run ahead of its reader.
        stall_seconds: a reader that takes nothing for so long loses its session.
        propose_seconds: a drafter that takes longer is not waited for.
        step_seconds: a verify worker that takes longer for a round is taken to be lost.
        failover_seconds: how long a session waits for a verify worker when none is ready.
    """

    max_streams: int = 256
    max_tree_nodes: int = 64
    max_events: int = 64
    stall_seconds: float = 60.0
    propose_seconds: float = 0.1
    step_seconds: float = 120.0
    failover_seconds: float = 30.0


class Router:
    """The front of a cluster."""

    def __init__(
        self,
        cluster: Cluster,
        *,
        store: SessionStore,
        tokenizer: ServedTokenizer,
        policy: TreeShapePolicy,
        metrics: RouterMetrics,
        version: str,
        limits: RouterLimits | None = None,
        telemetry: Telemetry | None = None,
    ) -> None:
        """Put a started cluster, a store and a tokenizer together."""
        self._cluster = cluster
        self._store = store
        self._tokenizer = tokenizer
        self._policy = policy
        self._metrics = metrics
        self._version = version
        self._limits = limits or RouterLimits()
        self._telemetry = telemetry or Telemetry()
        self._num_streams = 0
        self._draining = False

    @property
    def not_ready_reason(self) -> str:
        """Why new requests would fail now, or ""."""
        if self._draining:
            return "draining"
        return "" if self._cluster.verifiers.num_ready else "no verify worker is ready"

    @property
    def max_tree_nodes(self) -> int:
        """Largest tree, root included, that this cluster takes."""
        return min(self._limits.max_tree_nodes, self._cluster.max_tree_nodes)

    def capabilities(self) -> Capabilities:
        """What this cluster accepts now."""
        target = self._cluster.target
        return Capabilities(
            model=target.model_name,
            model_hash=target.model_hash,
            tokenizer_hash=target.tokenizer_hash,
            vocab_size=target.vocab_size,
            dtype=target.dtype,
            max_model_len=self._cluster.max_session_tokens,
            max_tree_nodes=self.max_tree_nodes,
            row_invariant=target.row_invariant,
            acceptance_rules=target.acceptance_rules,
            lossless=set(target.acceptance_rules) <= {"match"},
            num_drafters=self._cluster.drafters.num_ready,
            num_verifiers=self._cluster.verifiers.num_ready,
            chat=self._tokenizer.has_chat_template,
            version=self._version,
        )

    async def drain(self) -> None:
        """Take no new request; those in progress go on."""
        self._draining = True

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateEvent, None]:
        """The events of one request; closing the generator cancels it.

        Raises:
            SpecinferError: with the request's id; any of the error tree but ClientClosed.
        """
        arrived = time.perf_counter()
        request = replace(request, request_id=request.request_id or uuid.uuid4().hex)
        outcome = "cancelled"
        try:
            with (
                self._admit(),
                self._telemetry.span("generate", request_id=request.request_id),
            ):
                source = buffered(
                    self._events(request, arrived),
                    max_events=self._limits.max_events,
                    stall_seconds=self._limits.stall_seconds,
                )
                async with aclosing(source) as events:
                    async for event in events:
                        outcome = event.reason if isinstance(event, Finished) else outcome
                        yield event
        except SpecinferError as error:
            error.request_id = error.request_id or request.request_id
            outcome = error.reason.lower()
            log.info("request failed", extra={"request_id": error.request_id, "outcome": outcome})
            raise
        finally:
            self._metrics.observe_request(outcome, time.perf_counter() - arrived)

    async def _events(
        self, request: GenerateRequest, arrived: float
    ) -> AsyncGenerator[GenerateEvent, None]:
        prompt_ids, started = await self._prepare(request)
        session = await self._open(request, prompt_ids, started)
        yield started
        waiting = True
        async with aclosing(session.run()) as rounds:
            async for event in rounds:
                if waiting:
                    self._metrics.observe_first_token(time.perf_counter() - arrived)
                    waiting = False
                if isinstance(event, Finished):
                    self._metrics.observe_finished(event)
                yield event

    async def _prepare(self, request: GenerateRequest) -> tuple[list[int], Started]:
        target = self._cluster.target
        check_request(request, target, self.max_tree_nodes)
        prompt_ids = await self._prompt_ids(request)
        seed = secrets.randbits(63) if request.random_seed else request.sampling.seed
        return prompt_ids, Started(
            request_id=request.request_id,
            session_id=uuid.uuid4().hex,
            model=target.model_name,
            seed=seed,
            num_prompt_tokens=len(prompt_ids),
        )

    async def _prompt_ids(self, request: GenerateRequest) -> list[int]:
        if request.messages is not None:
            return await self._tokenizer.encode_chat(request.messages)
        if request.prompt is not None:
            return await self._tokenizer.encode(request.prompt)
        token_ids = list(request.token_ids or ())
        check_token_ids(token_ids, self._cluster.target.vocab_size, "token_ids")
        return token_ids

    async def _open(
        self, request: GenerateRequest, prompt_ids: list[int], started: Started
    ) -> Session:
        """A session that the store knows; no worker does yet."""
        target, max_session_tokens = self._cluster.target, self._cluster.max_session_tokens
        max_tokens = completion_room(len(prompt_ids), request.stop.max_tokens, max_session_tokens)
        record = SessionRecord(
            session_id=started.session_id,
            model_hash=target.model_hash,
            num_prompt_tokens=len(prompt_ids),
            token_ids=tuple(prompt_ids),
            sampling=replace(request.sampling, seed=started.seed),
        )
        await self._store.create(record)
        return Session(
            record,
            completion=self._completion(request, prompt_ids, max_tokens),
            drafter=self._draft_seat(record),
            verifier=self._verify_seat(record, request.num_logprobs),
            store=self._store,
            policy=self._policy,
            options=request.speculation,
            limits=SessionLimits(max_session_tokens, self.max_tree_nodes),
            metrics=self._metrics,
        )

    def _completion(
        self, request: GenerateRequest, prompt_ids: list[int], max_tokens: int
    ) -> Completion:
        eos_token_ids = self._tokenizer.eos_token_ids
        return Completion(
            self._tokenizer.vocabulary.detokenizer(prompt_ids),
            stops=request.stop.stop,
            stop_token_ids=frozenset(request.stop.stop_token_ids),
            eos_token_ids=frozenset() if request.stop.ignore_eos else eos_token_ids,
            max_tokens=max_tokens,
        )

    def _draft_seat(self, record: SessionRecord) -> DraftSeat:
        return DraftSeat(
            self._cluster.drafters,
            record.session_id,
            record.sampling,
            num_prompt_tokens=record.num_prompt_tokens,
            vocab_size=self._cluster.target.vocab_size,
            deadline_seconds=self._limits.propose_seconds,
        )

    def _verify_seat(self, record: SessionRecord, num_logprobs: int | None) -> VerifySeat:
        return VerifySeat(
            self._cluster.verifiers,
            record.session_id,
            record.sampling,
            num_prompt_tokens=record.num_prompt_tokens,
            num_logprobs=num_logprobs,
            vocab_size=self._cluster.target.vocab_size,
            step_seconds=self._limits.step_seconds,
            failover_seconds=self._limits.failover_seconds,
        )

    @contextmanager
    def _admit(self) -> Iterator[None]:
        if self._draining:
            raise Unavailable("this router is shutting down; another will take the request")
        if self._num_streams >= self._limits.max_streams:
            raise ResourceExhausted(
                f"{self._num_streams} requests are in progress, as many as allowed",
                retry_after=1.0,
            )
        self._num_streams += 1
        self._metrics.session_started()
        try:
            yield
        finally:
            self._num_streams -= 1
            self._metrics.session_ended()
