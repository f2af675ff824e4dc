"""Which workers there are, which one a session goes to, and whether they belong together.

This module knows nothing of rounds, trees or text.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any, Generic, TypeVar

from specinfer.errors import Mismatch, SpecinferError, Unavailable
from specinfer.messages import WorkerInfo
from specinfer.rpc import TlsSettings
from specinfer_router.links import LinkLimits, WorkerLink
from specinfer_router.worker_links import DraftLink, VerifyLink

log = logging.getLogger(__name__)

MAX_LOAD_OVER_MEAN = 1.25

_Link = TypeVar("_Link", bound=WorkerLink[Any])


class WorkerPool(Generic[_Link]):
    """The workers of one tier."""

    def __init__(self, links: Sequence[_Link], changed: asyncio.Event) -> None:
        """Take over links; `changed` is set whenever one of them becomes ready."""
        self.links = tuple(links)
        self._changed = changed

    @property
    def num_ready(self) -> int:
        """Workers that take new sessions."""
        return sum(link.ready for link in self.links)

    def choose(self, avoid: _Link | None = None, *, affinity_key: str = "") -> _Link | None:
        """The least loaded worker that takes sessions; `avoid` only when there is no other.

        With an `affinity_key` it is the key's own worker unless that has more than its share of
        sessions (consistent hashing with bounded loads, arXiv 1608.01350), so that prompts that
        begin alike find their keys and values again.

        A worker that lately let a deadline pass has few sessions left and is not preferred for it:
        it comes after all that are trusted. A worker's own count covers the sessions of other
        routers but lags behind; ours does not.
        """
        ready = [link for link in self.links if link.ready]
        others = [link for link in ready if link is not avoid]
        trusted = [link for link in others if link.trusted]
        candidates = trusted or others or ready
        if affinity_key:
            candidates = _nearest_with_room(candidates, affinity_key)
        return min(candidates, key=_load, default=None)

    async def wait(
        self, avoid: _Link | None = None, *, seconds: float, affinity_key: str = ""
    ) -> _Link:
        """Like `choose`, but waits until there is one.

        Raises:
            Unavailable: none was ready within `seconds`.
        """
        try:
            async with asyncio.timeout(seconds):
                while (link := self.choose(avoid, affinity_key=affinity_key)) is None:
                    self._changed.clear()
                    await self._changed.wait()
                return link
        except TimeoutError as error:
            addresses = ", ".join(link.address for link in self.links) or "none given"
            raise Unavailable(
                f"no worker was ready within {seconds:g} s ({addresses})", retry_after=1.0
            ) from error

    def start(self) -> None:
        """Begin to connect to every worker."""
        for link in self.links:
            link.start()

    async def attempt(self) -> None:
        """Wait until every worker was tried once; raise what a worker was refused for."""
        for link in self.links:
            await link.attempted.wait()
            if link.refusal is not None:
                raise link.refusal

    async def close(self) -> None:
        """End every link."""
        await asyncio.gather(*(link.close() for link in self.links))


def _nearest_with_room(links: Sequence[_Link], affinity_key: str) -> list[_Link]:
    """The first worker in the key's own order whose load is within the bound; [] of none."""
    if not links:
        return []
    mean = sum(_load(link)[0] for link in links) / len(links)

    def rank(link: _Link) -> bytes:
        return blake2b(f"{affinity_key}\n{link.address}".encode(), digest_size=8).digest()

    with_room = [link for link in links if _load(link)[0] <= MAX_LOAD_OVER_MEAN * mean + 1]
    return [min(with_room, key=rank)]


def _load(link: WorkerLink[Any]) -> tuple[int, int, int]:
    return (max(link.num_seats, link.load.num_sessions), link.load.num_waiting, link.num_seats)


class Cluster:
    """Both tiers, held together by the first verify worker that answered: the target.

    Attributes:
        verifiers: the verify tier.
        drafters: the draft tier, which may be empty or down.
    """

    def __init__(
        self,
        verify: Sequence[str],
        draft: Sequence[str],
        *,
        limits: LinkLimits | None = None,
        tls: TlsSettings | None = None,
    ) -> None:
        """Take down the addresses of the workers."""
        self._target: WorkerInfo | None = None
        verify_changed, draft_changed = asyncio.Event(), asyncio.Event()

        def build(
            kind: Callable[..., _Link],
            address: str,
            check: Callable[[str, WorkerInfo], None],
            changed: asyncio.Event,
        ) -> _Link:
            return kind(
                address,
                check=lambda info: check(address, info),
                on_ready=changed.set,
                limits=limits or LinkLimits(),
                tls=tls,
            )

        self.verifiers: WorkerPool[VerifyLink] = WorkerPool(
            [
                build(VerifyLink, address, self._check_verifier, verify_changed)
                for address in verify
            ],
            verify_changed,
        )
        self.drafters: WorkerPool[DraftLink] = WorkerPool(
            [build(DraftLink, address, self._check_drafter, draft_changed) for address in draft],
            draft_changed,
        )

    @property
    def target(self) -> WorkerInfo:
        """The model that is served; raises Unavailable before `start`."""
        if self._target is None:
            raise Unavailable("no verify worker has answered yet", retry_after=1.0)
        return self._target

    @property
    def max_session_tokens(self) -> int:
        """Longest session that every verify worker can hold, in tokens."""
        infos = [link.info for link in self.verifiers.links if link.info is not None]
        room = (min(info.max_model_len, info.num_blocks * info.block_size) for info in infos)
        return min(room, default=0)

    @property
    def max_tree_nodes(self) -> int:
        """Largest tree that every verify worker takes, root included."""
        infos = [link.info for link in self.verifiers.links if link.info is not None]
        return min((info.max_tree_nodes for info in infos), default=1)

    async def start(self, *, seconds: float) -> None:
        """Connect: wait for a verify worker, try each drafter once.

        Raises:
            Unavailable: no verify worker was ready within `seconds`.
            Mismatch: a worker that answered does not belong to the target.
        """
        self.verifiers.start()
        await self.verifiers.wait(seconds=seconds)
        await self.verifiers.attempt()
        self.drafters.start()
        await self.drafters.attempt()

    async def close(self) -> None:
        """End every link."""
        await self.drafters.close()
        await self.verifiers.close()

    def _check_verifier(self, address: str, info: WorkerInfo) -> None:
        if self._target is None:
            self._target = info
            return
        for name in ("model_hash", "tokenizer_hash", "vocab_size", "dtype"):
            _check_same(f"verify worker at {address}", name, info, self._target)

    def _check_drafter(self, address: str, info: WorkerInfo) -> None:
        for name in ("tokenizer_hash", "vocab_size"):
            _check_same(f"draft worker at {address}", name, info, self.target)


def _check_same(who: str, name: str, info: WorkerInfo, target: WorkerInfo) -> None:
    theirs, ours = getattr(info, name), getattr(target, name)
    if theirs != ours:
        error: SpecinferError = Mismatch(
            f"the {who} has {name} {theirs}, the target {target.model_name} has {ours}; "
            "they have to be the same"
        )
        log.error("%s", error.message)
        raise error
