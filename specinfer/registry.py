"""Which workers there are: each announces itself, every router reads the list.

This module knows nothing of links, sessions or what a worker computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from specinfer.messages import WorkerLoad

TIERS = ("draft", "verify")
# A worker says every so often that it is there; three times in silence and it is taken to be gone.
HEARTBEAT_SECONDS = 0.5
EXPIRY_SECONDS = 2.0


@dataclass(frozen=True)
class RegisteredWorker:
    """A worker as the registry knows it.

    Attributes:
        tier: one of TIERS.
        worker_id: unique name of the process.
        address: host and port that routers reach it at.
        model_hash: checkpoint that it serves.
        version: specinfer's version.
        load: when it was last heard of.
    """

    tier: str
    worker_id: str
    address: str
    model_hash: str = ""
    version: str = ""
    load: WorkerLoad = field(default_factory=WorkerLoad)


class WorkerRegistry(Protocol):
    """The list of workers; every method may raise Unavailable."""

    async def announce(self, worker: RegisteredWorker) -> None:
        """Put a worker on the list for EXPIRY_SECONDS by the registry's clock."""
        ...

    async def withdraw(self, worker: RegisteredWorker) -> None:
        """Take a worker off the list; it need not be there."""
        ...

    async def workers(self, tier: str) -> Sequence[RegisteredWorker]:
        """The workers of a tier that were heard of lately."""
        ...
