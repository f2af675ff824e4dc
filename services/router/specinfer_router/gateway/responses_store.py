"""Stored responses: documents in the session store, each seen by its own key alone.

They expire with the store's own time to live. This module knows nothing of HTTP or of events.
"""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass
from typing import Any

from specinfer.errors import InvalidRequest, NotFound
from specinfer_router.access import Caller
from specinfer_router.store import SessionStore

RUNNING = ("queued", "in_progress")
_ID = re.compile(r"resp_[0-9a-f]{32}")


@dataclass(frozen=True)
class StoredResponse:
    """One response as the store keeps it.

    Attributes:
        key_id: key that it belongs to, or "".
        session_id: session that generates it.
        request: the body that asked for it.
        earlier: items of the conversation before its own input.
        input: items of its own input.
        response: the response object; without output while it runs.
    """

    key_id: str
    session_id: str
    request: dict[str, Any]
    earlier: list[dict[str, Any]]
    input: list[dict[str, Any]]
    response: dict[str, Any]

    @property
    def running(self) -> bool:
        """Whether it had not ended when it was stored."""
        return self.response["status"] in RUNNING

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """All items, the response's own output last."""
        return [*self.earlier, *self.input, *self.response["output"]]


class ResponseStore:
    """Reads and writes responses."""

    def __init__(self, store: SessionStore) -> None:
        self._store = store

    async def put(self, stored: StoredResponse) -> None:
        """Keep a response, or what became of it.

        Raises:
            InvalidRequest: the conversation is too large to be kept.
        """
        text = await asyncio.to_thread(_encoded, stored)
        try:
            await self._store.put_document(_name(stored.response["id"]), text)
        except InvalidRequest as error:
            raise InvalidRequest(
                "the conversation is too large to be stored; send store: false", field="store"
            ) from error

    async def end(self, stored: StoredResponse) -> None:
        """Keep what became of a response, unless it was deleted meanwhile."""
        try:
            await self._store.get_document(_name(stored.response["id"]))
        except NotFound:
            return
        await self.put(stored)

    async def get(
        self, response_id: str, caller: Caller, field: str = "response_id"
    ) -> StoredResponse:
        """The response of one of the caller's own.

        Raises:
            NotFound: there is none, it has expired, or it belongs to another key.
        """
        missing = NotFound(f"no response {response_id[:64]!r}, or it has expired", field=field)
        if not _ID.fullmatch(response_id):
            raise missing
        try:
            stored = await self.read(response_id)
        except NotFound:
            raise missing from None
        if stored.key_id != caller.key_id:
            raise missing
        return stored

    async def read(self, response_id: str) -> StoredResponse:
        """A response, whoever's it is; raises NotFound."""
        text = await self._store.get_document(_name(response_id))
        return await asyncio.to_thread(_decoded, text)

    async def delete(self, response_id: str) -> None:
        """Forget a response."""
        await self._store.delete_document(_name(response_id))


def response_id_of(session_id: str) -> str:
    """The id of the response that a session generates: who knows one of them knows both."""
    return f"resp_{session_id}"


def _encoded(stored: StoredResponse) -> str:
    return json.dumps(vars(stored), allow_nan=False)


def _decoded(text: str) -> StoredResponse:
    return StoredResponse(**json.loads(text))


def _name(response_id: str) -> str:
    return f"response:{response_id}"
