"""The session store of one machine: bounded dictionaries that forget.

Nothing survives the process. It knows nothing of routers or workers.
"""

from __future__ import annotations

import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, islice

from specinfer.errors import Cancelled, LeaseLost, NotFound, ResourceExhausted, StaleEpoch
from specinfer_router.store.documents import MemoryDocuments
from specinfer_router.store.interface import (
    ABANDONED,
    CANCELLED,
    EVERY_SESSION,
    RESUMABLE,
    Behind,
    SessionFilter,
    SessionPage,
    SessionRecord,
    SessionSummary,
)


@dataclass
class _Entry:
    record: SessionRecord
    token_ids: array[int]
    expires: float
    last_commit: tuple[tuple[int, ...], str] = ((), "")
    # Tokens that count against the store's bound: while it runs, all that it may still become.
    num_reserved: int = 0


class MemoryStore:
    """Keeps at most `max_sessions` sessions of `max_tokens` tokens in all.

    A running session counts with the longest output that it may have, so that none fails for want
    of room once it was let in. Each is kept for `ttl_seconds` after its last change. When the store
    is full the finished sessions that changed longest ago make room. `holder` is what summaries
    name the one router that it serves.
    """

    def __init__(
        self,
        *,
        max_sessions: int = 10_000,
        max_tokens: int = 50_000_000,
        ttl_seconds: float = 3600.0,
        holder: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._holder = holder
        self._max_sessions = max_sessions
        self._max_tokens = max_tokens
        self._ttl_seconds = ttl_seconds
        self._clock = clock
        self._num_tokens = 0
        # Oldest change first, so that expiry and making room look at the front only.
        self._running: OrderedDict[str, _Entry] = OrderedDict()
        self._finished: OrderedDict[str, _Entry] = OrderedDict()
        self._documents = MemoryDocuments(ttl_seconds=ttl_seconds, clock=clock)

    def __len__(self) -> int:
        return len(self._running) + len(self._finished)

    @property
    def away_seconds(self) -> float:
        """Memory is never away."""
        return 0.0

    async def create(self, record: SessionRecord) -> None:
        """Keep a new session at epoch 0."""
        self._expire()
        entry = self._find(record.session_id)
        if entry is not None:
            if self._record(entry) == record:
                return
            raise StaleEpoch(f"session {record.session_id} exists already")
        self._add(record)

    async def commit(
        self,
        session_id: str,
        epoch: int,
        token_ids: Sequence[int],
        finish_reason: str = "",
        *,
        owner: int = 0,
    ) -> int:
        """Add the tokens that lead from `epoch` to the next one, which is returned."""
        entry = self._get(session_id)
        record, commit = entry.record, (tuple(token_ids), finish_reason)
        if record.owner != owner:
            raise LeaseLost(f"session {session_id} was taken over by another reader")
        if record.epoch == epoch + 1 and entry.last_commit == commit:
            return epoch + 1
        if record.finish_reason == CANCELLED:
            raise Cancelled(f"session {session_id} was cancelled")
        if record.epoch < epoch:
            raise Behind(f"session {session_id} is at epoch {record.epoch} only, not {epoch}")
        if record.epoch != epoch or record.finish_reason:
            raise StaleEpoch(
                f"session {session_id} is at epoch {record.epoch}, not {epoch}"
                + (" and finished" if record.finish_reason else "")
            )
        entry.token_ids.extend(token_ids)
        entry.last_commit = commit
        entry.record = SessionRecord(
            session_id, record.terms, (), epoch + 1, record.owner, finish_reason
        )
        self._touch(entry)
        return epoch + 1

    async def claim(self, session_id: str, *, orphaned_only: bool = False) -> SessionRecord:
        """Take a session over: its record with a new owner, running again if resumable."""
        entry = self._get(session_id)
        if orphaned_only and entry.record.finish_reason != ABANDONED:
            raise LeaseLost(f"session {session_id} runs or has ended")
        record = entry.record._replace(owner=entry.record.owner + 1)
        if record.finish_reason in RESUMABLE:
            if record.finish_reason:
                # It may grow again; others make room, and not the session itself.
                self._finished.move_to_end(session_id)
                self._make_room(_reserved(record, entry) - entry.num_reserved, sessions=0)
            record = record._replace(finish_reason="")
        entry.record = record
        self._touch(entry)
        return self._record(entry)

    async def restore(self, record: SessionRecord, *, known_owner: int | None = None) -> None:
        """Put a session back that is not here, or only an older state of it."""
        self._expire()
        entry = self._find(record.session_id)
        if entry is not None:
            here = entry.record
            known = record.owner if known_owner is None else known_owner
            if here.owner > known and here.owner != record.owner:
                raise LeaseLost(f"session {record.session_id} was taken over by another reader")
            if here.finish_reason == CANCELLED:
                raise Cancelled(f"session {record.session_id} was cancelled")
            if here.owner == record.owner and here.epoch >= record.epoch:
                if here.epoch == record.epoch and record.finish_reason:
                    await self.finish(record.session_id, record.finish_reason)
                return
            self.forget(record.session_id)
        self._add(record)

    async def orphans(self, limit: int) -> Sequence[str]:
        """None: a session in memory dies with the router that runs it."""
        return ()

    async def summary(self, session_id: str) -> SessionSummary:
        """What an operator sees of one session."""
        return self._summary(self._get(session_id))

    async def sessions(self, limit: int, wanted: SessionFilter = EVERY_SESSION) -> SessionPage:
        """At most `limit` of the sessions wanted."""
        self._expire()
        entries = chain(self._running.values(), self._finished.values())
        summaries = filter(wanted.takes, map(self._summary, entries))
        return SessionPage(tuple(islice(summaries, limit)))

    def forget(self, session_id: str) -> None:
        """Drop a session; there need be none."""
        for entries in (self._running, self._finished):
            entry = entries.pop(session_id, None)
            if entry is not None:
                self._num_tokens -= entry.num_reserved

    async def finish(
        self, session_id: str, finish_reason: str, *, owner: int | None = None
    ) -> None:
        """Mark a session as finished without tokens; a reason that stands already stays."""
        entry = self._find(session_id)
        if entry is None or owner not in (None, entry.record.owner):
            return
        before = entry.record.finish_reason
        if not before or (before in RESUMABLE and finish_reason == CANCELLED):
            entry.record = entry.record._replace(finish_reason=finish_reason)
            self._touch(entry)

    async def load(self, session_id: str) -> SessionRecord:
        """The record of a session."""
        return self._record(self._get(session_id))

    async def tail(self, session_id: str, num_tokens: int) -> tuple[tuple[int, ...], int, str]:
        """Tokens after the first `num_tokens`, the epoch and the finish reason."""
        entry = self._get(session_id)
        new = tuple(entry.token_ids[num_tokens:])
        return new, entry.record.epoch, entry.record.finish_reason

    async def put_document(self, name: str, text: str) -> None:
        """Keep a text under a name, replacing what was there."""
        self._documents.put(name, text)

    async def get_document(self, name: str) -> str:
        """The text under a name."""
        return self._documents.get(name)

    async def delete_document(self, name: str) -> None:
        """Forget the text under a name."""
        self._documents.delete(name)

    async def check(self) -> None:
        """Memory can always be reached."""

    async def close(self) -> None:
        """Forget everything."""
        self._running.clear()
        self._finished.clear()
        self._documents.clear()
        self._num_tokens = 0

    def _add(self, record: SessionRecord) -> None:
        entry = _Entry(record._replace(token_ids=()), array("I", record.token_ids), 0.0)
        self._make_room(_reserved(record, entry))
        self._touch(entry)

    def _summary(self, entry: _Entry) -> SessionSummary:
        record, left = entry.record, max(0.0, entry.expires - self._clock())
        return SessionSummary(
            session_id=record.session_id,
            key_id=record.terms.key_id,
            model_hash=record.terms.model_hash,
            epoch=record.epoch,
            num_tokens=len(entry.token_ids),
            num_prompt_tokens=record.terms.num_prompt_tokens,
            finish_reason=record.finish_reason,
            owner=record.owner,
            holder=self._holder,
            lease_seconds=0.0 if record.finish_reason else left,
            ttl_seconds=left,
            request_id=record.terms.request_id,
            max_tokens=record.terms.stop.max_tokens or 0,
            unattended=record.terms.unattended,
        )

    def _record(self, entry: _Entry) -> SessionRecord:
        return entry.record._replace(token_ids=tuple(entry.token_ids))

    def _find(self, session_id: str) -> _Entry | None:
        entry = self._running.get(session_id) or self._finished.get(session_id)
        return entry if entry is not None and entry.expires > self._clock() else None

    def _get(self, session_id: str) -> _Entry:
        entry = self._find(session_id)
        if entry is None:
            raise NotFound(f"no session {session_id}, or it has expired", field="session_id")
        return entry

    def _touch(self, entry: _Entry) -> None:
        session_id = entry.record.session_id
        num_reserved = _reserved(entry.record, entry)
        self._num_tokens += num_reserved - entry.num_reserved
        entry.num_reserved = num_reserved
        entry.expires = self._clock() + self._ttl_seconds
        self._running.pop(session_id, None)
        self._finished.pop(session_id, None)
        home = self._finished if entry.record.finish_reason else self._running
        home[session_id] = entry

    def _expire(self) -> None:
        now = self._clock()
        for entries in (self._running, self._finished):
            while entries and next(iter(entries.values())).expires <= now:
                self._drop_oldest(entries)

    def _make_room(self, num_tokens: int, *, sessions: int = 1) -> None:
        """Let finished sessions go until there is room; the last `1 - sessions` of them stay."""
        while (
            len(self) + sessions > self._max_sessions
            or self._num_tokens + num_tokens > self._max_tokens
        ):
            if len(self._finished) <= 1 - sessions:
                raise ResourceExhausted(
                    f"{len(self._running)} sessions with {self._num_tokens} tokens are running; "
                    "try again later",
                    retry_after=1.0,
                )
            self._drop_oldest(self._finished)

    def _drop_oldest(self, entries: OrderedDict[str, _Entry]) -> None:
        _, entry = entries.popitem(last=False)
        self._num_tokens -= entry.num_reserved


def _reserved(record: SessionRecord, entry: _Entry) -> int:
    """Tokens that a session counts for: with all that may still come while it can run."""
    longest = record.terms.num_prompt_tokens + (record.terms.stop.max_tokens or 0)
    return len(entry.token_ids) if record.finish_reason else max(len(entry.token_ids), longest)
