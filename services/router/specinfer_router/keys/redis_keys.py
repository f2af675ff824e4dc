"""Keys in Redis, for all routers that share one: a hash of one line of JSON for each key's id.

A field beside them counts changes, so that routers read all keys only when one has changed. This
module knows nothing of who asks, and nothing of sessions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, cast

from redis.asyncio import Redis
from redis.exceptions import RedisError

from specinfer.errors import InvalidRequest, NotFound, Unavailable
from specinfer_router.keys.record import KeyRecord, format_record, parse_records

HASH = "specinfer:keys"
_VERSION = "version"
_SECONDS = 2.0


class RedisKeys:
    """The keys of the Redis at `url`."""

    def __init__(self, url: str) -> None:
        try:
            self._redis: Redis = Redis.from_url(
                url,
                socket_timeout=_SECONDS,
                socket_connect_timeout=_SECONDS,
                decode_responses=True,
            )
        except ValueError as error:
            raise InvalidRequest(
                "that is no Redis URL; one looks like redis://127.0.0.1:6379/0", field="redis"
            ) from error

    async def version(self) -> str:
        """What changes when a key does; raises InvalidRequest or Unavailable."""
        return str(await self._run(self._redis.hget(HASH, _VERSION)))

    async def load(self) -> dict[str, KeyRecord]:
        """All keys by id; raises InvalidRequest or Unavailable."""
        lines: dict[str, str] = await self._run(self._redis.hgetall(HASH))
        lines.pop(_VERSION, None)
        named = {f"key {key_id} in Redis": line for key_id, line in lines.items()}
        return await asyncio.to_thread(parse_records, named)

    async def add(self, record: KeyRecord) -> None:
        """Keep one more key."""
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hset(HASH, record.key_id, format_record(record))
            pipe.hincrby(HASH, _VERSION, 1)
            await self._run(pipe.execute())

    async def remove(self, key_id: str) -> None:
        """Forget a key; raises NotFound."""
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hdel(HASH, key_id)
            pipe.hincrby(HASH, _VERSION, 1)
            removed, _ = await self._run(pipe.execute())
        if not removed:
            raise NotFound(f"Redis has no key {key_id}", field="key_id")

    async def close(self) -> None:
        """Give the connections up."""
        await self._redis.aclose()

    async def _run(self, call: object) -> Any:
        try:
            # The client's methods are typed for its synchronous twin too.
            return await cast(Awaitable[Any], call)
        except UnicodeDecodeError as error:
            raise InvalidRequest("the keys in Redis are no text", field="keys") from error
        except (RedisError, OSError) as error:
            raise Unavailable(
                f"the Redis that keeps the keys did not answer ({type(error).__name__})"
            ) from error
