"""What a pass costs by its rows and its context, from what a worker measured of itself.

This module knows nothing of workers, trees or who asks.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from specinfer.messages import StepCost

Line = tuple[list[int], list[float]]
SHOWN_ROWS = (1, 8, 32)


class StepCurve:
    """T(rows, context): seconds of a forward pass, bilinear between the measured points.

    Every measured context has its own line over rows. Between two contexts, and beyond the
    longest, the lines are joined by straight lines; below the shortest it stands for itself.
    """

    def __init__(self, costs: Sequence[StepCost]) -> None:
        """Take the measurements in any order; a point that is told twice counts once."""
        lines: dict[int, dict[int, float]] = {}
        for cost in costs:
            lines.setdefault(cost.context_len, {})[cost.num_rows] = cost.seconds
        self._contexts = sorted(lines)
        self._lines = [_line(lines[context]) for context in self._contexts]
        self._growth = self._last_growth()

    def at(self, num_rows: int, context_len: int = 0) -> float:
        """Seconds of a pass; 1 when nothing was measured, so that only ratios are lost.

        Args:
            num_rows: rows of the pass.
            context_len: committed keys that each row sees; 0 takes the shortest measured.
        """
        contexts = self._contexts
        if not contexts:
            return 1.0
        if len(contexts) == 1 or context_len <= contexts[0]:
            return _on_line(self._lines[0], num_rows)
        right = min(bisect_right(contexts, context_len), len(contexts) - 1)
        near, far = self._between(num_rows, right)
        share = (context_len - contexts[right - 1]) / (contexts[right] - contexts[right - 1])
        if share > 1.0:
            return far + (share - 1.0) * _on_line(self._growth, num_rows)
        return near + share * (far - near)

    def _last_growth(self) -> Line:
        """By rows, what the way from the last context but one to the last adds.

        Where it is less for more rows, which is noise, it is as little for the fewer: as much is
        added again further on, and more rows never cost less there either.
        """
        right = len(self._contexts) - 1
        if right < 1:
            return [], []
        counts = sorted({count for rows, _ in self._lines for count in rows}, reverse=True)
        pairs = [self._between(count, right) for count in counts]
        least = accumulate((far - near for near, far in pairs), min)
        return _line(dict(zip(counts, least, strict=True)))

    def _between(self, num_rows: int, right: int) -> tuple[float, float]:
        """Seconds at context number `right` - 1 and at the next one."""
        base, near, far = (
            _on_line(self._lines[place], num_rows) for place in (0, right - 1, right)
        )
        # More keys never cost less; a measurement that says so is noise.
        return max(base, near), max(base, near, far)


def shown(costs: Sequence[StepCost]) -> str:
    """Milliseconds of passes of SHOWN_ROWS at the shortest context, or "-" where none is known."""
    if not costs:
        return "-"
    curve = StepCurve(costs)
    return "/".join(f"{1000 * curve.at(rows):.3g}" for rows in SHOWN_ROWS)


def age(measured_at: float, now: float) -> str:
    """How long ago that was, roughly, for seconds since 1970; "" for a time that cannot be."""
    if not 0 < measured_at < math.inf:
        return ""
    minutes = max(0.0, now - measured_at) / 60
    for unit, size in (("days", 1440), ("h", 60)):
        if minutes >= 2 * size:
            return f"{minutes / size:.0f} {unit} ago"
    return f"{minutes:.0f} min ago"


def _line(points: dict[int, float]) -> Line:
    rows = sorted(points)
    # More rows never cost less either.
    return rows, list(accumulate((points[count] for count in rows), max))


def _on_line(line: Line, num_rows: int) -> float:
    rows, seconds = line
    if len(rows) == 1 or num_rows <= rows[0]:
        return seconds[0]
    right = min(max(bisect_right(rows, num_rows), 1), len(rows) - 1)
    left = right - 1
    slope = (seconds[right] - seconds[left]) / (rows[right] - rows[left])
    return seconds[left] + slope * (num_rows - rows[left])
