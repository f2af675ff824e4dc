"""The session store that several routers share: Redis, one Lua script for each change.

A session is two keys under one hash tag, so that they share a slot of a Redis cluster: a hash with
the facts and the epoch, and a string with all tokens, four bytes each. Every key has a time to live
that each commit renews. The epoch is checked inside Redis, where the write lands. This module knows
nothing of routers or workers.
"""

from __future__ import annotations

import re
import sys
from array import array
from collections.abc import Awaitable, Sequence
from importlib import resources
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.commands.core import AsyncScript
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, TimeoutError

from specinfer.errors import (
    Cancelled,
    InternalError,
    InvalidRequest,
    NotFound,
    StaleEpoch,
    Unavailable,
)
from specinfer_router.store.documents import checked_document
from specinfer_router.store.facts import terms_from_json, terms_to_json
from specinfer_router.store.interface import SessionRecord

_Answer = TypeVar("_Answer")
_SESSION_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")


class RedisStore:
    """Session records in Redis at `url`, such as "redis://127.0.0.1:6379/0".

    Scripts are sent by hash; when Redis has lost them, after a restart, they are loaded again. All
    changes are idempotent, so a command whose answer was lost is sent again, with jitter between.
    """

    def __init__(
        self,
        url: str,
        *,
        ttl_seconds: float = 3600.0,
        timeout_seconds: float = 2.0,
        max_connections: int = 32,
        num_retries: int = 2,
    ) -> None:
        self._place = "what was given"
        self._ttl_ms = max(1, round(ttl_seconds * 1000))
        try:
            self._place = _without_password(url)
            pool = BlockingConnectionPool.from_url(
                url,
                max_connections=max_connections,
                timeout=timeout_seconds,
                socket_timeout=timeout_seconds,
                socket_connect_timeout=timeout_seconds,
                socket_keepalive=True,
                health_check_interval=30,
                retry=Retry(
                    ExponentialWithJitterBackoff(base=0.02, cap=0.5),
                    num_retries,
                    supported_errors=(RedisConnectionError, TimeoutError),
                ),
            )
        except ValueError as error:
            raise InvalidRequest(
                f"{self._place} is no Redis URL; one looks like redis://127.0.0.1:6379/0",
                field="redis",
            ) from error
        self._redis: Redis = Redis(connection_pool=pool)
        self._create = self._script("create.lua")
        self._commit = self._script("commit.lua")
        self._claim = self._script("claim.lua")
        self._finish = self._script("finish.lua")

    async def create(self, record: SessionRecord) -> None:
        """Keep a new session at epoch 0."""
        facts = terms_to_json(record.terms)
        arguments: list[str | bytes | int] = [facts, _pack(record.token_ids), self._ttl_ms]
        kept = await self._run(self._create(keys=_keys(record.session_id), args=arguments))
        if not kept:
            raise StaleEpoch(f"session {record.session_id} exists already")

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
        tokens = _pack(token_ids)
        arguments: list[str | bytes | int] = [epoch, tokens, finish_reason, self._ttl_ms, owner]
        outcome, found = await self._run(self._commit(keys=_keys(session_id), args=arguments))
        if outcome == 1:
            return int(found)
        if outcome == -1:
            raise _not_found(session_id)
        if outcome == -2:
            raise StaleEpoch(f"session {session_id} was taken over by another reader")
        if outcome == -3:
            raise Cancelled(f"session {session_id} was cancelled")
        raise StaleEpoch(f"session {session_id} is at epoch {found}, not {epoch}, or has finished")

    async def claim(self, session_id: str) -> SessionRecord:
        """Take a session over: its record with a new owner, running again if resumable."""
        found = await self._run(self._claim(keys=_keys(session_id), args=[self._ttl_ms]))
        if not found:
            raise _not_found(session_id)
        facts, epoch, owner, finish_reason, packed = found
        return _record(session_id, facts, epoch, owner, finish_reason, packed)

    async def finish(
        self, session_id: str, finish_reason: str, *, owner: int | None = None
    ) -> None:
        """Mark a session as finished without tokens; a reason that stands already stays."""
        who: str | int = "" if owner is None else owner
        arguments: list[str | bytes | int] = [finish_reason, self._ttl_ms, who]
        await self._run(self._finish(keys=_keys(session_id), args=arguments))

    async def load(self, session_id: str) -> SessionRecord:
        """The record of a session. Both keys are read in one transaction."""
        session_key, tokens_key = _keys(session_id)
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hmget(session_key, ["facts", "epoch", "owner", "finish"])
            pipe.get(tokens_key)
            (facts, epoch, owner, finish_reason), packed = await self._run(pipe.execute())
        if facts is None or packed is None:
            raise _not_found(session_id)
        return _record(session_id, facts, epoch, owner, finish_reason, packed)

    async def tail(self, session_id: str, num_tokens: int) -> tuple[tuple[int, ...], int, str]:
        """Tokens after the first `num_tokens`, the epoch and the finish reason."""
        session_key, tokens_key = _keys(session_id)
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hmget(session_key, ["epoch", "finish"])
            pipe.getrange(tokens_key, 4 * num_tokens, -1)
            (epoch, finish_reason), packed = await self._run(pipe.execute())
        if epoch is None:
            raise _not_found(session_id)
        return _unpack(packed), int(epoch), finish_reason.decode()

    async def put_document(self, name: str, text: str) -> None:
        """Keep a text under a name, replacing what was there."""
        data = checked_document(name, text)
        await self._run(self._redis.set(_document_key(name), data, px=self._ttl_ms))

    async def get_document(self, name: str) -> str:
        """The text under a name."""
        data = await self._run(self._redis.get(_document_key(name)))
        if data is None:
            raise NotFound(f"no {name}, or it has expired")
        return cast(bytes, data).decode()

    async def delete_document(self, name: str) -> None:
        """Forget the text under a name."""
        await self._run(self._redis.delete(_document_key(name)))

    async def check(self) -> None:
        """Raise Unavailable, saying what to do, unless Redis answers."""
        await self._run(cast(Awaitable[Any], self._redis.ping()))

    async def close(self) -> None:
        """Give connections up."""
        await self._redis.aclose()
        await self._redis.connection_pool.aclose()

    def _script(self, name: str) -> AsyncScript:
        text = resources.files("specinfer_router.store").joinpath(name).read_text()
        return self._redis.register_script(text)

    async def _run(self, call: Awaitable[_Answer]) -> _Answer:
        try:
            return await call
        except (RedisConnectionError, TimeoutError, OSError) as error:
            raise Unavailable(
                f"Redis at {self._place} cannot be reached ({type(error).__name__}: {error}); "
                "start it, correct --redis, or leave --redis out to keep sessions in memory"
            ) from error
        except RedisError as error:
            raise InternalError(f"Redis at {self._place} refused a command: {error}") from error


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"


