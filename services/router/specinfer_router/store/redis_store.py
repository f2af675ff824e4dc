"""The session store that several routers share: Redis, one Lua script for each change.

A session is two keys under one hash tag, so that they share a slot of a Redis Cluster: a hash with
the facts, the epoch, the owner and the lease, and a string with all tokens, four bytes each. Every
key has a time to live that each commit renews. Epoch, owner and lease are checked inside Redis,
where the write lands, and by its clock. This module knows nothing of what to do while Redis is
away, and nothing of routers or workers.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Awaitable, Sequence
from importlib import resources
from typing import Any, cast

from specinfer.errors import Cancelled, InternalError, LeaseLost, NotFound, StaleEpoch
from specinfer.redis_connection import FAILURES, RedisSettings, close
from specinfer_router.store.documents import checked_document
from specinfer_router.store.encoding import (
    SESSIONS,
    UNATTENDED,
    document_key,
    pack,
    record_of,
    session_id_of,
    session_keys,
    summary_of,
    unpack,
)
from specinfer_router.store.facts import terms_to_json
from specinfer_router.store.interface import (
    ABANDONED,
    EVERY_SESSION,
    Behind,
    SessionFilter,
    SessionPage,
    SessionRecord,
    SessionSummary,
)
from specinfer_router.store.redis_check import check_server
from specinfer_router.store.scripts import (
    Argument,
    Call,
    Script,
    ScriptBatch,
    run_script,
    run_scripts,
)

log = logging.getLogger(__name__)

MAX_UNATTENDED = 100_000
# Sessions that are asked about in one pipeline.
_PAGE = 100
# Bounds of one look through Redis.
SCAN_SECONDS = 4.0
SCAN_SESSIONS = 100_000
_SCRIPTS = (
    *("create", "commit", "claim", "finish", "restore", "renew"),
    *("load", "tail", "summary", "watch", "orphans"),
)


class RedisStore:
    """Session records in the Redis that the settings name, on behalf of the router `holder`.

    All changes are idempotent, so a command whose answer was lost is sent again, with jitter
    between. Commits of one turn of the event loop go out as one pipeline.
    """

    def __init__(
        self,
        settings: RedisSettings,
        *,
        holder: str = "",
        ttl_seconds: float = 3600.0,
        lease_seconds: float = 10.0,
        patience_seconds: float = 1.0,
    ) -> None:
        """Take down where Redis is; the first command connects. Raises InvalidRequest.

        A commit that has no answer after `patience_seconds` raises Unavailable.
        """
        self.holder = holder or uuid.uuid4().hex[:12]
        self.ttl_seconds = ttl_seconds
        self.lease_seconds = lease_seconds
        self._settings = settings
        self._ttl_ms = max(1, round(ttl_seconds * 1000))
        self._lease_ms = max(1, round(lease_seconds * 1000))
        self._redis = settings.connect()
        self._batch = ScriptBatch(self._redis, patience_seconds=patience_seconds)
        self._scripts = {name: Script(self.script_text(name)) for name in _SCRIPTS}

    def script_text(self, name: str) -> str:
        """The text of a script."""
        folder = resources.files("specinfer_router.store")
        return folder.joinpath(f"{name}.lua").read_text(encoding="utf-8")

    @property
    def away_seconds(self) -> float:
        """What runs here waits for Redis, and is never in memory alone."""
        return 0.0

    async def create(self, record: SessionRecord) -> None:
        """Keep a new session at epoch 0."""
        unattended = record.terms.unattended
        kept = await self._session(
            *("create", record.session_id, terms_to_json(record.terms), pack(record.token_ids)),
            *(self._ttl_ms, self.holder, self._lease_ms, "1" if unattended else ""),
        )
        if not kept:
            raise StaleEpoch(f"session {record.session_id} exists already")
        if unattended:
            await self._watch([record.session_id])

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
        call = self._call(
            *("commit", session_id, epoch, pack(token_ids), finish_reason),
            *(self._ttl_ms, owner, self.holder, self._lease_ms),
        )
        with self._settings.span("commit"):
            found = await self._settings.answer(self._batch.run(call))
        if isinstance(found, list):
            found, unattended = found
            if unattended:
                await self._unwatch(session_id)
        if found < 0:
            raise _refusal(session_id, epoch, found)
        return int(found)

    async def claim(self, session_id: str, *, orphaned_only: bool = False) -> SessionRecord:
        """Take a session over: its record with a new owner, running again if resumable."""
        only = "1" if orphaned_only else ""
        found = await self._session(
            "claim", session_id, self._ttl_ms, self.holder, self._lease_ms, only
        )
        if len(found) < 2:
            lease_ms = found[0] if found else 0
            if orphaned_only and not lease_ms:
                await self._unwatch(session_id)
            if not found:
                raise _not_found(session_id)
            state = f"is held for {lease_ms} ms yet" if lease_ms else "has ended"
            raise LeaseLost(f"session {session_id} {state}")
        *fields, unattended = found
        record = record_of(session_id, fields)
        if unattended and not record.finish_reason:
            await self._watch([session_id])
        return record

    async def restore(self, record: SessionRecord, *, known_owner: int | None = None) -> None:
        """Put a session back that Redis has lost, or holds an older state of."""
        unattended = record.terms.unattended
        outcome = await self._session(
            *("restore", record.session_id, terms_to_json(record.terms), pack(record.token_ids)),
            *(self._ttl_ms, self.holder, self._lease_ms, "1" if unattended else ""),
            *(record.owner, record.owner if known_owner is None else known_owner),
            *(record.epoch, record.finish_reason),
        )
        if outcome < 0:
            raise _refusal(record.session_id, record.epoch, outcome)
        if unattended:
            await self._index(record.session_id, record.finish_reason)

    async def finish(
        self, session_id: str, finish_reason: str, *, owner: int | None = None
    ) -> None:
        """Mark a session as finished without tokens; a reason that stands already stays."""
        who: Argument = "" if owner is None else owner
        changed, unattended = await self._session(
            "finish", session_id, finish_reason, self._ttl_ms, who, self.holder
        )
        if changed < 0:
            await self._unwatch(session_id)
        elif changed and unattended:
            await self._index(session_id, finish_reason)

    async def renew(self, sessions: Sequence[tuple[str, int]]) -> None:
        """Renew the leases of unattended sessions, each with the owner that we are of it."""
        for start in range(0, len(sessions), _PAGE):
            page = sessions[start : start + _PAGE]
            calls = [
                self._call("renew", session_id, owner, self.holder, self._lease_ms, self._ttl_ms)
                for session_id, owner in page
            ]
            renewed = await self._apart(page, calls)
            ids = [session_id for (session_id, _), one in zip(page, renewed, strict=True) if one]
            if ids:
                await self._watch(ids)

    async def orphans(self, limit: int) -> Sequence[str]:
        """At most `limit` ids of unattended sessions whose lease has run out."""
        call = Call(self._scripts["orphans"], [UNATTENDED], [limit, self._lease_ms])
        found = await self._settings.answer(run_script(self._redis, call))
        return [session_id.decode() for session_id in found]

    async def load(self, session_id: str) -> SessionRecord:
        """The record of a session."""
        found = await self._session("load", session_id)
        if not found:
            raise _not_found(session_id)
        return record_of(session_id, found)

    async def tail(self, session_id: str, num_tokens: int) -> tuple[tuple[int, ...], int, str]:
        """Tokens after the first `num_tokens`, the epoch and the finish reason."""
        found = await self._session("tail", session_id, 4 * num_tokens)
        if not found:
            raise _not_found(session_id)
        epoch, finish_reason, packed = found
        return unpack(packed), int(epoch), finish_reason.decode()

    async def summary(self, session_id: str) -> SessionSummary:
        """What an operator sees of one session."""
        found = await self._summaries([session_id])
        if not found:
            raise _not_found(session_id)
        return found[0]

    async def sessions(self, limit: int, wanted: SessionFilter = EVERY_SESSION) -> SessionPage:
        """At most `limit` of the sessions wanted; it looks through Redis's keys, within bounds."""
        found: list[SessionSummary] = []
        ids: list[str] = []
        seen: set[str] = set()
        end = time.monotonic() + SCAN_SECONDS
        try:
            async for key in self._redis.scan_iter(SESSIONS, count=1000):
                session_id = session_id_of(key)
                if session_id not in seen:
                    seen.add(session_id)
                    ids.append(session_id)
                if len(ids) == _PAGE:
                    found += filter(wanted.takes, await self._summaries(ids))
                    ids = []
                if len(found) >= limit:
                    break
                if len(seen) >= SCAN_SESSIONS or time.monotonic() > end:
                    reason = f"only the first {len(seen)} sessions that Redis named were looked at"
                    return SessionPage(tuple(found), reason)
        except FAILURES as error:
            raise self._settings.error(error) from error
        if ids and len(found) < limit:
            found += filter(wanted.takes, await self._summaries(ids))
        return SessionPage(tuple(found[:limit]))

    async def put_document(self, name: str, text: str) -> None:
        """Keep a text under a name, replacing what was there."""
        data = checked_document(name, text)
        await self._answer(self._redis.set(document_key(name), data, px=self._ttl_ms))

    async def get_document(self, name: str) -> str:
        """The text under a name."""
        data = await self._answer(self._redis.get(document_key(name)))
        if data is None:
            raise NotFound(f"no {name}, or it has expired")
        return cast(bytes, data).decode()

    async def delete_document(self, name: str) -> None:
        """Forget the text under a name."""
        await self._answer(self._redis.delete(document_key(name)))

    async def ping(self) -> None:
        """Raise Unavailable unless Redis answers."""
        await self._answer(self._redis.ping())

    async def check(self) -> None:
        """Raise Unavailable or InvalidRequest, saying what to do, unless Redis is fit for us."""
        await check_server(self._redis, self._settings)

    def give_up(self) -> None:
        """Wait no more for commits that are under way: Redis seems to be away."""
        self._batch.give_up()

    async def close(self) -> None:
        """Give connections up."""
        await self._batch.close()
        await close(self._redis)

    def _call(self, name: str, session_id: str, *arguments: Argument) -> Call:
        return Call(self._scripts[name], session_keys(session_id), arguments)

    async def _session(self, name: str, session_id: str, *arguments: Argument) -> Any:
        call = self._call(name, session_id, *arguments)
        with self._settings.span(name):
            return await self._settings.answer(run_script(self._redis, call))

    async def _answer(self, call: Any) -> Any:
        # The client's methods are typed for its synchronous twin too.
        return await self._settings.answer(cast(Awaitable[Any], call))

    async def _together(self, calls: Sequence[Call]) -> list[Any]:
        answers = await self._settings.answer(run_scripts(self._redis, calls))
        for answer in answers:
            if isinstance(answer, FAILURES):
                raise self._settings.error(answer)
        return answers

    async def _apart(self, sessions: Sequence[tuple[str, int]], calls: Sequence[Call]) -> list[Any]:
        """The answers of one call for each session; 0 where Redis refuses that one alone."""
        answers = await self._settings.answer(run_scripts(self._redis, calls))
        for at, answer in enumerate(answers):
            if isinstance(answer, FAILURES):
                error = self._settings.error(answer)
                if not isinstance(error, InternalError):
                    raise error
                about = {"session_id": sessions[at][0], "error": error.message}
                log.warning("a lease could not be renewed", extra=about)
                answers[at] = 0
        return answers

    async def _summaries(self, session_ids: Sequence[str]) -> list[SessionSummary]:
        answers = await self._together([self._call("summary", each) for each in session_ids])
        return [
            summary_of(session_id, answer[:5], *answer[5:])
            for session_id, answer in zip(session_ids, answers, strict=True)
            if answer
        ]

    async def _index(self, session_id: str, finish_reason: str) -> None:
        """Keep the index of unattended sessions as the session's end asks for."""
        if finish_reason in ("", ABANDONED):
            # Nobody runs what was given up: whoever looks may have it at once.
            await self._watch([session_id], lease_ms=0 if finish_reason else self._lease_ms)
        else:
            await self._unwatch(session_id)

    async def _watch(self, session_ids: Sequence[str], lease_ms: int | None = None) -> None:
        lease_ms = self._lease_ms if lease_ms is None else lease_ms
        arguments: list[Argument] = [lease_ms, self._ttl_ms, MAX_UNATTENDED, *session_ids]
        call = Call(self._scripts["watch"], [UNATTENDED], arguments)
        await self._settings.answer(run_script(self._redis, call))

    async def _unwatch(self, session_id: str) -> None:
        await self._answer(self._redis.zrem(UNATTENDED, session_id))


def _refusal(session_id: str, epoch: int, outcome: int) -> NotFound | StaleEpoch | Cancelled:
    if outcome == -1:
        return _not_found(session_id)
    if outcome == -2:
        return LeaseLost(f"session {session_id} was taken over by another reader")
    if outcome == -3:
        return Cancelled(f"session {session_id} was cancelled")
    if outcome == -4:
        return Behind(f"Redis holds an older state of session {session_id} than epoch {epoch}")
    return StaleEpoch(f"session {session_id} is not at epoch {epoch}, or has finished")


def _not_found(session_id: str) -> NotFound:
    return NotFound(f"no session {session_id}, or it has expired", field="session_id")
