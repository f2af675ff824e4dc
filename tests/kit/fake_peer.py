"""An engine for the comparison that answers at once. Imports nothing heavy: a process loads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from specinfer.errors import Unavailable
from specinfer_bench.peers.peer import Answer, Arm, Pair, Task


class FakePeer:
    """Says a task's own tokens back, or none with the arm "silent"; "broken" fails every time.

    Args:
        failure: why it does not load, if it does not.
    """

    name = "fake"

    def __init__(self, failure: str = "") -> None:
        self._failure = failure

    def missing(self) -> str | None:
        """Always there."""
        return None

    @contextmanager
    def load(self, pair: Pair) -> Iterator[Mapping[str, Arm]]:
        """Three arms; the tokens end with the pair's number of threads."""
        if self._failure:
            raise Unavailable(self._failure)
        print("a library's greeting")

        def echo(task: Task) -> Answer:
            return Answer(len(task.token_ids), 0.5, (*task.token_ids, pair.threads), 0.25)

        yield {
            "echo": Arm(echo, plain=True, seeded=True),
            "silent": Arm(lambda task: Answer(3, 1.5)),
            "broken": Arm(_broken, greedy_only=True),
        }


def _broken(task: Task) -> Answer:
    raise Unavailable("it broke")
