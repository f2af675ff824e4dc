"""Serves requests: admits them, runs their sessions, and lets go of readers that do not read.

What the gRPC servicer and the gateway both call. This module knows nothing of protobuf or HTTP.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

from specinfer.errors import NotFound, RouterLeaving, SpecinferError
from specinfer.grammar import GrammarChecker, GrammarCompiler
from specinfer.messages import (
    Capabilities,
    Finished,
    GenerateEvent,
    GenerateRequest,
    RequestReport,
    ResumeRequest,
    TokensEvent,
)
from specinfer.metrics import RouterMetrics
from specinfer.telemetry import Span, Telemetry
from specinfer_router.access import ANYBODY, Caller
from specinfer_router.admission import Admission, AdmissionLimits, Ticket
from specinfer_router.checks import check_request_id
from specinfer_router.cluster import Cluster
from specinfer_router.counting import show_cluster, show_router
from specinfer_router.following import Followers, FollowLimits, finished
from specinfer_router.opening import GivenUpUnlessRun, SeatLimits, SessionOpener
from specinfer_router.policy import PlainSpeed, TreeShapePolicy
from specinfer_router.request_log import RequestLog, RequestLogEntry
from specinfer_router.session import LEAVING, Session, beyond_the_end
from specinfer_router.store import CANCELLED, SessionRecord, SessionStore
from specinfer_router.stream import OpenStreams
from specinfer_router.tokenizer import ServedTokenizer
from specinfer_router.tracing import RequestTrace, request_ended, request_span, trace_queue

FEATURES = ("detail", "explain", "grammar", "logprobs", "prediction", "priority", "resume")


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
        self._handing_over = False
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
        self._handing_over = True

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
        check_request_id(request.request_id)
        if not request.request_id:
            request = replace(request, request_id=uuid.uuid4().hex)
        entry = self._requests.begin(request.request_id, caller.key_id)
        span = self._new_span(request, caller.trace, detailed=request.detail)
        source = self._generated(request, caller, entry, unattended=unattended)
        with self._served(entry, span, "generate"):
            trace = RequestTrace(span, entry.request_id)
            async with aclosing(self._streams.read(source, trace)) as events:
                async for event in events:
                    entry.told(event)
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
        check_request_id(request.request_id)
        record = await self._find(request.session_id, caller)
        request_id = request.request_id or record.terms.request_id or uuid.uuid4().hex
        request = replace(request, request_id=request_id)
        entry = self._requests.begin(request_id, caller.key_id)
        span = self._new_span(request, caller.trace, detailed=record.terms.detail)
        source = self._resumed(record, request, caller, entry, whole, orphaned_only)
        with self._served(entry, span, "resume"):
            trace = RequestTrace(span, entry.request_id)
            async with aclosing(self._streams.read(source, trace)) as events:
                async for event in events:
                    entry.told(event)
                    yield event

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

    @contextmanager
    def _served(self, entry: RequestLogEntry, span: Span, kind: str) -> Iterator[None]:
        """Around a stream that is read: one log entry and one outcome, whatever it ends with."""
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

    def _leaving(self, caller: Caller, *, unattended: bool) -> Callable[[], bool]:
        """What a session asks between two rounds: whether it is to go on elsewhere."""
        movable = caller.resumes or unattended
        return lambda: movable and self._handing_over and not self.store.away_seconds

    async def _generated(
        self,
        request: GenerateRequest,
        caller: Caller,
        entry: RequestLogEntry,
        *,
        unattended: bool,
    ) -> AsyncGenerator[GenerateEvent, None]:
        """Runs behind the buffer: a reader that stalls loses its place along with its session."""
        self._opener.check(request)
        async with self._admission.slot(caller, request.priority) as ticket:
            self._admitted(entry, ticket)
            record = await self._opener.record(request, caller.key_id, unattended=unattended)
            ticket.spend(len(record.token_ids))
            leaving = self._leaving(caller, unattended=unattended)
            session = await self._opener.open(record, leaving)
            async with GivenUpUnlessRun(self.store, record, session):
                started = self._opener.started(record)
                entry.add(started)
                yield started
                with self._counted(session, ticket, entry) as count:
                    async with aclosing(session.run()) as events:
                        async for event in events:
                            yield count(event)

    async def _resumed(
        self,
        record: SessionRecord,
        request: ResumeRequest,
        caller: Caller,
        entry: RequestLogEntry,
        whole: bool,
        orphaned_only: bool,
    ) -> AsyncGenerator[GenerateEvent, None]:
        # Before the session is taken from whoever reads it now.
        self._opener.check_resume(record, request.offset)
        async with self._admission.slot(caller) as ticket:
            self._admitted(entry, ticket)
            record = await self.store.claim(request.session_id, orphaned_only=orphaned_only)
            self._metrics.claimed(orphaned=orphaned_only)
            leaving = self._leaving(caller, unattended=record.terms.unattended)
            offset = request.offset
            session, replay = self._opener.reopen(record, offset, leaving, whole=whole)
            async with GivenUpUnlessRun(self.store, record, session):
                started = self._opener.started(record, request.request_id)
                entry.add(started)
                yield started
                async with aclosing(replay.events(self._opener.max_tree_nodes)) as missed:
                    async for tokens in missed:
                        ticket.spend(len(tokens.token_ids))
                        entry.add(tokens)
                        yield tokens
                ended = replay.ended.finish_reason or record.finish_reason
                if ended:
                    if offset > len(record.output_ids):
                        raise beyond_the_end(offset, len(record.output_ids))
                    last = finished(record, ended, replay.ended.stop_match, len(record.output_ids))
                    yield replace(last, timings=entry.timings)
                    return
                with self._counted(session, ticket, entry) as count:
                    async with aclosing(session.run()) as events:
                        async for event in events:
                            yield count(event)

    def _admitted(self, entry: RequestLogEntry, ticket: Ticket) -> None:
        entry.admitted(ticket.queue_seconds)
        self._metrics.observe_admitted(entry.key_id, ticket.queue_seconds)
        trace_queue(ticket.queue_seconds)
        self._requests.keep(entry)

    @contextmanager
    def _counted(
        self, session: Session, ticket: Ticket, entry: RequestLogEntry
    ) -> Iterator[Callable[[TokensEvent | Finished], GenerateEvent]]:
        """What to pass each event of a session through, so that all who count are told."""

        def count(event: TokensEvent | Finished) -> GenerateEvent:
            entry.add(event)
            if isinstance(event, Finished):
                times.finished(event.usage)
                return replace(event, timings=entry.timings)
            num_tokens = len(event.token_ids)
            # A session's first round computes the prompt; its last one perhaps tokens behind a stop
            # that the target does not know, which were dropped.
            first = times.event(entry.seconds, num_tokens)
            if not first and session.finished is None:
                self._plain.observe(event.round, num_tokens)
            ticket.spend(num_tokens)
            return event

        with self._metrics.session(entry.key_id) as times:
            yield count
