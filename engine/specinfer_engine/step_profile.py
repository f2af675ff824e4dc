"""T(rows, context): what a pass costs, measured on a grid at a worker's start.

This module knows nothing of sessions, of files or of who asks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from specinfer.messages import StepCost
from specinfer_engine.batch import SequenceRows

MEASURED_PASSES = 5
# Seconds after which nothing is timed again, and those after which longer contexts are left out.
PATIENT_SECONDS = 5.0
MOST_SECONDS = 8.0
# How far a remembered cost may be from a fresh look at it.
AGREEMENT = 1.5
FEWEST_LOOKS = 2


@dataclass(frozen=True)
class StepProfile:
    """Measured costs.

    Attributes:
        costs: of the grid's points.
        measured_at: when, in seconds since 1970 by this machine's clock.
    """

    costs: tuple[StepCost, ...]
    measured_at: float


@dataclass(frozen=True)
class ProfileGrid:
    """The points to measure.

    Attributes:
        row_counts: rows of a pass.
        context_lens: committed keys that each row sees, shortest first.
    """

    row_counts: tuple[int, ...]
    context_lens: tuple[int, ...]

    def within(self, num_slots: int) -> ProfileGrid:
        """The points that fit into so many slots; contexts shrink, and equal ones fall together."""
        counts = tuple(count for count in self.row_counts if 1 <= count < num_slots)
        room = max(0, num_slots - max(counts, default=0))
        contexts = sorted({max(0, min(context, room)) for context in self.context_lens})
        return ProfileGrid(counts, tuple(contexts))


class ProfiledRunner(Protocol):
    """What is measured: a model with its pool."""

    block_size: int

    def forward(self, rows: Sequence[SequenceRows]) -> list[Tensor]:
        """One pass; see `Runner.forward`."""
        ...


def measure_step_costs(runner: ProfiledRunner, grid: ProfileGrid) -> tuple[StepCost, ...]:
    """Time the passes of a grid that fits: the fastest of up to MEASURED_PASSES looks at each.

    A machine that does other things makes passes slower and never faster, for a moment or for a
    while: so the fastest counts, all points are looked at in turn before any is again, and a point
    costs no more than one with more rows or more context.

    Writes into the first blocks of the pool, so call it before any session opens. Each number of
    rows is run once untimed. When time is up no point is looked at again, and of points without a
    look whole contexts are left out, but for the shortest.
    """
    for count in grid.row_counts:
        _time_pass(runner, count, grid.context_lens[0])
    spent = 0.0
    fastest: dict[tuple[int, int], float] = {}
    for look in range(MEASURED_PASSES):
        for place, context in enumerate(grid.context_lens):
            if spent > MOST_SECONDS and place and not look:
                break
            for count in grid.row_counts:
                point = (context, count)
                if look and (spent > PATIENT_SECONDS or point not in fastest):
                    break
                seconds = _time_pass(runner, count, context)
                fastest[point] = min(seconds, fastest.get(point, seconds))
                spent += seconds
    return _rising(fastest)


def _rising(fastest: Mapping[tuple[int, int], float]) -> tuple[StepCost, ...]:
    """Costs by context and rows, none above that of a point that is no smaller in either."""
    return tuple(
        StepCost(
            count,
            context,
            min(
                seconds
                for (longer, more), seconds in fastest.items()
                if longer >= context and more >= count
            ),
        )
        for context, count in fastest
    )


def warm_up(runner: ProfiledRunner, grid: ProfileGrid) -> None:
    """Run every point of a grid that fits once, where a first pass costs what no other does."""
    for context in grid.context_lens:
        for count in grid.row_counts:
            _time_pass(runner, count, context)


def still_true(runner: ProfiledRunner, costs: Sequence[StepCost]) -> bool:
    """Whether a fresh look at the first and the last point of the first context agrees."""
    shortest = [cost for cost in costs if cost.context_len == costs[0].context_len]
    return all(_agrees(runner, cost) for cost in {shortest[0], shortest[-1]})


def _agrees(runner: ProfiledRunner, cost: StepCost) -> bool:
    """Whether the fastest of some looks is near; few are enough where it is."""
    _time_pass(runner, cost.num_rows, cost.context_len)
    fastest = math.inf
    for look in range(1, MEASURED_PASSES + 1):
        fastest = min(fastest, _time_pass(runner, cost.num_rows, cost.context_len))
        if fastest * AGREEMENT < cost.seconds:
            return False
        if fastest <= cost.seconds * AGREEMENT and look >= FEWEST_LOOKS:
            return True
    return False


def _time_pass(runner: ProfiledRunner, num_rows: int, context_len: int) -> float:
    table = range(-(-(context_len + num_rows) // runner.block_size))
    rows = SequenceRows.chain((0,) * num_rows, context_len, table, range(num_rows))
    start = time.perf_counter()
    # Reading a value makes a device finish.
    runner.forward([rows])[0][0, 0].item()
    return time.perf_counter() - start
