"""A circuit breaker: who failed several times in a row is left alone for a while, then tried once.

    closed     everything is let through; `max_failures` failures in a row open it
    open       nothing is, until a rest is over that doubles each time, with jitter
    half-open  one call is; its success closes the breaker, its failure opens it again, and one
               that nobody hears of again gives way to another after `probe_seconds`

Every call that is let through has a ticket, so that what was asked before the breaker changed says
nothing about now. This module knows nothing of workers, calls or event loops.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class BreakerLimits:
    """When a breaker opens and for how long.

    Attributes:
        max_failures: failures in a row that open it.
        min_rest: seconds of the first rest.
        max_rest: most seconds of a rest.
        probe_seconds: a probe without a verdict keeps others out for so long.
    """

    max_failures: int = 3
    min_rest: float = 2.0
    max_rest: float = 120.0
    probe_seconds: float = 120.0


class Breaker:
    """The state of one breaker, for one event loop or thread.

    Args:
        limits: when it opens and for how long.
        clock: seconds that never go back.
        jitter: a factor for each rest, so that routers do not all try at one moment.
    """

    def __init__(
        self,
        limits: BreakerLimits,
        *,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = lambda: random.uniform(0.5, 1.0),
    ) -> None:
        self._limits = limits
        self._clock = clock
        self._jitter = jitter
        self.num_openings = 0
        self._era = 0
        self._num_failures = 0
        self._num_rests = 0
        self._rest_until: float | None = None
        self._probing = False
        self._probe_until = 0.0

    @property
    def state(self) -> str:
        """Where it stands: "closed", "open" or "half-open"."""
        if self._rest_until is None:
            return "closed"
        return "half-open" if self._clock() >= self._rest_until else "open"

    @property
    def allows(self) -> bool:
        """Whether `admit` would let a call through now."""
        if self._rest_until is None:
            return True
        probed = self._probing and self._clock() < self._probe_until
        return self.state == "half-open" and not probed

    def admit(self) -> int | None:
        """A ticket for one call, or None when none is let through."""
        if self._rest_until is None:
            return self._era
        if not self.allows:
            return None
        self._probing, self._probe_until = True, self._clock() + self._limits.probe_seconds
        self._era += 1
        return self._era

    def succeed(self, ticket: int | None) -> None:
        """The call did what was asked."""
        if ticket != self._era:
            return
        self._num_failures = 0
        if self._probing:
            self._probing, self._rest_until, self._num_rests = False, None, 0

    def fail(self, ticket: int | None, *, at_once: bool = False) -> None:
        """The call failed; `at_once` opens without waiting for others to fail."""
        if ticket != self._era:
            return
        self._num_failures += 1
        if self._probing or at_once or self._num_failures >= self._limits.max_failures:
            self._open()

    def release(self, ticket: int | None) -> None:
        """The call ended without a verdict, or has had one already; another may be the probe."""
        if ticket == self._era:
            self._probing = False

    def _open(self) -> None:
        self.num_openings += 1
        rest = min(self._limits.max_rest, self._limits.min_rest * 2**self._num_rests)
        self._rest_until = self._clock() + rest * self._jitter()
        self._num_rests = min(self._num_rests + 1, 16)
        self._num_failures, self._probing = 0, False
        self._era += 1
