"""The workers' registry and the directory of KV prefixes in Redis. Needs the `serve` extra.

All keys of a group share one hash tag and every key has a time to live, which Redis alone measures:
no clock of ours counts. Nothing that is read is believed before it was checked. This module knows
nothing of links, pools or engines.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from typing import Any

from specinfer.errors import InvalidRequest, ResourceExhausted
from specinfer.prefixes import PREFIX_SECONDS, HeldPrefix
from specinfer.redis_connection import RedisSettings, close
from specinfer.registry import (
    EXPIRY_SECONDS,
    MAX_DOCUMENT_BYTES,
    MAX_WORKERS,
    TIERS,
    RegisteredWorker,
    check_group,
    worker_from_json,
    worker_to_json,
)

log = logging.getLogger(__name__)

# A beat that waits longer is of no use: the next one is due.
TIMEOUT_SECONDS = 1.0
MAX_CONNECTIONS = 8


def registry_connection(settings: RedisSettings) -> RedisSettings:
    """The same Redis, reached in the short time that a heartbeat has.

    A command is not sent again by itself: the next beat does that.
    """
    return replace(
        settings,
        timeout_seconds=min(settings.timeout_seconds, TIMEOUT_SECONDS),
        max_connections=min(settings.max_connections, MAX_CONNECTIONS),
        num_retries=0,
    )


class _Scripts:
    """A connection and the scripts that are run over it."""

    def __init__(self, settings: RedisSettings, group: str) -> None:
        check_group(group)
        self._settings = registry_connection(settings)
        self._client = self._settings.connect()
        self._prefix = f"specinfer:{{workers:{group}}}"
        self.place = f"{settings.place} (group {group})"

    async def _run(self, script: str, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        # By text and not by hash: a server that was started anew knows no hash.
        call: Any = self._client.eval(script, len(keys), *keys, *arguments)
        return await self._settings.answer(call)

    async def close(self) -> None:
        """Give the connections up."""
        await close(self._client)


class RedisRegistry(_Scripts):
    """A WorkerRegistry in Redis: two keys a tier, expiries and documents."""

    def __init__(self, settings: RedisSettings, group: str = "default") -> None:
        """Connect at the first call; raises InvalidRequest for a bad URL or group."""
        super().__init__(settings, group)
        self._announce, self._withdraw = _script("announce"), _script("withdraw")
        self._workers = _script("workers")
        self._num_bad = 0

    async def announce(self, worker: RegisteredWorker) -> None:
        """See WorkerRegistry.announce."""
        life = round(EXPIRY_SECONDS * 1000)
        arguments = (worker.worker_id, worker_to_json(worker), life, MAX_WORKERS)
        if not await self._run(self._announce, self._keys(worker.tier), arguments):
            raise ResourceExhausted(
                f"{MAX_WORKERS} {worker.tier} workers are on the list at {self.place} already",
                retry_after=EXPIRY_SECONDS,
            )

    async def withdraw(self, worker: RegisteredWorker) -> None:
        """See WorkerRegistry.withdraw."""
        await self._run(self._withdraw, self._keys(worker.tier), (worker.worker_id,))

    async def workers(self) -> Sequence[RegisteredWorker]:
        """See WorkerRegistry.workers."""
        keys = [key for tier in TIERS for key in self._keys(tier)]
        life = round(EXPIRY_SECONDS * 1000)
        tiers = await self._run(self._workers, keys, (life, MAX_WORKERS, MAX_DOCUMENT_BYTES))
        found: list[RegisteredWorker] = []
        num_bad = 0
        for tier, documents in zip(TIERS, tiers, strict=True):
            for document in documents:
                try:
                    found.append(worker_from_json(tier, document))
                except InvalidRequest as error:
                    num_bad += 1
                    if num_bad > self._num_bad:
                        log.warning("an entry at %s is left out: %s", self.place, error.message)
        self._num_bad = num_bad
        return found

    def _keys(self, tier: str) -> tuple[str, str]:
        return f"{self._prefix}:{tier}:expiries", f"{self._prefix}:{tier}:documents"


class RedisPrefixes(_Scripts):
    """A PrefixDirectory in Redis: one hash a worker, from block hash to since when."""

    def __init__(self, settings: RedisSettings, group: str = "default") -> None:
        """Connect at the first call; raises InvalidRequest for a bad URL or group."""
        super().__init__(settings, group)
        self._publish, self._find = _script("publish"), _script("find")

    async def publish(
        self, worker_id: str, version: int, added: Sequence[bytes], removed: Sequence[bytes]
    ) -> bool:
        """See PrefixDirectory.publish."""
        life = round(PREFIX_SECONDS * 1000)
        arguments = (version, life, len(added), *added, *removed)
        return bool(await self._run(self._publish, (self._key(worker_id),), arguments))

    async def forget(self, worker_id: str) -> None:
        """See PrefixDirectory.forget."""
        call: Any = self._client.delete(self._key(worker_id))
        await self._settings.answer(call)

    async def find(self, worker_ids: Sequence[str], chain: Sequence[bytes]) -> Sequence[HeldPrefix]:
        """See PrefixDirectory.find."""
        if not worker_ids or not chain:
            return [HeldPrefix()] * len(worker_ids)
        keys = [self._key(worker_id) for worker_id in worker_ids]
        found = await self._run(self._find, keys, chain)
        return [HeldPrefix(int(num), _seconds(since)) for num, since in found]

    def _key(self, worker_id: str) -> str:
        return f"{self._prefix}:prefixes:{worker_id}"


def _seconds(milliseconds: bytes) -> float:
    # Written by our script, unless somebody else wrote it.
    return int(milliseconds) / 1000 if milliseconds.isdigit() and len(milliseconds) < 16 else 0.0


def _script(name: str) -> str:
    return resources.files("specinfer").joinpath("registry_scripts", f"{name}.lua").read_text()
