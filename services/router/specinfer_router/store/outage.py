"""When the shared store went away, and one task that asks until it is back.

However many sessions run, one prober pays the time-outs, with jittered pauses that grow. This
module knows nothing of sessions.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from contextvars import Context
from dataclasses import dataclass
from typing import TypeVar

from specinfer.errors import SpecinferError, Unavailable
from specinfer.tasks import end_task

log = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class OutageLimits:
    """What happens while the shared store is away.

    Attributes:
        outage_seconds: how long running sessions go on from memory.
        serve_new: whether new sessions are held in memory alone, or refused.
        patience_seconds: an answer that takes longer means that the store is away.
        min_pause, max_pause: seconds between two questions of whether it is back.
        max_sessions: most sessions held in memory.
        max_tokens: most tokens of them, with all that they may still become.
    """

    outage_seconds: float = 60.0
    serve_new: bool = False
    patience_seconds: float = 1.0
    min_pause: float = 0.05
    max_pause: float = 1.0
    max_sessions: int = 4096
    max_tokens: int = 50_000_000


class Outage:
    """Whether a store is away, and since when.

    `return_home` asks it once and brings back what it has missed; whatever it raises, it is asked
    again.
    """

    def __init__(
        self,
        limits: OutageLimits,
        *,
        return_home: Callable[[], Awaitable[None]],
        ended: Callable[[float], None],
    ) -> None:
        self._limits = limits
        self._return_home = return_home
        self._ended = ended
        self._since: float | None = None
        # A router that has just started cannot know whether there was an outage.
        self._last_end = time.monotonic()
        self._prober: asyncio.Task[None] | None = None

    @property
    def is_on(self) -> bool:
        """Whether the store is away."""
        return self._since is not None

    @property
    def seconds(self) -> float:
        """How long it has been away; 0 when it is not."""
        return 0.0 if self._since is None else time.monotonic() - self._since

    @property
    def seconds_since_last(self) -> float:
        """How long it has been back, or how long we have been here if it never was away."""
        return 0.0 if self.is_on else time.monotonic() - self._last_end

    def begin(self, error: SpecinferError) -> None:
        """The store did not answer."""
        if self._since is not None:
            return
        log.warning("the session store is away", extra={"error": error.message})
        self._since = time.monotonic()
        # It outlives the request that happens to start it, and is none of its trace.
        self._prober = asyncio.create_task(self._probe(), context=Context())

    async def within_patience(self, call: Awaitable[_Answer]) -> _Answer:
        """What the store answers; raises Unavailable also when it takes too long."""
        try:
            async with asyncio.timeout(self._limits.patience_seconds):
                return await call
        except TimeoutError as error:
            raise Unavailable(
                f"the session store has not answered for {self._limits.patience_seconds:g} s"
            ) from error

    async def close(self) -> None:
        """Ask no more."""
        await end_task(self._prober)

    async def _probe(self) -> None:
        pause = self._limits.min_pause
        while True:
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(self._limits.max_pause, 2 * pause)
            try:
                await self._return_home()
            except SpecinferError as error:
                log.debug("the session store is still away", extra={"error": error.message})
                continue
            except Exception:
                # Whatever it is: who asks no more holds sessions in memory for good.
                log.exception("bringing sessions back to the store failed; it is tried again")
                continue
            break
        seconds, self._since = self.seconds, None
        self._last_end = time.monotonic()
        log.warning("the session store is back", extra={"seconds": round(seconds, 3)})
        self._ended(seconds)