def _keys(session_id: str) -> list[str]:
    if not _SESSION_ID.fullmatch(session_id):
        raise InvalidRequest(
            "a session id is 1 to 128 letters, digits, '-' and '_'", field="session_id"
        )
    return [f"specinfer:{{{session_id}}}:session", f"specinfer:{{{session_id}}}:tokens"]


def _pack(token_ids: Sequence[int]) -> bytes:
    """Tokens as unsigned 32-bit numbers, lowest byte first."""
    packed = array("I", token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _unpack(packed: bytes) -> tuple[int, ...]:
    token_ids = array("I")
    token_ids.frombytes(packed)
    if sys.byteorder == "big":
        token_ids.byteswap()
    return tuple(token_ids)


def _record(
    session_id: str, facts: bytes, epoch: bytes, owner: bytes, finish_reason: bytes, packed: bytes
) -> SessionRecord:
    return SessionRecord(
        session_id=session_id,
        terms=terms_from_json(facts),
        token_ids=_unpack(packed),
        epoch=int(epoch),
        owner=int(owner),
        finish_reason=finish_reason.decode(),
    )


def _not_found(session_id: str) -> NotFound:
    return NotFound(f"no session {session_id}, or it has expired", field="session_id")


def _document_key(name: str) -> str:
    return f"specinfer:document:{name}"
