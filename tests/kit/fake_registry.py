"""A workers' registry in memory, for tests of what reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from specinfer.errors import Unavailable
from specinfer.messages import WorkerLoad
from specinfer.registry import RegisteredWorker
from tests.kit.fake_workers import FakeVerifier, FakeWorker


class FakeRegistry:
    """Lists what it was told until it is told otherwise.

    Attributes:
        listed: entries by worker id.
        away: every call fails while it is true.
        num_looks: how often the list was asked for.
    """

    place = "a list in memory"

    def __init__(self) -> None:
        self.listed: dict[str, RegisteredWorker] = {}
        self.away = False
        self.num_looks = 0

    def put(self, worker: FakeWorker, *, draining: bool = False) -> None:
        """List a fake worker under its own id."""
        tier = "verify" if isinstance(worker, FakeVerifier) else "draft"
        load = WorkerLoad(draining=draining)
        entry = RegisteredWorker(tier, worker.info.worker_id, worker.address, load=load)
        self.listed[entry.worker_id] = entry

    async def announce(self, worker: RegisteredWorker) -> None:
        self._check()
        self.listed[worker.worker_id] = replace(worker)

    async def withdraw(self, worker: RegisteredWorker) -> None:
        self._check()
        self.listed.pop(worker.worker_id, None)

    async def workers(self) -> Sequence[RegisteredWorker]:
        self.num_looks += 1
        self._check()
        return list(self.listed.values())

    async def close(self) -> None:
        """Nothing is open."""

    def _check(self) -> None:
        if self.away:
            raise Unavailable("the list is away")
