"""Runs every task in every arm, in turn, and drops an arm that fails.

The machine's speed wanders within seconds, so only runs side by side compare, and an arm's turn is
one task. It begins with a short request that counts for nothing: while others run, the system takes
an engine's pages and caches away, and who rested longest would pay most. Every second task goes
through the arms backwards, so that what drifts evenly is the same for all. This module knows no
engine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from specinfer.errors import SpecinferError
from specinfer_bench.peers.peer import Answer, Arm, Task

WARM_UP_TOKENS = 8
Answers = Sequence[Sequence[Answer]]
"""Answers of one arm: `[repeat][task]`."""


@dataclass(frozen=True)
class Outcome:
    """What the arms gave.

    Attributes:
        answers: by arm, of those that answered every task.
        failed: by arm, why it was dropped.
    """

    answers: Mapping[str, Answers]
    failed: Mapping[str, str]


def joined(former: Outcome | None, outcome: Outcome) -> Outcome:
    """What the arms gave before and now; one that failed once, or was not there, is left out."""
    if former is None:
        return outcome
    failed = {**former.failed, **outcome.failed}
    answers = {
        name: [*known, *outcome.answers[name]]
        for name, known in former.answers.items()
        if name in outcome.answers and name not in failed
    }
    return Outcome(answers, failed)


def run_all(
    arms: Mapping[str, Arm],
    warm_up: Task,
    tasks: Sequence[Task],
    repeats: int,
    progress: Callable[[str], None] = lambda _: None,
    *,
    max_seconds: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Run all tasks in every arm, one arm after the other for each task, `repeats` times.

    After the first task, only as many as fit into the time: of the last repeat some may be missing.

    Args:
        arms: by name; one that raises is left out from then on.
        warm_up: what begins each turn, cut to WARM_UP_TOKENS; none of the tasks, for an engine may
            remember a prompt.
        tasks: what is measured.
        repeats: how often.
        progress: called with the name of an arm before each of its turns.
        max_seconds: for all of it; a task begins when one like the last still fits.
        clock: seconds.
    """
    failed: dict[str, str] = {}
    answers: dict[str, list[list[Answer]]] = {name: [] for name in arms}
    short = replace(warm_up, max_tokens=min(WARM_UP_TOKENS, warm_up.max_tokens))
    turns = [(place, task) for _ in range(repeats) for place, task in enumerate(tasks)]
    begun = last = clock()
    for turn, (place, task) in enumerate(turns):
        now = clock()
        if turn and now + (now - last) > begun + max_seconds:
            break
        last = now
        for name in list(arms) if turn % 2 == 0 else reversed(list(arms)):
            if name in failed:
                continue
            progress(name)
            try:
                arms[name].run(short)
                answer = arms[name].run(task)
            except (SpecinferError, RuntimeError, ValueError, OSError) as error:
                failed[name] = f"{type(error).__name__}: {error}"
                continue
            if place == 0:
                answers[name].append([])
            answers[name][-1].append(answer)
    return Outcome({name: answers[name] for name in arms if name not in failed}, failed)
