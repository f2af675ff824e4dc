"""Copies in memory of the sessions that run here, and how they come back to the shared store.

A copy is what its owner saw committed. This module knows nothing of when the shared store is away.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from specinfer.errors import (
    Cancelled,
    InternalError,
    LeaseLost,
    NotFound,
    ResourceExhausted,
    StaleEpoch,
)
from specinfer_router.store.interface import SessionRecord
from specinfer_router.store.memory import MemoryStore
from specinfer_router.store.redis_store import RedisStore

log = logging.getLogger(__name__)

_AT_ONCE = 16


def _nobody(*_: Any) -> None:
    """A hook that nobody asked for."""


@dataclass(frozen=True)
class StoreHooks:
    """Whom to tell what the store does.

    Attributes:
        committed: seconds that a commit to Redis took.
        restored: a session was put back.
        lease_lost: a session that ran here belongs to somebody else.
        outage_ended: seconds that Redis was away.
    """

    committed: Callable[[float], None] = _nobody
    restored: Callable[[], None] = _nobody
    lease_lost: Callable[[], None] = _nobody
    outage_ended: Callable[[float], None] = _nobody


@dataclass
class Held:
    """What a copy's record does not say.

    Attributes:
        owner: the record's owner.
        known_owner: the owner number that the shared store itself gave last; None for a session
            that it was never told of.
        unattended: as in the session's terms.
        changed: whether the copy may be ahead of the shared store.
    """

    owner: int
    known_owner: int | None
    unattended: bool
    changed: bool = False


class Copies:
    """The copies of at most `max_sessions` sessions that `shared` keeps for good.

    Attributes:
        memory: the copies as a store.
    """

    def __init__(
        self, shared: RedisStore, hooks: StoreHooks, *, max_sessions: int, max_tokens: int
    ) -> None:
        self.memory = MemoryStore(
            max_sessions=max_sessions,
            max_tokens=max_tokens,
            ttl_seconds=shared.ttl_seconds,
            holder=shared.holder,
        )
        self._shared = shared
        self._hooks = hooks
        self._max_sessions = max_sessions
        self._held: dict[str, Held] = {}

    def __len__(self) -> int:
        return len(self._held)

    def held(self, session_id: str) -> Held | None:
        """What is known of a session that runs here, or None."""
        return self._held.get(session_id)

    def unattended(self) -> Iterator[tuple[str, int]]:
        """Unattended sessions with their owners."""
        return ((each, held.owner) for each, held in self._held.items() if held.unattended)

    async def get(self, session_id: str) -> SessionRecord | None:
        """The copy of a session that runs here, or None."""
        if session_id in self._held:
            with suppress(NotFound):
                return await self.memory.load(session_id)
            del self._held[session_id]
        return None

    async def hold(self, record: SessionRecord) -> None:
        """Copy a session that runs here from now on, if there is room."""
        if record.finish_reason:
            return
        self.memory.forget(record.session_id)
        with suppress(ResourceExhausted):
            await self._keep(record, record.owner)
            return
        self._held.pop(record.session_id, None)

    async def hold_alone(self, record: SessionRecord) -> None:
        """Keep a session that the shared store cannot be told of yet.

        Raises:
            StaleEpoch, ResourceExhausted: as `MemoryStore.create`.
        """
        await self._keep(record, None)

    async def _keep(self, record: SessionRecord, known_owner: int | None) -> None:
        await self.memory.create(record)
        if len(self._held) >= self._max_sessions:
            # Copies that made room are gone; what stands for them may go too.
            for each in list(self._held):
                await self.get(each)
        unattended, alone = record.terms.unattended, known_owner is None
        self._held[record.session_id] = Held(record.owner, known_owner, unattended, changed=alone)

    async def claim(self, session_id: str, known_owner: int | None = None) -> SessionRecord:
        """Take over what runs here, from the copy; `known_owner` as in `Held`, if it is new."""
        record = await self.memory.claim(session_id)
        held = self._held[session_id]
        held.owner, held.changed = record.owner, True
        if known_owner is not None:
            held.known_owner = known_owner
        return record

    def drop(self, session_id: str, owner: int) -> bool:
        """Forget the copy that an owner had; whether there was one."""
        held = self._held.get(session_id)
        if held is None or held.owner != owner:
            return False
        del self._held[session_id]
        self.memory.forget(session_id)
        return True

    def let_go(self, session_id: str, owner: int, error: StaleEpoch | Cancelled) -> None:
        """Forget a copy that its owner lost, or its user ended."""
        if self.drop(session_id, owner) and isinstance(error, LeaseLost):
            self._hooks.lease_lost()

    async def put_back(self, session_id: str) -> None:
        """Restore one session from its copy.

        Raises:
            LeaseLost, Cancelled: it is not ours any more.
            Unavailable, InvalidRequest: the shared store is away, or refuses us.
        """
        held, record = self._held.get(session_id), await self.get(session_id)
        if held is None or record is None:
            return
        held.changed = False
        try:
            await self._shared.restore(record, known_owner=held.known_owner or 0)
        except (StaleEpoch, Cancelled) as error:
            self.let_go(session_id, record.owner, error)
            raise
        except BaseException:
            held.changed = True
            raise
        held.known_owner = record.owner
        self._hooks.restored()
        if record.finish_reason and not held.changed:
            self.drop(session_id, record.owner)

    async def put_all_back(self) -> None:
        """Restore all that runs here or has ended unseen; raises Unavailable."""
        waiting: Sequence[str] = list(self._held)
        while waiting:
            for start in range(0, len(waiting), _AT_ONCE):
                together = map(self._put_back_if_ours, waiting[start : start + _AT_ONCE])
                await asyncio.gather(*together)
            # What still runs is noticed at its next commit; what has ended has none.
            waiting = [each for each in list(self._held) if await self._has_ended_unseen(each)]

    async def close(self) -> None:
        """Forget everything."""
        self._held.clear()
        await self.memory.close()

    async def _put_back_if_ours(self, session_id: str) -> None:
        with suppress(StaleEpoch, Cancelled):
            try:
                await self.put_back(session_id)
            except InternalError as error:
                # One that Redis refuses is not to keep the others away; its next commit tells.
                log.warning(
                    "a session could not be put back",
                    extra={"session_id": session_id, "error": error.message},
                )
                record = await self.get(session_id)
                if record is not None and record.finish_reason:
                    self.drop(session_id, record.owner)

    async def _has_ended_unseen(self, session_id: str) -> bool:
        record, held = await self.get(session_id), self._held.get(session_id)
        return bool(record and held and record.finish_reason and held.changed)
