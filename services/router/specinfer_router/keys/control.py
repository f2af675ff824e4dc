"""Recognises callers by their keys, and follows changes of the keys while serving.

All keys are held in memory, so that recognising one waits for nothing. When the keys cannot be read
any more, those last read stay valid. This module knows nothing of HTTP, gRPC or what a key allows.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Protocol

from specinfer.errors import SpecinferError, Unauthenticated
from specinfer.tasks import end_task
from specinfer_router.access import ANYBODY, Caller
from specinfer_router.keys.record import KeyRecord, digest, key_id_of

log = logging.getLogger(__name__)

REFRESH_SECONDS = 1.0
_MAX_TOKEN = 256
_NOBODYS_DIGEST = digest("")


class KeySource(Protocol):
    """Where keys are kept. Every method may raise InvalidRequest or Unavailable."""

    async def version(self) -> str:
        """What changes when a key does; cheap."""
        ...

    async def load(self) -> dict[str, KeyRecord]:
        """All keys by id."""
        ...

    async def close(self) -> None:
        """Give connections up."""
        ...


def bearer_token(header: str | None) -> str | None:
    """The token of an `Authorization: Bearer TOKEN` header, or None."""
    scheme, _, token = (header or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" and token.strip() else None


def _now() -> datetime:
    return datetime.now(UTC)


class AccessControl:
    """Who is let in. Without a source of keys that is everybody."""

    def __init__(
        self,
        source: KeySource | None = None,
        *,
        refresh_seconds: float = REFRESH_SECONDS,
        clock: Callable[[], datetime] = _now,
    ) -> None:
        self._source = source
        self._refresh_seconds = refresh_seconds
        self._clock = clock
        self._version: str | None = None
        self._keys: Mapping[str, KeyRecord] = {}
        self._trouble = ""
        self._refreshing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read the keys and follow their changes; raises SpecinferError when they are not there."""
        if self._source is not None:
            await self.refresh()
            self._refreshing = asyncio.create_task(self._follow(), name="keys")

    async def close(self) -> None:
        """Follow no more."""
        await end_task(self._refreshing)
        if self._source is not None:
            await self._source.close()

    async def refresh(self) -> None:
        """Read the keys again when they have changed; raises SpecinferError."""
        if self._source is None:
            return
        # The version first: a change in between is seen again the next time.
        version = await self._source.version()
        if version != self._version:
            self._keys = await self._source.load()
            self._version = version

    def authenticate(self, token: str | None) -> Caller:
        """Who shows this key.

        Raises:
            Unauthenticated: there is none, or it is unknown, revoked or expired.
        """
        if self._source is None:
            return ANYBODY
        if token is None:
            raise Unauthenticated(
                "this needs an API key: send it as `Authorization: Bearer KEY`", field="api_key"
            )
        token = token[:_MAX_TOKEN]
        record = self._keys.get(key_id_of(token) or "")
        # An unknown id takes as long as a wrong secret.
        expected = record.sha256 if record is not None else _NOBODYS_DIGEST
        same = hmac.compare_digest(digest(token), expected)
        if record is None or not same or self._expired(record):
            raise Unauthenticated(
                "this API key is not known here, or no longer valid", field="api_key"
            )
        return Caller(record.key_id, record.limits, role=record.role)

    def _expired(self, record: KeyRecord) -> bool:
        return record.expires is not None and record.expires <= self._clock()

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._refresh_seconds)
            trouble = ""
            try:
                await self.refresh()
            except SpecinferError as error:
                trouble = error.message
            except Exception as error:  # to follow no more would keep revoked keys valid for good
                log.exception("reading the keys failed")
                trouble = f"{type(error).__name__}: {error}"
            if trouble and trouble != self._trouble:
                log.error("keys cannot be read; those last read stay", extra={"reason": trouble})
            self._trouble = trouble
