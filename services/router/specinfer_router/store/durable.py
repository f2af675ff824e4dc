"""The router's session store: Redis, and beside it a copy of the sessions that run here.

A commit is in Redis before it returns. While Redis is away the sessions that run here go on from
the copy for a stated time; when it is back, or turns out to have lost data, they are put back from
it. What Redis says of owners stands: whoever was claimed elsewhere meanwhile is let go of. This
module knows nothing of Lua, and nothing of rounds.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from contextvars import Context
from dataclasses import replace
from functools import partial
from typing import TypeVar

from specinfer.errors import (
    Cancelled,
    InternalError,
    InvalidRequest,
    NotFound,
    SpecinferError,
    StaleEpoch,
    Unavailable,
)
from specinfer.tasks import end_task
from specinfer_router.store.copies import Copies, Held, StoreHooks
from specinfer_router.store.documents import MemoryDocuments
from specinfer_router.store.interface import (
    EVERY_SESSION,
    RESUMABLE,
    Behind,
    SessionFilter,
    SessionPage,
    SessionRecord,
    SessionSummary,
)
from specinfer_router.store.outage import Outage, OutageLimits
from specinfer_router.store.redis_store import RedisStore

log = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")
_DOCUMENT_BYTES = 64 * 1024 * 1024


class DurableStore:
    """Sessions in `shared`, those that run here also in memory."""

    def __init__(
        self,
        shared: RedisStore,
        limits: OutageLimits | None = None,
        hooks: StoreHooks | None = None,
    ) -> None:
        self._shared = shared
        self._limits = limits or OutageLimits()
        self._hooks = hooks or StoreHooks()
        self._outage = Outage(
            self._limits, return_home=self._return_home, ended=self._hooks.outage_ended
        )
        self._copies = Copies(
            shared,
            self._hooks,
            max_sessions=self._limits.max_sessions,
            max_tokens=self._limits.max_tokens,
        )
        self._documents = MemoryDocuments(max_bytes=_DOCUMENT_BYTES, ttl_seconds=shared.ttl_seconds)
        self._unsaved: set[str] = set()
        self._keeper: asyncio.Task[None] | None = None

    @property
    def away_seconds(self) -> float:
        """How long Redis has been away; 0 when it is not."""
        return self._outage.seconds

    @property
    def num_held(self) -> int:
        """Sessions that memory holds beside Redis."""
        return len(self._copies)

    async def create(self, record: SessionRecord) -> None:
        """Keep a new session; raises Unavailable while Redis is away, unless told to serve."""
        try:
            await self._ask(lambda: self._shared.create(record))
        except Unavailable:
            if not self._limits.serve_new:
                raise
            await self._copies.hold_alone(record)
            self._keep_leases(record)
        else:
            await self._hold(record)

    async def commit(
        self,
        session_id: str,
        epoch: int,
        token_ids: Sequence[int],
        finish_reason: str = "",
        *,
        owner: int = 0,
    ) -> int:
        """Add a round to Redis, or to memory alone while it is away."""
        change = (session_id, epoch, token_ids, finish_reason)
        held, begin = self._copies.held(session_id), time.perf_counter()
        try:
            # Its patience is the shared store's: one for all commits that go out together.
            reached = await self._ask(
                lambda: self._shared.commit(*change, owner=owner), within_patience=False
            )
        except Unavailable:
            if held is None:
                raise
            self._check_time(held)
            held.changed = True
            return await self._copies.memory.commit(*change, owner=owner)
        except (NotFound, Behind):
            if held is None or held.owner != owner:
                raise
            # What Redis had answered for is gone there and not here.
            return await self._commit_again(held, *change, owner=owner)
        except (StaleEpoch, Cancelled) as error:
            self._copies.let_go(session_id, owner, error)
            raise
        self._hooks.committed(time.perf_counter() - begin)
        if held is not None:
            # A claim that came in between has brought a record that holds this round already.
            with suppress(StaleEpoch, NotFound):
                await self._copies.memory.commit(*change, owner=owner)
            if finish_reason:
                self._copies.drop(session_id, owner)
        return reached

    async def claim(self, session_id: str, *, orphaned_only: bool = False) -> SessionRecord:
        """Take a session over; one that runs here also while Redis is away."""
        here = await self._copies.get(session_id)
        try:
            record = await self._ask(
                lambda: self._shared.claim(session_id, orphaned_only=orphaned_only)
            )
        except (Unavailable, NotFound):
            if here is None or orphaned_only:
                raise
            return await self._claim_copy(session_id)
        if here is not None and _is_behind(record, here):
            return await self._claim_copy(session_id, known_owner=record.owner)
        await self._hold(record)
        return record

    async def finish(
        self, session_id: str, finish_reason: str, *, owner: int | None = None
    ) -> None:
        """Mark a session as finished; one that runs here also while Redis is away."""
        held = self._copies.held(session_id)
        if held is None or owner not in (None, held.owner):
            await self._ask(lambda: self._shared.finish(session_id, finish_reason, owner=owner))
            return
        await self._copies.memory.finish(session_id, finish_reason, owner=owner)
        held.changed = True
        with suppress(Unavailable):
            await self._ask(lambda: self._shared.finish(session_id, finish_reason, owner=owner))
            if owner is not None:
                # Not lost, even where Redis had lost the session.
                with suppress(StaleEpoch, Cancelled):
                    await self._try_to_put_back(session_id)

    async def restore(self, record: SessionRecord, *, known_owner: int | None = None) -> None:
        """Put a session back into Redis."""
        await self._ask(lambda: self._shared.restore(record, known_owner=known_owner))

    async def load(self, session_id: str) -> SessionRecord:
        """The record of a session: Redis's, or the copy where that knows more."""
        here = await self._copies.get(session_id)
        try:
            record = await self._ask(lambda: self._shared.load(session_id))
        except (Unavailable, NotFound):
            if here is None:
                raise
            return here
        ahead = here is not None and here.owner >= record.owner and here.epoch > record.epoch
        return here if here is not None and ahead else record

    async def tail(self, session_id: str, num_tokens: int) -> tuple[tuple[int, ...], int, str]:
        """New tokens; those of a session that runs here cost no question to Redis."""
        if self._copies.held(session_id) is not None:
            with suppress(NotFound):
                return await self._copies.memory.tail(session_id, num_tokens)
        return await self._ask(lambda: self._shared.tail(session_id, num_tokens))

    async def orphans(self, limit: int) -> Sequence[str]:
        """Unattended sessions of dead routers; none until living ones had time to come back."""
        if self._outage.seconds_since_last < self._shared.lease_seconds:
            return ()
        return await self._ask(lambda: self._shared.orphans(limit))

    async def summary(self, session_id: str) -> SessionSummary:
        """Redis's; that of the copy while Redis is away."""
        try:
            return await self._ask(lambda: self._shared.summary(session_id))
        except Unavailable as error:
            try:
                return await self._copies.memory.summary(session_id)
            except NotFound:
                # Not here says nothing of what Redis has.
                raise error from None

    async def sessions(self, limit: int, wanted: SessionFilter = EVERY_SESSION) -> SessionPage:
        """The sessions of all routers; those that run here while Redis is away."""
        with suppress(Unavailable):
            # One that hangs is found out within the patience; to look through it may take longer.
            await self._ask(self._shared.ping)
            return await self._shared.sessions(limit, wanted)
        own = await self._copies.memory.sessions(limit, wanted)
        return replace(
            own, partial_reason="Redis is away: these are sessions that run on this router"
        )

    async def put_document(self, name: str, text: str) -> None:
        """Keep a text in Redis, or in memory until it is back."""
        try:
            await self._ask(lambda: self._shared.put_document(name, text))
        except Unavailable:
            if len(self._unsaved) >= self._limits.max_sessions:
                raise
            self._documents.put(name, text)
            self._unsaved.add(name)

    async def get_document(self, name: str) -> str:
        """The text under a name."""
        if name in self._unsaved:
            with suppress(NotFound):
                return self._documents.get(name)
        return await self._ask(lambda: self._shared.get_document(name))

    async def delete_document(self, name: str) -> None:
        """Forget the text under a name."""
        self._documents.delete(name)
        self._unsaved.discard(name)
        await self._ask(lambda: self._shared.delete_document(name))

    async def check(self) -> None:
        """Whether Redis is fit; one that is away will do where new sessions are served anyway."""
        try:
            await self._shared.check()
        except Unavailable as error:
            if not self._limits.serve_new:
                raise
            self._outage.begin(error)

    async def close(self) -> None:
        """Give connections and copies up."""
        await self._outage.close()
        await end_task(self._keeper)
        await self._copies.close()
        await self._shared.close()

    async def _ask(
        self, call: Callable[[], Awaitable[_Answer]], *, within_patience: bool = True
    ) -> _Answer:
        """What Redis answers; raises Unavailable, at once while it is known to be away."""
        if self._outage.is_on:
            raise Unavailable(
                f"Redis has been away for {self._outage.seconds:.1f} s", retry_after=1.0
            )
        try:
            if not within_patience:
                return await call()
            return await self._outage.within_patience(call())
        except Unavailable as error:
            self._lose(error)
            raise
        except InvalidRequest as error:
            if error.field != "redis":
                raise
            # It came back without our user, or with another password: mended there, not here.
            self._lose(error)
            raise Unavailable(error.message) from error

    def _lose(self, error: SpecinferError) -> None:
        self._outage.begin(error)
        self._shared.give_up()

    def _check_time(self, held: Held) -> None:
        # A session that began without Redis was never promised it.
        if held.known_owner is None or self._outage.seconds <= self._limits.outage_seconds:
            return
        raise Unavailable(
            f"Redis has been away for {self._outage.seconds:.0f} s, and sessions go on without it "
            f"for {self._limits.outage_seconds:g}; resume this one when it is back",
            retry_after=5.0,
        )

    async def _claim_copy(self, session_id: str, known_owner: int | None = None) -> SessionRecord:
        """Take over what runs here, from the copy, and put it back where Redis can be reached."""
        record = await self._copies.claim(session_id, known_owner)
        if not self._outage.is_on:
            await self._try_to_put_back(session_id)
        return record

    async def _commit_again(
        self,
        held: Held,
        session_id: str,
        epoch: int,
        token_ids: Sequence[int],
        finish_reason: str,
        *,
        owner: int,
    ) -> int:
        """Commit to the copy, and bring the whole of it back to Redis."""
        held.changed = True
        try:
            return await self._copies.memory.commit(
                session_id, epoch, token_ids, finish_reason, owner=owner
            )
        finally:
            # Also where it was cancelled here: then that is what Redis is to know.
            await self._try_to_put_back(session_id)

    async def _try_to_put_back(self, session_id: str) -> None:
        """Restore one session now, or when Redis is back; raises LeaseLost or Cancelled."""
        try:
            await self._outage.within_patience(self._copies.put_back(session_id))
        except (Unavailable, InvalidRequest) as error:
            self._lose(error)

    async def _return_home(self) -> None:
        """Ask Redis once, and bring everything there that it has missed."""
        await self._outage.within_patience(self._shared.ping())
        for name in list(self._unsaved):
            try:
                await self._shared.put_document(name, self._documents.get(name))
            except NotFound:
                pass
            except InternalError as error:
                log.warning("a document is lost: Redis refuses it", extra={"error": error.message})
            self._unsaved.discard(name)
        await self._copies.put_all_back()

    async def _hold(self, record: SessionRecord) -> None:
        await self._copies.hold(record)
        self._keep_leases(record)

    def _keep_leases(self, record: SessionRecord) -> None:
        if record.terms.unattended and self._keeper is None:
            # It outlives the request that happens to start it, and is none of its trace.
            self._keeper = asyncio.create_task(self._renew_leases(), context=Context())

    async def _renew_leases(self) -> None:
        """Renew the leases of unattended sessions, whose rounds may take longer than a lease."""
        while True:
            await asyncio.sleep(self._shared.lease_seconds / 3)
            held = list(self._copies.unattended())
            if not held or self._outage.is_on:
                continue
            try:
                await self._ask(partial(self._shared.renew, held))
            except SpecinferError as error:
                log.warning("leases could not be renewed", extra={"error": error.message})
            except Exception:
                # Whatever it is: leases that run out have their sessions taken from us.
                log.exception("renewing leases failed; it is tried again")


def _is_behind(record: SessionRecord, here: SessionRecord) -> bool:
    """Whether Redis, which just gave `record` to us, had lost what the copy `here` still knows."""
    if record.owner <= here.owner:
        return True
    return (
        record.owner == here.owner + 1
        and record.epoch < here.epoch
        and (here.finish_reason in RESUMABLE)
    )
