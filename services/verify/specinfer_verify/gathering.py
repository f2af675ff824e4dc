"""Whether a pass begins now or waits for sessions that were answered a moment ago.

A pass costs a fixed part, reading the weights, and a part for each row. Sessions that come back
from their drafters one pass late go on so for ever: two groups take turns, the engine is never
idle, and every weight is read twice for each round. So with n sessions waiting and others due
within w seconds,

    wait, if  w + T(rows of both) < T(rows waiting) + T(rows due)

with T as measured, and w by when they are here if they are as punctual as they were. Where a pass
costs what its rows cost, as with many rows, nothing is gained and nobody waits: then two
half-batches keep the engine busy while the other half is drafted.

This module knows nothing of tensors, blocks, clocks or futures.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence

from specinfer.step_curve import StepCurve
from specinfer_verify.session import Absence, Session


class Gathering:
    """Decides for one engine when its next pass begins.

    Attributes:
        costs: what passes cost; None lets every pass begin at once.
        pause: seconds until the next pass begins at the latest, or 0 where nobody waits.

    Args:
        max_rows: rows of the largest pass; more than that would not go along anyway.
    """

    def __init__(self, max_rows: int) -> None:
        self.costs: StepCurve | None = None
        self.pause = 0.0
        self._max_rows = max_rows

    def waits(
        self, now: float, sessions: Collection[Session], ahead: Sequence[Session] = ()
    ) -> bool:
        """Whether the next pass is to begin later, by `pause` at most.

        A prompt is not kept waiting: its pass is long, and whoever comes meanwhile has to wait.

        Args:
            now: the time, on the clock of the sessions.
            sessions: all that are open.
            ahead: those of them whose roots would go along unasked.
        """
        self.pause = 0.0
        here = {session.session_id for session in ahead}
        waiting = [1] * len(here)
        waiting += [len(session.pending.tree) for session in sessions if session.pending]
        away = [
            session.absence
            for session in sessions
            if not session.pending and session.session_id not in here
        ]
        if self.costs is None or not waiting or not away:
            return False
        if not any(session.wants_prefill for session in sessions):
            until = wait_until(now, waiting, away, self.costs, self._max_rows)
            self.pause = max(0.0, until - now)
        return self.pause > 0.0


def wait_until(
    now: float, waiting: Sequence[int], away: Iterable[Absence], costs: StepCurve, max_rows: int
) -> float:
    """When the next pass begins at the latest; `now` or earlier where nobody is worth a wait.

    Args:
        now: the time, on the clock of the absences.
        waiting: rows of each step that could begin now; at least one.
        away: sessions that were answered and have not come back.
        costs: what passes cost.
        max_rows: rows of the largest pass; more than that would not go along anyway.
    """
    rows = sum(waiting)
    alone, best, until = costs.at(rows), 0.0, now
    num_due = 0
    # By until when each is waited for: an unpunctual one that is due first keeps nobody else's.
    for absence in sorted(away, key=lambda one: one.latest):
        if absence.latest <= now or not math.isfinite(absence.latest):
            continue
        num_due += absence.num_rows
        if rows + num_due > max_rows:
            break
        saved = alone + costs.at(num_due) - costs.at(rows + num_due)
        saved -= absence.latest - now
        if saved > best:
            best, until = saved, absence.latest
    return until
