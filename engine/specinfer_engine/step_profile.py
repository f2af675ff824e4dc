"""T(rows, context): what a pass costs, measured on a grid at a worker's start.

This module knows nothing of sessions, of files or of who asks.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from specinfer.messages import StepCost
from specinfer_engine.batch import SequenceRows

MEASURED_PASSES = 3
# Seconds after which points are timed once, and those after which longer contexts are left out.
PATIENT_SECONDS = 2.0
MOST_SECONDS = 8.0
# How far a remembered cost may be from a fresh look at it.
AGREEMENT = 1.5


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
    """Time the passes of a grid that fits; each is the median of up to MEASURED_PASSES.

    Writes into the first blocks of the pool, so call it before any session opens. Each number of
    rows is run once untimed. When time is up points are timed once, and then whole contexts are
    left out, but for the shortest.
    """
    spent = 0.0
    costs: list[StepCost] = []
    for place, context in enumerate(grid.context_lens):
        if place and spent > MOST_SECONDS:
            break
        for count in grid.row_counts:
            if not place:
                _time_pass(runner, count, context)
            times: list[float] = []
            while len(times) < MEASURED_PASSES and (not times or spent < PATIENT_SECONDS):
                times.append(_time_pass(runner, count, context))
                spent += times[-1]
            costs.append(StepCost(count, context, statistics.median(times)))
    return tuple(costs)


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
    fastest = min(_looks(runner, cost))
    return cost.seconds / AGREEMENT <= fastest <= cost.seconds * AGREEMENT


def _looks(runner: ProfiledRunner, cost: StepCost) -> Iterator[float]:
    _time_pass(runner, cost.num_rows, cost.context_len)
    for _ in range(MEASURED_PASSES):
        yield _time_pass(runner, cost.num_rows, cost.context_len)


def _time_pass(runner: ProfiledRunner, num_rows: int, context_len: int) -> float:
    table = range(-(-(context_len + num_rows) // runner.block_size))
    rows = SequenceRows.chain((0,) * num_rows, context_len, table, range(num_rows))
    start = time.perf_counter()
    # Reading a value makes a device finish.
    runner.forward([rows])[0][0, 0].item()
    return time.perf_counter() - start
