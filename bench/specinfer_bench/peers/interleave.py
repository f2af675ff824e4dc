"""Runs every task in every arm, in turn, and drops an arm that fails.

The machine's speed wanders within minutes, so only runs side by side compare; the order turns with
each task, since what runs second finds warmer caches. This module knows no engine.
"""

from __future__ import annotations

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


def run_all(
    arms: Mapping[str, Arm],
    tasks: Sequence[Task],
    repeats: int,
    progress: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Warm every arm up with the first task, then run all tasks `repeats` times.

    Args:
        arms: by name; one that raises is left out from then on.
        tasks: what to run.
        repeats: how often.
        progress: called with the name of an arm before each of its runs.
    """
    failed: dict[str, str] = {}
    answers: dict[str, list[list[Answer]]] = {name: [] for name in arms}

    def run(name: str, task: Task) -> Answer | None:
        if name in failed:
            return None
        progress(name)
        try:
            return arms[name].run(task)
        except (SpecinferError, RuntimeError, ValueError, OSError) as error:
            failed[name] = f"{type(error).__name__}: {error}"
            return None

    for name in arms:
        run(name, replace(tasks[0], max_tokens=min(WARM_UP_TOKENS, tasks[0].max_tokens)))
    for _ in range(repeats):
        for name in arms:
            answers[name].append([])
        for index, task in enumerate(tasks):
            for name in _turned(list(arms), index):
                if (answer := run(name, task)) is not None:
                    answers[name][-1].append(answer)
    return Outcome({name: answers[name] for name in arms if name not in failed}, failed)


def _turned(names: list[str], steps: int) -> list[str]:
    first = steps % len(names)
    return names[first:] + names[:first]
