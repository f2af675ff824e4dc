"""Runs what was asked for: admits a request, opens or takes over its session, counts what it makes.

This module knows nothing of who reads the events, or of how streams end that are not read.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace

from specinfer.messages import (
    Finished,
    GenerateEvent,
    GenerateRequest,
    ResumeRequest,
    TokensEvent,
)
from specinfer.metrics import RouterMetrics
from specinfer_router.access import Caller
from specinfer_router.admission import Admission, Ticket
from specinfer_router.following import finished
from specinfer_router.opening import GivenUpUnlessRun, SessionOpener
from specinfer_router.policy import PlainSpeed
from specinfer_router.request_log import RequestLog, RequestLogEntry
from specinfer_router.session import Session, beyond_the_end
from specinfer_router.store import SessionRecord, SessionStore
from specinfer_router.tracing import trace_queue


class RequestRunner:
    """Makes the events of requests.

    Args:
        admission: who may run.
        opener: makes sessions.
        store: where they live.
        requests: remembers who was admitted.
        plain: how fast plain decoding is; it is told of every round.
        metrics: counts.

    Attributes:
        handing_over: whether sessions that can go on at another router are to, after their round.
    """

    def __init__(
        self,
        *,
        admission: Admission,
        opener: SessionOpener,
        store: SessionStore,
        requests: RequestLog,
        plain: PlainSpeed,
        metrics: RouterMetrics,
    ) -> None:
        self.handing_over = False
        self._admission = admission
        self._opener = opener
        self._store = store
        self._requests = requests
        self._plain = plain
        self._metrics = metrics

    async def generated(
        self,
        request: GenerateRequest,
        caller: Caller,
        entry: RequestLogEntry,
        *,
        unattended: bool,
    ) -> AsyncGenerator[GenerateEvent, None]:
        """The events of a new session, whose place is free again when this generator is closed."""
        self._opener.check(request)
        async with self._admission.slot(caller, request.priority) as ticket:
            self._admitted(entry, ticket)
            record = await self._opener.record(request, caller.key_id, unattended=unattended)
            ticket.spend(len(record.token_ids))
            leaving = self._leaving(caller, unattended=unattended)
            session = await self._opener.open(record, leaving)
            async with GivenUpUnlessRun(self._store, record, session):
                started = self._opener.started(record)
                entry.add(started)
                yield started
                with self._counted(session, ticket, entry) as count:
                    async with aclosing(session.run()) as events:
                        async for event in events:
                            yield count(event)

    async def resumed(
        self,
        record: SessionRecord,
        request: ResumeRequest,
        caller: Caller,
        entry: RequestLogEntry,
        whole: bool,
        orphaned_only: bool,
    ) -> AsyncGenerator[GenerateEvent, None]:
        """The events of a session that is taken over, those first that its reader has missed."""
        # Before the session is taken from whoever reads it now.
        self._opener.check_resume(record, request.offset)
        async with self._admission.slot(caller) as ticket:
            self._admitted(entry, ticket)
            record = await self._store.claim(request.session_id, orphaned_only=orphaned_only)
            self._metrics.claimed(orphaned=orphaned_only)
            leaving = self._leaving(caller, unattended=record.terms.unattended)
            offset = request.offset
            session, replay = self._opener.reopen(record, offset, leaving, whole=whole)
            async with GivenUpUnlessRun(self._store, record, session):
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

    def _leaving(self, caller: Caller, *, unattended: bool) -> Callable[[], bool]:
        """What a session asks between two rounds: whether it is to go on elsewhere."""
        movable = caller.resumes or unattended
        return lambda: movable and self.handing_over and not self._store.away_seconds

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
