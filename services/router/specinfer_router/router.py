"""Serves requests: admits them, runs their sessions, and lets go of readers that do not read.

What the gRPC servicer and the gateway both call. This module knows nothing of protobuf or HTTP.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

from specinfer.errors import NotFound, RouterLeaving, SpecinferError
from specinfer.grammar import GrammarChecker, GrammarCompiler
from specinfer.messages import (
    Capabilities,
    GenerateEvent,
    GenerateRequest,
    RequestReport,
    ResumeRequest,
)
from specinfer.metrics import RouterMetrics
from specinfer.telemetry import Span, Telemetry
from specinfer_router.access import ANYBODY, Caller
from specinfer_router.admission import Admission, AdmissionLimits
from specinfer_router.checks import check_request_id
from specinfer_router.cluster import Cluster
from specinfer_router.counting import show_cluster, show_router
from specinfer_router.following import Followers, FollowLimits
from specinfer_router.opening import SeatLimits, SessionOpener
from specinfer_router.policy import PlainSpeed, TreeShapePolicy
from specinfer_router.request_log import RequestLog, RequestLogEntry
from specinfer_router.running import RequestRunner
from specinfer_router.session import LEAVING, beyond_the_end
from specinfer_router.store import CANCELLED, SessionRecord, SessionStore
from specinfer_router.stream import OpenStreams, Reader
from specinfer_router.tokenizer import ServedTokenizer
from specinfer_router.tracing import RequestTrace, request_ended, request_span

FEATURES = (
    "detail",
    "explain",
    "grammar",
    "logprobs",
    "multiplex",
    "prediction",
    "priority",
    "resume",
)


@dataclass(frozen=True)
class RouterLimits:
    """Bounds of what a router takes on.

    Attributes:
        admission: how many requests run and wait.
        seats: how long workers may take.
        max_tree_nodes: largest tree that a request may ask for, root included.
        max_events: how far a session may run ahead of its reader.
        stall_seconds: a reader that takes nothing for so long loses its session.
        follow: how many read along, and for how long.
        needs_store: whether new sessions are refused while the store is away.
    """

    admission: AdmissionLimits = field(default_factory=AdmissionLimits)
    seats: SeatLimits = field(default_factory=SeatLimits)
    max_tree_nodes: int = 64
    max_events: int = 64
    stall_seconds: float = 60.0
    follow: FollowLimits = field(default_factory=FollowLimits)
    needs_store: bool = True


class _Stream(NamedTuple):
    """What is read of one request, and who is told of it."""

    kind: str
    entry: RequestLogEntry
    span: Span
    source: AsyncGenerator[GenerateEvent, None]

    @property
    def trace(self) -> RequestTrace:
        """For the task that makes the events."""
        return RequestTrace(self.span, self.entry.request_id)


class Router:
    """The front of a cluster.

    Attributes:
        tokenizer: the target's tokenizer and chat template.
        store: where sessions and documents live.
        cluster: the workers.
    """

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
        self.store = store
        self.tokenizer = tokenizer
        self.cluster = cluster
        self._metrics = metrics
        self._version = version
        self._limits = limits or RouterLimits()
        model = cluster.target.model_name
        self._new_span = partial(request_span, telemetry or Telemetry(), model)
        self._admission = Admission(self._limits.admission)
        self._requests = RequestLog()
        self._streams = OpenStreams(
            max_events=self._limits.max_events, stall_seconds=self._limits.stall_seconds
        )
        self._followers = Followers(store, self._limits.follow)
        self._plain = PlainSpeed(cluster.target.step_costs)
        show_router(metrics, self._admission, self._plain)
        vocab_size, ends = cluster.target.vocab_size, sorted(tokenizer.eos_token_ids)
        self._grammars = GrammarChecker(GrammarCompiler(tokenizer.tokenizer_json, vocab_size, ends))
        self._opener = SessionOpener(
            cluster,
            store=store,
            tokenizer=tokenizer,
            policy=policy,
            metrics=metrics,
            grammars=self._grammars,
            max_tree_nodes=self._limits.max_tree_nodes,
            limits=self._limits.seats,
            num_running=lambda: self._admission.num_running,
        )
        self._runner = RequestRunner(
            admission=self._admission,
            opener=self._opener,
            store=store,
            requests=self._requests,
            plain=self._plain,
            metrics=metrics,
        )
        show_cluster(metrics, cluster, self._opener.hedges)

    @property
    def not_ready_reason(self) -> str:
        """Why new requests would fail now, or ""."""
        if self._admission.draining:
            return "draining"
        if self._limits.needs_store and self.store.away_seconds:
            return "the session store is away"
        return "" if self.cluster.verifiers.num_ready else "no verify worker is ready"

    def most_held(self, caller: Caller) -> int:
        """Requests of a caller that could ever run and wait here together."""
        return self._admission.most_held(caller.limits)

    def capabilities(self) -> Capabilities:
        """What this cluster accepts now."""
        target = self.cluster.target
        return Capabilities(
            model=target.model_name,
            model_hash=target.model_hash,
            tokenizer_hash=target.tokenizer_hash,
            vocab_size=target.vocab_size,
            dtype=target.dtype,
            max_model_len=self.cluster.max_session_tokens,
            max_tree_nodes=self._opener.max_tree_nodes,
            row_invariant=target.row_invariant,
            acceptance_rules=target.acceptance_rules,
            lossless=set(target.acceptance_rules) <= {"match"},
            num_drafters=self.cluster.drafters.num_ready,
            num_verifiers=self.cluster.verifiers.num_ready,
            chat=self.tokenizer.has_chat_template,
            version=self._version,
            features=(*FEATURES, "tools") if self.tokenizer.takes_tools else FEATURES,
            plain_round_seconds=self._plain.seconds,
        )

    @property
    def draining(self) -> bool:
        """Whether nothing new is taken any more."""
        return self._admission.draining

    async def drain(self) -> None:
        """Take no new request; those in progress go on."""
        self._admission.drain()

    def hand_over(self) -> None:
        """End each session that another router goes on with, after its round, with RouterLeaving.

        These are the ones whose readers resume, and those without a reader. The others find them
        in the store; while it is away nothing is handed over.
        """
        self._runner.handing_over = True

    def cut(self) -> None:
        """End every stream with RouterLeaving, whatever it waits for; the store keeps them."""
        self._streams.cut(RouterLeaving(LEAVING, retry_after=0.0))
        self._followers.cut()

    async def idle(self) -> None:
        """Return when no request is in progress."""
        await self._admission.idle()

    def close(self) -> None:
        """Let the router's own threads end."""
        self._grammars.close()

    async def generate(
        self, request: GenerateRequest, caller: Caller = ANYBODY, *, unattended: bool = False
    ) -> AsyncGenerator[GenerateEvent, None]:
        """The events of one request; closing the generator gives the session up.

        With `unattended` other routers go on with it by themselves when this one dies.

        Raises:
            SpecinferError: with the request's id; any of the error tree but ClientClosed.
        """
        stream = self._generation(request, caller, unattended=unattended)
        with self._served(stream):
            async with aclosing(self._streams.read(stream.source, stream.trace)) as events:
                async for event in events:
                    stream.entry.told(event)
                    yield event

    async def resume(
        self,
        request: ResumeRequest,
        caller: Caller = ANYBODY,
        *,
        whole: bool = False,
        orphaned_only: bool = False,
    ) -> AsyncGenerator[GenerateEvent, None]:
        """Take a session over and go on after `request.offset` tokens; as `generate` otherwise.

        Args:
            request: which session, and what of it the caller has.
            caller: whoever takes it over.
            whole: tell the tokens before the offset as well; no event has tokens of both sides.
            orphaned_only: leave it to whoever runs it, if anybody does.

        Raises:
            NotFound: no such session, it has expired, or it belongs to another key.
            InvalidRequest: the session can never have so many tokens.
            LeaseLost: with `orphaned_only`, another router runs it, or it has ended.
            Mismatch: another model is served now.
        """
        stream = await self._resumption(request, caller, whole, orphaned_only)
        with self._served(stream):
            async with aclosing(self._streams.read(stream.source, stream.trace)) as events:
                async for event in events:
                    stream.entry.told(event)
                    yield event

    async def feed(
        self,
        request: GenerateRequest | ResumeRequest,
        reader: Reader[GenerateEvent],
        caller: Caller = ANYBODY,
    ) -> None:
        """Hand the events of `generate` or `resume`, which see, to a reader that has its own room.

        Being cancelled gives the session up.
        """
        if isinstance(request, GenerateRequest):
            stream = self._generation(request, caller, unattended=False)
        else:
            stream = await self._resumption(request, caller)
        with self._served(stream):
            last = await self._streams.feed(stream.source, reader, stream.trace)
            if last is not None:
                stream.entry.told(last)

    async def follow(
        self, session_id: str, offset: int = 0, caller: Caller = ANYBODY
    ) -> AsyncGenerator[GenerateEvent, None]:
        """Read along with a session that runs elsewhere or has ended, without taking it over.

        Tokens come as they are committed, without rounds or logprobs.

        Raises:
            NotFound: as `resume`.
            ResourceExhausted: too many read along already.
            Unavailable: the session broke, or has not moved for a long time; resume it.
        """
        record = await self._find(session_id, caller)
        self._opener.check_resume(record, offset)
        if offset > len(record.output_ids):
            raise beyond_the_end(offset, len(record.output_ids))
        along = self._followers.follow(record, self._opener.completion, offset, caller)
        with self._metrics.stream("follow"):
            yield self._opener.started(record)
            async with aclosing(along) as events:
                async for event in events:
                    yield event

    async def cancel(self, session_id: str, caller: Caller = ANYBODY) -> None:
        """End a session for good, wherever it runs; its reader sees it end within a round.

        Raises:
            NotFound: as `resume`.
        """
        await self._find(session_id, caller)
        await self.store.finish(session_id, CANCELLED)

    async def explain(self, request_id: str, caller: Caller = ANYBODY) -> RequestReport:
        """Where the time of a request went, by its id or that of its session; raises NotFound."""
        return self._requests.find(request_id, caller.key_id)

    async def _find(self, session_id: str, caller: Caller) -> SessionRecord:
        record = await self.store.load(session_id)
        if record.terms.key_id != caller.key_id:
            raise NotFound(f"no session {session_id}, or it has expired", field="session_id")
        return record

    def _generation(self, request: GenerateRequest, caller: Caller, *, unattended: bool) -> _Stream:
        check_request_id(request.request_id)
        if not request.request_id:
            request = replace(request, request_id=uuid.uuid4().hex)
        entry = self._requests.begin(request.request_id, caller.key_id)
        span = self._new_span(request, caller.trace, detailed=request.detail)
        source = self._runner.generated(request, caller, entry, unattended=unattended)
        return _Stream("generate", entry, span, source)

    async def _resumption(
        self,
        request: ResumeRequest,
        caller: Caller,
        whole: bool = False,
        orphaned_only: bool = False,
    ) -> _Stream:
        check_request_id(request.request_id)
        record = await self._find(request.session_id, caller)
        request_id = request.request_id or record.terms.request_id or uuid.uuid4().hex
        request = replace(request, request_id=request_id)
        entry = self._requests.begin(request_id, caller.key_id)
        span = self._new_span(request, caller.trace, detailed=record.terms.detail)
        source = self._runner.resumed(record, request, caller, entry, whole, orphaned_only)
        return _Stream("resume", entry, span, source)

    @contextmanager
    def _served(self, stream: _Stream) -> Iterator[None]:
        """Around a stream that is read: one log entry and one outcome, whatever it ends with."""
        kind, entry, span, _ = stream
        try:
            with self._metrics.stream(kind):
                yield
        except SpecinferError as error:
            error.request_id = error.request_id or entry.request_id
            entry.failed(error)
            span.fail(error)
            raise
        finally:
            entry.ended()
            request_ended(span, entry)
            self._metrics.observe_request(entry.outcome, entry.seconds, span)
