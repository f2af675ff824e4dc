"""A session store that tells how long its operations take and how often they fail.

It answers what the store inside it answers. This module knows nothing of Redis or of sessions.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Sequence
from typing import TypeVar

from specinfer.errors import Unavailable
from specinfer.metrics import RouterMetrics
from specinfer_router.store import (
    EVERY_SESSION,
    SessionFilter,
    SessionPage,
    SessionRecord,
    SessionStore,
    SessionSummary,
)

_Answer = TypeVar("_Answer")


class CountedStore:
    """`store`, with every call counted in `metrics`; its methods are the protocol's."""

    def __init__(self, store: SessionStore, metrics: RouterMetrics) -> None:
        self._store = store
        self._metrics = metrics

    @property
    def away_seconds(self) -> float:
        """As the store's."""
        return self._store.away_seconds

    async def create(self, record: SessionRecord) -> None:
        """As the store's."""
        await self._timed("create", self._store.create(record))

    async def commit(
        self,
        session_id: str,
        epoch: int,
        token_ids: Sequence[int],
        finish_reason: str = "",
        *,
        owner: int = 0,
    ) -> int:
        """As the store's."""
        call = self._store.commit(session_id, epoch, token_ids, finish_reason, owner=owner)
        return await self._timed("commit", call)

    async def claim(self, session_id: str, *, orphaned_only: bool = False) -> SessionRecord:
        """As the store's."""
        call = self._store.claim(session_id, orphaned_only=orphaned_only)
        return await self._timed("claim", call)

    async def restore(self, record: SessionRecord, *, known_owner: int | None = None) -> None:
        """As the store's."""
        await self._timed("restore", self._store.restore(record, known_owner=known_owner))

    async def orphans(self, limit: int) -> Sequence[str]:
        """As the store's."""
        return await self._timed("orphans", self._store.orphans(limit))

    async def sessions(self, limit: int, wanted: SessionFilter = EVERY_SESSION) -> SessionPage:
        """As the store's."""
        return await self._timed("sessions", self._store.sessions(limit, wanted))

    async def summary(self, session_id: str) -> SessionSummary:
        """As the store's."""
        return await self._timed("summary", self._store.summary(session_id))

    async def finish(
        self, session_id: str, finish_reason: str, *, owner: int | None = None
    ) -> None:
        """As the store's."""
        await self._timed("finish", self._store.finish(session_id, finish_reason, owner=owner))

    async def load(self, session_id: str) -> SessionRecord:
        """As the store's."""
        return await self._timed("load", self._store.load(session_id))

    async def tail(self, session_id: str, num_tokens: int) -> tuple[tuple[int, ...], int, str]:
        """As the store's."""
        return await self._timed("tail", self._store.tail(session_id, num_tokens))

    async def put_document(self, name: str, text: str) -> None:
        """As the store's."""
        await self._timed("document", self._store.put_document(name, text))

    async def get_document(self, name: str) -> str:
        """As the store's."""
        return await self._timed("document", self._store.get_document(name))

    async def delete_document(self, name: str) -> None:
        """As the store's."""
        await self._timed("document", self._store.delete_document(name))

    async def check(self) -> None:
        """As the store's."""
        await self._timed("check", self._store.check())

    async def close(self) -> None:
        """As the store's."""
        await self._store.close()

    async def _timed(self, operation: str, call: Awaitable[_Answer]) -> _Answer:
        start, failed = time.perf_counter(), False
        try:
            return await call
        except Unavailable:
            # Every other error is an answer: not found, cancelled, lost to somebody else.
            failed = True
            raise
        finally:
            seconds = time.perf_counter() - start
            self._metrics.observe_store(operation, seconds, failed=failed)
