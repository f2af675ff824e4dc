"""What a pass costs by its rows, from what a worker measured of itself.

This module knows nothing of workers, trees or who asks.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from specinfer.messages import StepCost


class StepCurve:
    """Seconds of a forward pass by its rows: measured points with straight lines between."""

    def __init__(self, costs: Sequence[StepCost]) -> None:
        """Take the measurements with the shortest context, where rows matter most."""
        shortest = min((cost.context_len for cost in costs), default=0)
        points = {cost.num_rows: cost.seconds for cost in costs if cost.context_len == shortest}
        self._rows = sorted(points)
        # More rows never cost less; a measurement that says so is noise.
        self._seconds = list(accumulate((points[rows] for rows in self._rows), max))

    def at(self, num_rows: int) -> float:
        """Seconds of a pass; 1 when nothing was measured, so that only ratios are lost."""
        rows, seconds = self._rows, self._seconds
        if not rows:
            return 1.0
        if len(rows) == 1 or num_rows <= rows[0]:
            return seconds[0]
        right = min(max(bisect_right(rows, num_rows), 1), len(rows) - 1)
        left = right - 1
        slope = (seconds[right] - seconds[left]) / (rows[right] - rows[left])
        return seconds[left] + slope * (num_rows - rows[left])
