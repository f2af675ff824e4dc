"""Whether a Redis is fit to keep sessions: its version, and that it never evicts what it was given.

It needs the right to INFO and no other. This module knows nothing of sessions.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, cast

from redis.asyncio import Redis, RedisCluster

from specinfer.errors import InvalidRequest
from specinfer.redis_connection import RedisSettings

# Before it, what a script runs into (no memory, a replica) is told as an error of the script.
MIN_VERSION = (7, 0)


async def check_server(client: Redis | RedisCluster, settings: RedisSettings) -> None:
    """Look at every primary.

    Raises:
        Unavailable: Redis cannot be reached.
        InvalidRequest: it refuses us, is too old, or may evict keys.
    """
    for section in ("server", "memory"):
        for facts in await server_facts(client, settings, section):
            _check_version(facts, settings.place)
            _check_policy(facts, settings.place)


def _check_version(facts: dict[str, Any], place: str) -> None:
    version = str(facts.get("redis_version", ""))
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers and numbers < MIN_VERSION:
        raise InvalidRequest(
            f"Redis at {place} is {version}; sessions need {'.'.join(map(str, MIN_VERSION))} "
            "or newer: update it",
            field="redis",
        )


def _check_policy(facts: dict[str, Any], place: str) -> None:
    policy = str(facts.get("maxmemory_policy", "noeviction"))
    if policy != "noeviction":
        raise InvalidRequest(
            f"Redis at {place} may evict keys (maxmemory-policy {policy}), and an evicted session "
            "breaks its stream: start it with --maxmemory-policy noeviction, or say "
            "CONFIG SET maxmemory-policy noeviction",
            field="redis",
        )


async def server_facts(
    client: Redis | RedisCluster, settings: RedisSettings, section: str
) -> Iterable[dict[str, Any]]:
    """What every primary says of itself in a section of INFO.

    Raises:
        Unavailable: Redis cannot be reached.
        InvalidRequest: it refuses us.
    """
    everywhere = {"target_nodes": RedisCluster.PRIMARIES}
    where: dict[str, Any] = everywhere if isinstance(client, RedisCluster) else {}
    # The client's methods are typed for its synchronous twin too.
    execute = cast(Callable[..., Awaitable[dict[str, Any]]], client.execute_command)
    found = await settings.answer(execute("INFO", section, **where))
    # One node answers with its facts, several with the facts by node.
    several = bool(found) and all(isinstance(each, dict) for each in found.values())
    return found.values() if several else [found]
