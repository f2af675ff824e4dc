"""When a pass waits for sessions that are due: by measured costs, bounded; no token changes."""

from __future__ import annotations

import heapq
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import Tensor

from specinfer.errors import InvalidRequest
from specinfer.messages import StepCost
from specinfer.sampling import SamplingParams
from specinfer.step_curve import StepCurve
from specinfer_engine.batch import SequenceRows
from specinfer_verify.gathering import wait_until
from specinfer_verify.session import Absence
from specinfer_verify.settings import Settings
from tests.kit.table_models import TableRunner
from tests.kit.verify_driver import Job, decode_all, running, table_engine

FLAT = StepCurve([StepCost(1, 0, 0.05), StepCost(1024, 0, 0.05)])
BY_ROW = StepCurve([StepCost(1, 0, 0.005), StepCost(1024, 0, 5.12)])
STEEP = StepCurve([StepCost(1, 0, 0.03), StepCost(64, 0, 0.2)])
MAX_ROWS = 256


def away(since: float, seconds: float, num_rows: int = 4) -> Absence:
    return Absence(since, seconds, num_rows)


def test_nobody_waits_for_nobody() -> None:
    assert wait_until(10.0, [4], [], FLAT, MAX_ROWS) == 10.0
    assert wait_until(10.0, [4], [Absence()], FLAT, MAX_ROWS) == 10.0, "not seen yet"


def test_a_pass_waits_for_who_is_due_where_rows_are_nearly_free() -> None:
    until = wait_until(10.0, [4], [away(9.995, 0.008)], FLAT, MAX_ROWS)
    assert 10.003 < until <= 9.995 + 2 * 0.008 + 0.001 + 1e-9
    assert wait_until(10.0, [4], [away(9.995, 0.008)], BY_ROW, MAX_ROWS) == 10.0, "half-batches"


def test_who_is_late_far_or_too_large_is_not_waited_for() -> None:
    assert wait_until(10.0, [4], [away(9.9, 0.008)], FLAT, MAX_ROWS) == 10.0, "late"
    assert wait_until(10.0, [4], [away(10.0, 0.06)], FLAT, MAX_ROWS) == 10.0, "far"
    assert wait_until(10.0, [4], [away(10.0, 0.008, 300)], FLAT, MAX_ROWS) == 10.0, "too large"


def test_an_unpunctual_session_keeps_nobody_from_waiting_for_the_others() -> None:
    punctual = [away(9.999, 0.008) for _ in range(7)]
    erratic = Absence(9.999, 0.006, 4, deviation=0.1)
    until = wait_until(10.0, [4], punctual, FLAT, MAX_ROWS)
    assert until > 10.005
    assert wait_until(10.0, [4], [*punctual, erratic], FLAT, MAX_ROWS) == until


@dataclass
class World:
    """Sessions that are drafted for `away` seconds between two passes."""

    costs: StepCurve
    away: float
    num_sessions: int
    gathers: bool
    spread: float = 0.2

    def run(self, seconds: float = 30.0, num_rows: int = 4) -> tuple[float, float]:
        """Rounds a second, and the share of the time without a pass."""
        rng, now, busy, rounds = random.Random(1), 0.0, 0.0, 0
        coming = [(rng.uniform(0, 0.06), place) for place in range(self.num_sessions)]
        heapq.heapify(coming)
        absences = [Absence() for _ in coming]
        waiting: list[int] = []
        while now < seconds:
            while coming and coming[0][0] <= now:
                at, place = heapq.heappop(coming)
                absences[place].come_back(at)
                waiting.append(place)
            others = [a for place, a in enumerate(absences) if place not in waiting]
            until = now
            if waiting and self.gathers:
                rows = [num_rows] * len(waiting)
                until = wait_until(now, rows, others, self.costs, MAX_ROWS)
            if not waiting or until > now:
                now = min([at for at, _ in coming[:1]] + ([until] if waiting else []))
                continue
            cost = self.costs.at(num_rows * len(waiting))
            now, busy, rounds = now + cost, busy + cost, rounds + len(waiting)
            for place in waiting:
                absences[place].leave(now, num_rows)
                late = rng.uniform(1 - self.spread, 1 + self.spread)
                heapq.heappush(coming, (now + self.away * late, place))
            waiting = []
        return rounds / now, 1 - busy / now


@pytest.mark.parametrize("num_sessions", [2, 4, 8])
def test_two_groups_that_take_turns_become_one_where_a_pass_is_mostly_fixed_cost(
    num_sessions: int,
) -> None:
    split, split_idle = World(FLAT, 0.008, num_sessions, gathers=False).run()
    whole, whole_idle = World(FLAT, 0.008, num_sessions, gathers=True).run()
    # The control: the engine is never idle, and every weight is read twice a round.
    assert split_idle < 0.01
    assert split == pytest.approx(num_sessions / 0.1, rel=0.02)
    assert whole > 1.6 * split
    assert whole_idle < 0.2


@pytest.mark.parametrize("num_sessions", [1, 2, 4, 8])
def test_half_batches_keep_the_engine_busy_where_rows_cost(num_sessions: int) -> None:
    split, _ = World(BY_ROW, 0.008, num_sessions, gathers=False).run()
    whole, idle = World(BY_ROW, 0.008, num_sessions, gathers=True).run()
    assert whole == pytest.approx(split)
    assert num_sessions == 1 or idle < 0.01


@pytest.mark.parametrize("spread", [0.1, 1.0])
@pytest.mark.parametrize("num_sessions", [2, 4, 8])
@pytest.mark.parametrize("away_seconds", [0.015, 0.03, 0.06])
def test_gathering_never_loses_much(away_seconds: float, num_sessions: int, spread: float) -> None:
    """However long drafts take and however punctual they are; even where nothing can be won."""
    for costs in (FLAT, STEEP):
        split, whole = (
            World(costs, away_seconds, num_sessions, gathers, spread).run(20.0)[0]
            for gathers in (False, True)
        )
        assert whole > 0.96 * split


class SlowRunner(TableRunner):
    """A table model whose passes take five milliseconds whatever is in them."""

    def forward(self, rows: Sequence[SequenceRows]) -> list[Tensor]:
        time.sleep(0.005)
        return super().forward(rows)


def test_sessions_that_gather_get_the_same_tokens_in_fewer_passes() -> None:
    jobs = [Job((1 + n, 2, 3), SamplingParams(temperature=1.0, seed=n), 60) for n in range(3)]
    found, num_passes = [], []
    for gathers in (False, True):
        engine, runner, _ = table_engine(make_runner=SlowRunner)
        if gathers:
            engine.gather_with(StepCurve([StepCost(1, 0, 0.005), StepCost(64, 0, 0.005)]))
        with running(engine):
            found.append(decode_all(engine, jobs))
        num_passes.append(runner.num_passes)
    assert found[0] == found[1]
    assert 60 <= num_passes[1] < 90, "not all were in most passes"


def test_another_word_for_gathering_is_refused() -> None:
    assert Settings(model=Path("m")).gather == "auto"
    with pytest.raises(InvalidRequest, match="--gather"):
        Settings(model=Path("m"), gather="always")
