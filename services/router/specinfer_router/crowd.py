"""How many sessions are a crowd, and when there are fewer: for all who treat a crowd otherwise.

It knows nothing of what they do with it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

# More sessions than this at one worker are decided for as one, and hardly wait for each other.
CROWD = 8
# A request that ends makes room for the next one, which takes the way to its user and back.
DIP_SECONDS = 0.1
GOLDEN_SECTION = (5.0**0.5 - 1.0) / 2.0


def tellers(num_sessions: int) -> int:
    """Of how many rounds of so many sessions one is told: as many as CROWD sessions have."""
    return num_sessions // CROWD or 1


class Places:
    """Places in [0, 1) for sessions, so that those of a crowd tell of different passes.

    Multiples of the golden section: spread well, whether sessions come at once or one with each
    pass. At a few rates of coming some passes are told by nobody and the next by twice as many;
    every session tells as often, so that the mean is right.
    """

    def __init__(self) -> None:
        self._last = 0.0

    def next(self) -> float:
        """The place of the next session."""
        self._last = (self._last + GOLDEN_SECTION) % 1.0
        return self._last


class RecentMost:
    """How many there were at most within the last DIP_SECONDS.

    Sessions that began together end together, and for a moment, until those who follow them have
    come, the others seem to be alone.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # When there were how many for the last time, the most first and thus the earliest.
        self._before: deque[tuple[float, int]] = deque()

    def note(self, number: int) -> None:
        """Take in that there are `number` until now."""
        while self._before and self._before[-1][1] <= number:
            self._before.pop()
        self._before.append((self._clock(), number))

    def most(self, number: int) -> int:
        """The most of late, where there are `number` now."""
        earliest = self._clock() - DIP_SECONDS
        while self._before and self._before[0][0] < earliest:
            self._before.popleft()
        return max(number, self._before[0][1]) if self._before else number
