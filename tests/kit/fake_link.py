"""A link to a worker that is not there, for tests of who goes where and who waits for whom."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from specinfer.messages import WorkerInfo, WorkerLoad
from specinfer_router.pool import WorkerPool
from specinfer_router.prefix_lookup import PrefixLookup
from tests.kit.fake_workers import info_of


class FakeLink:
    """As much of a link as a pool looks at."""

    tier = "verify"
    connected = ready = trusted = True
    refusal = None

    def __init__(self, name: str, num_seats: int = 0, **changes: Any) -> None:
        self.address = name
        self.info: WorkerInfo | None = info_of(name, **changes)
        self.load = WorkerLoad()
        self.num_seats = num_seats


def pool_of(*links: FakeLink, prefixes: PrefixLookup | None = None) -> WorkerPool[Any]:
    """A pool of these links; nobody connects them."""
    return WorkerPool(cast(Any, links), asyncio.Event(), prefixes=prefixes)
