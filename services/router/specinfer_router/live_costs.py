"""What a target's passes cost as they are now: its own measurement, corrected by what is seen.

This module knows nothing of sessions, drafters or shapes.
"""

from __future__ import annotations

import math

from specinfer.step_curve import StepCurve

# Passes: how far one may lie from what was expected, how many powers of two of rows are told apart
# (few passes have more than 256 rows, and what they cost must not stay unseen for ever), how fast
# they are forgotten, how many are remembered, and as how many what is hoped of each counts.
FURTHEST_STEP = math.log(4.0)
ROW_CLASSES = 9
KEPT_PASS = 0.998
LEAST_KEPT = 1e-3
MOST_PASSES = 50.0
LEANING_PASSES = 1.0
# How quickly the machine's pace is followed.
PACE_WEIGHT = 0.05


class MovingAverage:
    """An average that forgets; its first value counts in full."""

    def __init__(self, first: float, weight: float) -> None:
        self.value = first
        self._weight = weight
        self._empty = True

    def observe(self, value: float) -> None:
        """Take a value in."""
        self.value += (1.0 if self._empty else self._weight) * (value - self.value)
        self._empty = False


class LiveCosts:
    """T(rows, context) as it is now: a worker's own measurement, corrected by the passes it makes.

    The correction is the machine's pace, the same for all passes, times a factor for each power of
    two of rows. A machine that is shared is slower for a while whatever it does, and choices
    between few and many rows must not follow that: so the pace is quick to change. The factors are
    what first seeing such a pass beside others has told, and slow to change. What was not seen for
    a while is taken to be as fast as it was measured, or as passes are now if that is faster: who
    hopes too much tries it and learns.
    """

    def __init__(self, measured: StepCurve) -> None:
        """Begin with the worker's measurement as it is."""
        self._measured = measured
        # Logarithms of pace and factors, and how many passes stand behind each.
        self._pace, self._num_seen = 0.0, 0.0
        self._factors, self._weights = [0.0] * ROW_CLASSES, [0.0] * ROW_CLASSES
        # All weights shrink together: what is left of them since they were written down.
        self._kept = 1.0

    def observe(self, num_rows: int, context_len: int, seconds: float, share: float = 1.0) -> None:
        """Take in a pass; `share` is the part of it that the teller stands for."""
        if share <= 0:
            return
        place = _row_class(num_rows)
        known = self._pace + self._factors[place]
        ratio = seconds / self._measured.at(max(1, num_rows), context_len)
        # One pass that the machine was away from says little of the others.
        error = min(max(math.log(ratio) - known, -FURTHEST_STEP), FURTHEST_STEP)
        self._num_seen = min(MOST_PASSES, self._num_seen + share)
        step = error * max(PACE_WEIGHT * share, share / self._num_seen)
        self._pace += step
        self._kept *= KEPT_PASS**share
        if self._kept < LEAST_KEPT:
            self._weights = [self._kept * weight for weight in self._weights]
            self._kept = 1.0
        weight = min(MOST_PASSES, self._kept * self._weights[place] + share)
        self._weights[place] = weight / self._kept
        self._factors[place] += (error - step) * share / (weight + LEANING_PASSES)

    def factor(self, num_rows: int) -> float:
        """How much longer a pass takes now than when it was measured."""
        place = _row_class(num_rows)
        weight, known = self._kept * self._weights[place], self._pace + self._factors[place]
        hoped = min(0.0, self._pace)
        return math.exp((weight * known + LEANING_PASSES * hoped) / (weight + LEANING_PASSES))

    def at(self, num_rows: int, context_len: int) -> float:
        """Seconds of a pass; see `StepCurve.at`."""
        return self._measured.at(num_rows, context_len) * self.factor(num_rows)


def _row_class(num_rows: int) -> int:
    return min(max(0, num_rows - 1).bit_length(), ROW_CLASSES - 1)
