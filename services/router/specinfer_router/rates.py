"""Rates over time: what a key may use a minute, and how fast a queue drains.

Everything here is told the time and keeps none. This module knows nothing of keys, requests or
queues.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

MIN_RETRY_SECONDS = 0.1
MAX_RETRY_SECONDS = 60.0
# Long enough to see several ends of ordinary streams, short enough to follow a change of load.
_WINDOW_SECONDS = 60.0
_MAX_ENDS = 256


@dataclass
class MinuteBucket:
    """An allowance that refills evenly and holds one minute's worth at most.

    Taking more than there is leaves a debt: what a stream will use is known only at its end.
    """

    level: float
    filled_at: float

    def seconds_until(self, amount: float, per_minute: int, now: float) -> float:
        """How long until `amount` is there; 0.0 when it is. `per_minute` may differ each time."""
        elapsed = max(0.0, now - self.filled_at)
        self.level = min(float(per_minute), self.level + elapsed * per_minute / 60.0)
        self.filled_at = now
        return max(0.0, (amount - self.level) * 60.0 / per_minute)

    def take(self, amount: float) -> None:
        """Use some of it up; a negative amount gives it back."""
        self.level -= amount


@dataclass
class DrainRate:
    """How many streams end a second while all places are taken.

    Idle time is not counted: a queue that stands empty says nothing about how fast it would drain.
    """

    _full: bool = False
    _changed_at: float = 0.0
    _full_seconds: float = 0.0
    _ends: deque[float] = field(default_factory=lambda: deque(maxlen=_MAX_ENDS))

    def mark(self, *, full: bool, now: float) -> None:
        """Say whether all places are taken from now on."""
        if full != self._full:
            self._full_seconds = self._clock(now)
            self._full, self._changed_at = full, now

    def ended(self, now: float) -> None:
        """Count a stream that ends now."""
        if self._full:
            self._ends.append(self._clock(now))

    def seconds_for(self, num_places: int, now: float) -> float:
        """How long until so many places are free, within the bounds of a retry hint."""
        clock = self._clock(now)
        while self._ends and self._ends[0] < clock - _WINDOW_SECONDS:
            self._ends.popleft()
        span = min(clock, _WINDOW_SECONDS)
        if len(self._ends) == _MAX_ENDS:
            span = clock - self._ends[0]
        # When none has ended yet, the next end is about as far away as the beginning is.
        seconds = num_places * (span / len(self._ends) if self._ends else max(1.0, span))
        return min(MAX_RETRY_SECONDS, max(MIN_RETRY_SECONDS, seconds))

    def _clock(self, now: float) -> float:
        """Seconds spent full so far."""
        return self._full_seconds + (max(0.0, now - self._changed_at) if self._full else 0.0)
