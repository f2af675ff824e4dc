"""The session store of one machine: a bounded dictionary that forgets.

Nothing survives the process. It knows nothing of routers or workers.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from specinfer.errors import NotFound, ResourceExhausted, StaleEpoch
from specinfer_router.store.interface import SessionRecord


@dataclass
class _Entry:
    record: SessionRecord
    token_ids: list[int]
    expires: float
    last_commit: tuple[tuple[int, ...], str] = ((), "")


class MemoryStore:
    """Keeps at most `max_sessions` sessions, each for `ttl_seconds` after its last change.

    When it is full the finished session that changed longest ago makes room.
    """

    def __init__(
        self,
        *,
        max_sessions: int = 10_000,
        ttl_seconds: float = 3600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_sessions = max_sessions
        self._ttl_seconds = ttl_seconds
        self._clock = clock
        # Oldest change first, so that expiry and making room look at the front only.
        self._running: OrderedDict[str, _Entry] = OrderedDict()
        self._finished: OrderedDict[str, _Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._running) + len(self._finished)

    async def create(self, record: SessionRecord) -> None:
        """Keep a new session at epoch 0."""
        self._expire()
        entry = self._find(record.session_id)
        if entry is not None:
            if self._record(entry) == record:
                return
            raise StaleEpoch(f"session {record.session_id} exists already")
        self._make_room()
        self._running[record.session_id] = _Entry(
            replace(record, token_ids=()), list(record.token_ids), self._clock() + self._ttl_seconds
        )

    async def commit(
        self, session_id: str, epoch: int, token_ids: Sequence[int], finish_reason: str = ""
    ) -> int:
        """Add the tokens that lead from `epoch` to the next one, which is returned."""
        entry = self._get(session_id)
        commit = (tuple(token_ids), finish_reason)
        if entry.record.epoch == epoch + 1 and entry.last_commit == commit:
            return epoch + 1
        if entry.record.epoch != epoch or entry.record.finish_reason:
            raise StaleEpoch(
                f"session {session_id} is at epoch {entry.record.epoch}, not {epoch}"
                + (" and finished" if entry.record.finish_reason else "")
            )
        entry.token_ids.extend(token_ids)
        entry.last_commit = commit
        entry.record = replace(entry.record, epoch=epoch + 1, finish_reason=finish_reason)
        self._touch(entry)
        return epoch + 1

    async def finish(self, session_id: str, finish_reason: str) -> None:
        """Mark a session as finished without tokens; a reason that stands already stays."""
        entry = self._find(session_id)
        if entry is not None and not entry.record.finish_reason:
            entry.record = replace(entry.record, finish_reason=finish_reason)
            self._touch(entry)

    async def load(self, session_id: str) -> SessionRecord:
        """The record of a session."""
        return self._record(self._get(session_id))

    async def check(self) -> None:
        """Memory can always be reached."""

    async def close(self) -> None:
        """Forget everything."""
        self._running.clear()
        self._finished.clear()

    def _record(self, entry: _Entry) -> SessionRecord:
        return replace(entry.record, token_ids=tuple(entry.token_ids))

    def _find(self, session_id: str) -> _Entry | None:
        entry = self._running.get(session_id) or self._finished.get(session_id)
        return entry if entry is not None and entry.expires > self._clock() else None

    def _get(self, session_id: str) -> _Entry:
        entry = self._find(session_id)
        if entry is None:
            raise NotFound(f"no session {session_id}, or it has expired")
        return entry

    def _touch(self, entry: _Entry) -> None:
        session_id = entry.record.session_id
        entry.expires = self._clock() + self._ttl_seconds
        self._running.pop(session_id, None)
        self._finished.pop(session_id, None)
        home = self._finished if entry.record.finish_reason else self._running
        home[session_id] = entry

    def _expire(self) -> None:
        now = self._clock()
        for entries in (self._running, self._finished):
            while entries and next(iter(entries.values())).expires <= now:
                entries.popitem(last=False)

    def _make_room(self) -> None:
        if len(self) < self._max_sessions:
            return
        if not self._finished:
            raise ResourceExhausted(
                f"{self._max_sessions} sessions are running; try again later", retry_after=1.0
            )
        self._finished.popitem(last=False)
