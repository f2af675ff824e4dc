"""A median and how sure it is, for samples of a machine that is never quite still.

This module knows nothing of what was measured.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

RESAMPLES = 2000


@dataclass(frozen=True)
class Spread:
    """A median with the interval in which 95 of 100 resampled medians lie."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float], scale: float = 1.0) -> Spread:
    """The bootstrap's spread, times `scale`, to four places; the same for the same values."""
    chance = random.Random(len(values))
    medians = sorted(
        statistics.median(chance.choices(values, k=len(values))) for _ in range(RESAMPLES)
    )
    low, high = medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES)]
    found = (statistics.median(values), low, high)
    return Spread(*(round(scale * value, 4) for value in found))
