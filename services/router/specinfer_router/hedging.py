"""Asking a second drafter when the first is slower than usual: when, and how often at most.

After "The Tail at Scale" (Dean and Barroso, CACM 2013): a second request goes out once the first
has taken longer than nearly all before it, within a budget, so that it costs little and cannot add
load where all are slow. This module knows nothing of drafters, trees or links.
"""

from __future__ import annotations

from collections import deque

WINDOW = 128
LEAST_SAMPLES = 16
REFRESH = 8


class MovingQuantile:
    """A quantile of the last values.

    Args:
        share: which one, between 0 and 1.
    """

    def __init__(self, share: float = 0.95) -> None:
        self._share = share
        self._values: deque[float] = deque(maxlen=WINDOW)
        self._num_new = 0
        self._quantile: float | None = None

    @property
    def value(self) -> float | None:
        """The quantile as of a few values ago; None while too few are known."""
        return self._quantile

    def observe(self, value: float) -> None:
        """Take in one value."""
        self._values.append(value)
        self._num_new += 1
        if len(self._values) >= LEAST_SAMPLES and self._num_new >= REFRESH:
            self._num_new = 0
            ordered = sorted(self._values)
            self._quantile = ordered[int(self._share * (len(ordered) - 1))]


class HedgeBudget:
    """How many second requests a router may still make: a token bucket that requests fill.

    Args:
        share: second requests for each first one, in the long run.
        burst: most that can be saved up.

    Attributes:
        num_hedges: second requests made.
        num_wins: those whose answer came first and was used.
    """

    def __init__(self, share: float = 0.1, burst: float = 4.0) -> None:
        self._share = share
        self._burst = burst
        self._tokens = burst
        self.num_hedges = 0
        self.num_wins = 0

    def earn(self) -> None:
        """A first request was made."""
        self._tokens = min(self._burst, self._tokens + self._share)

    def spend(self) -> bool:
        """Whether a second request may be made; it counts as made then."""
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        self.num_hedges += 1
        return True
