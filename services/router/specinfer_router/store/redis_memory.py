"""How full the memory of a Redis is, asked now and then. Knows nothing of sessions or metrics."""

from __future__ import annotations

import asyncio
import logging
from contextvars import Context
from typing import Any

from specinfer.errors import SpecinferError
from specinfer.redis_connection import RedisSettings, close
from specinfer.tasks import end_task
from specinfer_router.store.redis_check import server_facts

PAUSE_SECONDS = 10.0

log = logging.getLogger(__name__)


class RedisMemory:
    """The share of its memory that a Redis uses.

    Attributes:
        share: of the fullest primary, from 0 to 1, as it was when last seen: of its `maxmemory`, or
            of its machine's memory where it has no limit.
    """

    def __init__(self, settings: RedisSettings, *, pause_seconds: float = PAUSE_SECONDS) -> None:
        self.share = 0.0
        self._settings = settings
        self._pause = pause_seconds
        self._client = settings.connect()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to ask."""
        # It outlives whoever starts it, and is none of its trace.
        self._task = asyncio.create_task(self._ask(), context=Context())

    async def close(self) -> None:
        """Ask no more."""
        await end_task(self._task)
        await close(self._client)

    async def look(self) -> None:
        """Ask once; raises SpecinferError when it does not answer."""
        facts = await server_facts(self._client, self._settings, "memory")
        self.share = max(map(_share, facts), default=0.0)

    async def _ask(self) -> None:
        while True:
            try:
                await self.look()
            except SpecinferError as error:
                log.debug("the memory of Redis is not known", extra={"error": error.message})
            except Exception:  # an answer that cannot be read must not end the asking
                log.exception("asking for the memory of Redis failed")
            await asyncio.sleep(self._pause)


def _share(facts: dict[str, Any]) -> float:
    limit = int(facts.get("maxmemory", 0)) or int(facts.get("total_system_memory", 0))
    return int(facts.get("used_memory", 0)) / limit if limit else 0.0
