"""Both tiers of a cluster, and whether their workers belong together.

This module knows nothing of rounds, trees or text.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from specinfer.errors import Mismatch, Unavailable
from specinfer.messages import WorkerInfo, WorkerStatus
from specinfer.registry import MAX_WORKERS, WorkerRegistry
from specinfer.rpc import TlsSettings
from specinfer_router.discovery import Discovery, TierFollower
from specinfer_router.links import LinkLimits, WorkerLink
from specinfer_router.pool import WorkerPool
from specinfer_router.prefix_lookup import PrefixLookup
from specinfer_router.worker_links import DraftLink, VerifyLink

log = logging.getLogger(__name__)

# What a worker has to have in common with the target.
VERIFY_FIELDS = ("model_hash", "tokenizer_hash", "vocab_size", "dtype")
DRAFT_FIELDS = ("tokenizer_hash", "vocab_size")
MAX_REFUSED = 2 * MAX_WORKERS

_Link = TypeVar("_Link", bound=WorkerLink[Any])


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
        registry: WorkerRegistry | None = None,
        prefixes: PrefixLookup | None = None,
    ) -> None:
        """Take down the addresses of workers, and where others are found.

        Args:
            verify: addresses of verify workers.
            draft: addresses of draft workers.
            limits: bounds of each link.
            tls: certificates towards workers; None speaks plain text.
            registry: lists other workers of both tiers, or None.
            prefixes: says which verify worker holds a prompt's beginning, or None.
        """
        self._target: WorkerInfo | None = None
        self._limits = limits or LinkLimits()
        self._tls = tls
        # What was said of the refused, so that it is said once and not at each new attempt.
        self._refused: dict[str, str] = {}
        place = "" if registry is None else registry.place
        verify_changed, draft_changed = asyncio.Event(), asyncio.Event()
        verify_link = self._builder(VerifyLink, VERIFY_FIELDS, verify_changed)
        draft_link = self._builder(DraftLink, DRAFT_FIELDS, draft_changed)
        self.verifiers: WorkerPool[VerifyLink] = WorkerPool(
            [verify_link(address) for address in verify],
            verify_changed,
            prefixes=prefixes,
            place=place,
        )
        self.drafters: WorkerPool[DraftLink] = WorkerPool(
            [draft_link(address) for address in draft], draft_changed, place=place
        )
        self._discovery: Discovery | None = None
        if registry is not None:
            self._discovery = Discovery(
                registry,
                {
                    "verify": TierFollower(self.verifiers, verify_link),
                    "draft": TierFollower(self.drafters, draft_link),
                },
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
        room = (min(i.max_model_len, i.num_blocks * i.block_size) for i in self._fitting())
        return min(room, default=0)

    @property
    def max_tree_nodes(self) -> int:
        """Largest tree that every verify worker takes, root included."""
        return min((info.max_tree_nodes for info in self._fitting()), default=1)

    def workers(self) -> tuple[WorkerStatus, ...]:
        """What is known of every worker, the verify tier first."""
        return self.verifiers.statuses() + self.drafters.statuses()

    async def start(self, *, seconds: float) -> None:
        """Connect: wait for a verify worker, try each drafter known by then once.

        A worker that does not fit is left out, and those that fit serve.

        Raises:
            Unavailable: no verify worker was ready within `seconds`.
            Mismatch: drafters were given, and not one that answered belongs to the target.
        """
        self.verifiers.start()
        if self._discovery is not None:
            self._discovery.start()
        await self.verifiers.wait(seconds=seconds)
        await self.verifiers.attempt()
        # A drafter can only be judged by the target.
        self.drafters.start()
        await self.drafters.attempt()

    async def close(self) -> None:
        """End every link."""
        if self._discovery is not None:
            await self._discovery.close()
        await self.drafters.close()
        await self.verifiers.close()

    def _fitting(self) -> list[WorkerInfo]:
        """The verify workers that were accepted; the target itself where none is left."""
        infos = [link.info for link in self.verifiers.links if link.info is not None]
        return infos or ([] if self._target is None else [self._target])

    def _builder(
        self, kind: type[_Link], names: Sequence[str], changed: asyncio.Event
    ) -> Callable[[str], _Link]:
        """Makes links of one tier, to workers that have these fields in common with the target."""

        def build(address: str) -> _Link:
            return kind(
                address,
                check=lambda info: self._check(kind.tier, address, info, names),
                on_ready=changed.set,
                limits=self._limits,
                tls=self._tls,
            )

        return build

    def _check(self, tier: str, address: str, info: WorkerInfo, names: Sequence[str]) -> None:
        if self._target is None and tier == VerifyLink.tier:
            self._target = info
        differing = [name for name in names if getattr(info, name) != getattr(self.target, name)]
        if not differing:
            self._refused.pop(address, None)
            return
        name = differing[0]
        message = (
            f"the {tier} worker at {address} has {name} {getattr(info, name)}, the target "
            f"{self.target.model_name} has {getattr(self.target, name)}; they have to be the same"
        )
        if self._refused.get(address) != message:
            log.error("%s", message)
            if len(self._refused) >= MAX_REFUSED:
                self._refused.clear()
            self._refused[address] = message
        raise Mismatch(message)
