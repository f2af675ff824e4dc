"""Keys in Redis, for all routers that share one: a hash of one line of JSON for each key's id.

A field beside them counts changes, so that routers read all keys only when one has changed. This
module knows nothing of who asks, and nothing of sessions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, cast

from specinfer.errors import InvalidRequest, NotFound
from specinfer.redis_connection import RedisSettings, close
from specinfer_router.keys.record import KeyRecord, format_record, parse_records

HASH = "specinfer:keys"
_VERSION = "version"
# Scripts, as a transaction would be: what changed and that it did are one step, in a cluster too.
_ADD = "redis.call('HSET', KEYS[1], ARGV[1], ARGV[2]) redis.call('HINCRBY', KEYS[1], 'version', 1)"
_REMOVE = """
local removed = redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('HINCRBY', KEYS[1], 'version', 1)
return removed
"""


class RedisKeys:
    """The keys of the Redis that the settings name."""

    def __init__(self, settings: RedisSettings) -> None:
        self._settings = settings
        self._redis = settings.connect()

    async def version(self) -> str:
        """What changes when a key does; raises InvalidRequest or Unavailable."""
        return repr(await self._answer(self._redis.hget(HASH, _VERSION)))

    async def load(self) -> dict[str, KeyRecord]:
        """All keys by id; raises InvalidRequest or Unavailable."""
        found: dict[bytes, bytes] = await self._answer(self._redis.hgetall(HASH))
        try:
            lines = {key_id.decode(): line.decode() for key_id, line in found.items()}
        except UnicodeDecodeError as error:
            raise InvalidRequest("the keys in Redis are no text", field="keys") from error
        lines.pop(_VERSION, None)
        named = {f"key {key_id} in Redis": line for key_id, line in lines.items()}
        return await asyncio.to_thread(parse_records, named)

    async def add(self, record: KeyRecord) -> None:
        """Keep one more key."""
        line = format_record(record)
        await self._answer(self._redis.execute_command("EVAL", _ADD, 1, HASH, record.key_id, line))

    async def remove(self, key_id: str) -> None:
        """Forget a key; raises NotFound."""
        if not await self._answer(self._redis.execute_command("EVAL", _REMOVE, 1, HASH, key_id)):
            raise NotFound(f"Redis has no key {key_id}", field="key_id")

    async def close(self) -> None:
        """Give the connections up."""
        await close(self._redis)

    async def _answer(self, call: object) -> Any:
        # The client's methods are typed for its synchronous twin too.
        return await self._settings.answer(cast(Awaitable[Any], call))
