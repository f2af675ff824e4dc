"""A router's door with a clock of the test's own, and callers that stand before it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from specinfer.errors import ResourceExhausted, SpecinferError
from specinfer_router.access import ANYBODY, Caller, KeyLimits
from specinfer_router.admission import Admission, AdmissionLimits, Ticket


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


def key(name: str, **limits: int) -> Caller:
    return Caller(name, KeyLimits(**limits))


async def settle() -> None:
    """Let every task that can run do so; nothing here waits for time."""
    for _ in range(6):
        await asyncio.sleep(0)


@dataclass
class Request:
    """One caller of the door, in its own task."""

    admission: Admission
    caller: Caller
    priority: int = 0
    ticket: Ticket | None = None
    error: BaseException | None = None
    go: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    def start(self) -> Request:
        self.task = asyncio.create_task(self._run())
        return self

    async def _run(self) -> None:
        try:
            async with self.admission.slot(self.caller, self.priority) as ticket:
                self.ticket = ticket
                await self.go.wait()
        except (SpecinferError, asyncio.CancelledError) as error:
            self.error = error

    @property
    def state(self) -> str:
        if self.error is not None:
            return "refused"
        if self.ticket is None:
            return "waiting"
        return "ended" if self.go.is_set() else "running"

    async def end(self) -> None:
        self.go.set()
        assert self.task is not None
        await self.task
        await settle()

    async def cancel(self) -> None:
        assert self.task is not None
        self.task.cancel()
        await self.task
        await settle()


async def begin(admission: Admission, caller: Caller = ANYBODY, priority: int = 0) -> Request:
    request = Request(admission, caller, priority).start()
    await settle()
    return request


@asynccontextmanager
async def door(
    max_streams: int = 1, max_waiting: int = 8, kind: type[Admission] = Admission
) -> AsyncIterator[tuple[Admission, Clock]]:
    clock = Clock()
    limits = AdmissionLimits(max_streams=max_streams, max_waiting=max_waiting)
    yield kind(limits, clock=clock), clock


def refusal(request: Request) -> ResourceExhausted:
    assert isinstance(request.error, ResourceExhausted)
    assert request.error.retry_after is not None
    return request.error
