"""The workers of a tier, and which one of them a session goes to.

This module knows nothing of rounds, trees or text, nor of how workers are found.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from hashlib import blake2b
from typing import Any, Generic, TypeVar

from specinfer.errors import Mismatch, SpecinferError, Unavailable
from specinfer.messages import WorkerStatus
from specinfer_router.links import WorkerLink
from specinfer_router.prefix_lookup import PrefixLookup
from specinfer_router.tier_counts import TierCounts

MAX_LOAD_OVER_MEAN = 1.25
# How long a start waits for workers that it can do without.
ATTEMPT_SECONDS = 5.0

_Link = TypeVar("_Link", bound=WorkerLink[Any])


class WorkerPool(Generic[_Link]):
    """The workers of one tier; they may come and go.

    Attributes:
        given: links to the addresses that the router was started with; they stay.
        counts: what sessions met here.
        on_removed: called with the address of a worker that is let go of.
    """

    def __init__(
        self,
        links: Sequence[_Link],
        changed: asyncio.Event,
        *,
        prefixes: PrefixLookup | None = None,
        place: str = "",
    ) -> None:
        """Take over links.

        Args:
            links: to the workers that the router was given.
            changed: set whenever a link becomes ready.
            prefixes: says who holds a prompt's beginning, or None.
            place: where other workers are found, for people; "" if nowhere.
        """
        self.given = tuple(links)
        self.counts = TierCounts()
        self.on_removed: Callable[[str], None] = lambda address: None
        self._links = list(links)
        self._changed = changed
        self._prefixes = prefixes
        self._place = place
        self._doubted: set[_Link] = set()
        self._started = False

    @property
    def links(self) -> tuple[_Link, ...]:
        """All that there are now."""
        return tuple(self._links)

    @property
    def num_ready(self) -> int:
        """Workers that take new sessions."""
        return [link.ready for link in self._links].count(True)

    def add(self, link: _Link) -> None:
        """Take a link in, and connect it if the others are."""
        self._links.append(link)
        if self._started:
            link.start()

    def remove(self, link: _Link) -> None:
        """Let go of a link; sessions that use it may go on doing so."""
        self._links.remove(link)
        self.on_removed(link.address)
        self._doubted.discard(link)

    def doubt(self, link: _Link, *, doubted: bool) -> None:
        """Note whether a worker seems to have left: then it comes after all others."""
        if doubted:
            self._doubted.add(link)
        else:
            self._doubted.discard(link)

    def choose(
        self,
        avoid: _Link | None = None,
        *,
        affinity_key: str = "",
        held: Mapping[str, int] | None = None,
    ) -> _Link | None:
        """The least loaded worker that takes sessions; `avoid` only when there is no other.

        `held` says how many blocks of the session's beginning workers hold, by worker id. The one
        that holds most is taken unless it has more than its share of sessions (consistent hashing
        with bounded loads, arXiv 1608.01350). Where nobody with room holds any, an `affinity_key`
        decides within the same bound, so that prompts that begin alike find their keys and values
        again.

        A worker that lately failed has few sessions left and is not preferred for it: it comes
        after all that are trusted. A worker's own count covers the sessions of other routers but
        lags behind; ours does not.
        """
        ready = [link for link in self._links if link.ready]
        others = [link for link in ready if link is not avoid]
        trusted = [link for link in others if link.trusted]
        known = [link for link in trusted if link not in self._doubted]
        candidates = known or trusted or others or ready
        if held:
            candidates = _holders_with_room(candidates, held) or candidates
        if affinity_key:
            candidates = _nearest_with_room(candidates, affinity_key)
        return min(candidates, key=_load, default=None)

    async def wait(
        self,
        avoid: _Link | None = None,
        *,
        seconds: float,
        affinity_key: str = "",
        token_ids: Sequence[int] = (),
    ) -> _Link:
        """Like `choose` for a session of these tokens, but waits until there is a worker.

        Raises:
            Unavailable: none was ready within `seconds`.
            Mismatch: nor will one be: every one there is serves another model than this router.
        """
        if self.num_ready < 2:
            # There is nobody to choose between, and mostly nothing to wait for.
            link = self.choose(avoid, affinity_key=affinity_key)
            if link is not None:
                return link
        try:
            async with asyncio.timeout(seconds):
                held = await self._held(token_ids)
                while (link := self.choose(avoid, affinity_key=affinity_key, held=held)) is None:
                    self._changed.clear()
                    await self._changed.wait()
                return link
        except TimeoutError as error:
            raise self._nobody(seconds) from error

    def start(self) -> None:
        """Begin to connect to every worker, and to those that are added from now on."""
        self._started = True
        for link in self._links:
            link.start()

    async def attempt(self) -> None:
        """Wait until every worker was tried once, for a few seconds at most.

        Raises:
            Mismatch: the router was given workers, and every one there is was refused.
        """
        links = self.links
        with suppress(TimeoutError):
            async with asyncio.timeout(ATTEMPT_SECONDS):
                for link in links:
                    await link.attempted.wait()
        refusals = [link.refusal for link in links if link.refusal is not None]
        if self.given and len(refusals) == len(links):
            raise refusals[0]

    async def close(self) -> None:
        """End every link."""
        await asyncio.gather(*(link.close() for link in self._links))

    def statuses(self) -> tuple[WorkerStatus, ...]:
        """What is known of each worker."""
        return tuple(
            _status(link, "static" if link in self.given else "registry") for link in self._links
        )

    async def _held(self, token_ids: Sequence[int]) -> Mapping[str, int]:
        """Who holds the beginning of these tokens; nobody is asked where there is no choice."""
        infos = [link.info for link in self._links if link.ready and link.info is not None]
        if self._prefixes is None or len(infos) < 2:
            return {}
        return await self._prefixes.held(infos, token_ids)

    def _nobody(self, seconds: float) -> SpecinferError:
        refusals = [link.refusal.message for link in self._links if link.refusal is not None]
        if refusals and len(refusals) == len(self._links):
            return Mismatch(
                f"no worker fits this router any more: {refusals[0]}; "
                "a router that is started anew serves what the workers do"
            )
        places = [link.address for link in self._links]
        if self._place:
            places.append(f"{'and those' if places else 'none is listed'} at {self._place}")
        where = ", ".join(places) or "none given"
        told = f" ({refusals[0]})" if refusals else ""
        return Unavailable(
            f"no worker was ready within {seconds:g} s: {where}{told}", retry_after=1.0
        )


def _holders_with_room(links: Sequence[_Link], held: Mapping[str, int]) -> list[_Link]:
    """Of those within the load bound, the ones that hold most; [] if none holds anything."""
    found = [(held.get(link.info.worker_id, 0), link) for link in _with_room(links) if link.info]
    most = max((num_blocks for num_blocks, _ in found), default=0)
    return [link for num_blocks, link in found if num_blocks == most] if most else []


def _nearest_with_room(links: Sequence[_Link], affinity_key: str) -> list[_Link]:
    """The first worker in the key's own order whose load is within the bound; [] of none."""

    def rank(link: _Link) -> bytes:
        return blake2b(f"{affinity_key}\n{link.address}".encode(), digest_size=8).digest()

    return [min(_with_room(links), key=rank)] if links else []


def _with_room(links: Sequence[_Link]) -> list[_Link]:
    """Those that have no more than their share of sessions; one of several always has not."""
    mean = sum(_load(link)[0] for link in links) / max(1, len(links))
    return [link for link in links if _load(link)[0] <= MAX_LOAD_OVER_MEAN * mean + 1]


def _load(link: WorkerLink[Any]) -> tuple[int, int, int]:
    return (max(link.num_seats, link.load.num_sessions), link.load.num_waiting, link.num_seats)


def _status(link: WorkerLink[Any], source: str) -> WorkerStatus:
    return WorkerStatus(
        tier=link.tier,
        worker_id=link.info.worker_id if link.info is not None else "",
        address=link.address,
        source=source,
        connected=link.connected,
        ready=link.ready,
        trusted=link.trusted,
        refusal="" if link.refusal is None else link.refusal.message,
        info=link.info,
        load=link.load,
        num_seats=link.num_seats,
        breaker=link.breaker.state,
    )
