"""Keeps the pools in line with the registry: links to workers that appear, none to those that left.

The registry may be away or lose what it knew; a worker that is connected and answers is kept then.
This module knows nothing of Redis, rounds or which worker is chosen.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from specinfer.errors import SpecinferError
from specinfer.registry import RegisteredWorker, WorkerRegistry
from specinfer.tasks import end_task
from specinfer_router.links import WorkerLink
from specinfer_router.pool import WorkerPool

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.25
# How long a worker that nobody lists any more is kept while its stream lives.
GRACE_SECONDS = 30.0

_Link = TypeVar("_Link", bound=WorkerLink[Any])


@dataclass
class _Found(Generic[_Link]):
    worker_id: str
    link: _Link
    unlisted_since: float | None = None


class TierFollower(Generic[_Link]):
    """Adds links to one pool and takes them out again, as its tier's list says."""

    def __init__(
        self,
        pool: WorkerPool[_Link],
        build: Callable[[str], _Link],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take down the pool and how a link to an address is made."""
        self._pool = pool
        self._build = build
        self._clock = clock
        self._found: dict[str, _Found[_Link]] = {}
        self._retired: list[_Link] = []

    async def follow(self, listed: Sequence[RegisteredWorker]) -> None:
        """Bring the pool in line with a list; addresses that the router was given stay as they are.

        A worker that leaves the list is preferred no more. Once its stream has broken as well it is
        dropped, and after GRACE_SECONDS in any case, when its sessions have ended.
        """
        given = {link.address for link in self._pool.given}
        wanted = {worker.address: worker for worker in listed if worker.address not in given}
        for worker in wanted.values():
            await self._see(worker)
        for address in [address for address in self._found if address not in wanted]:
            await self._miss(address)
        for link in list(self._retired):
            if link.num_seats == 0 or not link.connected:
                self._retired.remove(link)
                await link.close()

    async def close(self) -> None:
        """End the links that the pool does not have any more."""
        await asyncio.gather(*(link.close() for link in self._retired))
        self._retired.clear()

    async def _see(self, worker: RegisteredWorker) -> None:
        known = self._found.get(worker.address)
        if known and known.worker_id != worker.worker_id and not known.link.connected:
            # A new process at an old address is not to wait until the old link tries again.
            await self._drop(worker.address)
            known = None
        if known is None:
            if not worker.load.draining:
                link = self._build(worker.address)
                self._found[worker.address] = _Found(worker.worker_id, link)
                self._pool.add(link)
                log.info("%s worker at %s joins", worker.tier, worker.address)
            return
        known.worker_id, known.unlisted_since = worker.worker_id, None
        self._pool.doubt(known.link, doubted=False)
        if worker.load.draining:
            # An idle stream brings no news; the next frame says the same.
            known.link.load = replace(known.link.load, draining=True)

    async def _miss(self, address: str) -> None:
        known, now = self._found[address], self._clock()
        if known.unlisted_since is None:
            known.unlisted_since = now
            self._pool.doubt(known.link, doubted=True)
        if not known.link.connected:
            await self._drop(address)
        elif now - known.unlisted_since > GRACE_SECONDS:
            del self._found[address]
            self._pool.remove(known.link)
            self._retired.append(known.link)
            log.warning("%s worker at %s is on no list any more", known.link.tier, address)

    async def _drop(self, address: str) -> None:
        known = self._found.pop(address)
        self._pool.remove(known.link)
        await known.link.close()
        log.info("%s worker at %s has left", known.link.tier, address)


class Discovery:
    """Reads the registry several times a second and has the tiers follow it."""

    def __init__(
        self, registry: WorkerRegistry, followers: Mapping[str, TierFollower[Any]]
    ) -> None:
        """Take down the registry and the follower of each tier."""
        self._registry = registry
        self._followers = followers
        self._away = False
        self._task: asyncio.Task[None] | None = None

    @property
    def place(self) -> str:
        """Where the registry is, for people."""
        return self._registry.place

    def start(self) -> None:
        """Begin, in a task of its own."""
        self._task = asyncio.create_task(self._run(), name="worker discovery")

    async def close(self) -> None:
        """End the task and the connection; the pools keep their links."""
        await end_task(self._task)
        for follower in self._followers.values():
            await follower.close()

    async def look(self) -> None:
        """Read the list once; while it cannot be read the workers known stay."""
        try:
            listed = await self._registry.workers()
            for tier, follower in self._followers.items():
                await follower.follow([worker for worker in listed if worker.tier == tier])
        except SpecinferError as error:
            if not self._away:
                log.warning("the known workers stay, new ones are not found: %s", error.message)
            self._away = True
            return
        if self._away:
            log.info("the list of workers at %s can be read again", self.place)
        self._away = False

    async def _run(self) -> None:
        while True:
            try:
                await self.look()
            except Exception:
                # A fault of ours is not to end the search for as long as the router lives.
                log.exception("following the list of workers failed")
            await asyncio.sleep(LOOK_SECONDS * random.uniform(0.8, 1.0))
