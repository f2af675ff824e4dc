"""A propose that is on its way: whom it was put to, what it asks, and when the answers came.

Sending and waiting are apart, so that a round's propose goes out while the last round is still
being committed. This module knows nothing of pools, hedging or what is done with an answer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from specinfer.messages import DraftResult, ShapeQuery
from specinfer_router.answer import Answer
from specinfer_router.guess import Guess
from specinfer_router.worker_links import DraftLink


@dataclass(eq=False)
class Place:
    """A session at one drafter.

    Attributes:
        link: to the drafter.
        generation: the connection that the drafter knows the session by.
        known_len: tokens it was told of.
        late: an answer that did not come in time, or None.
        left: whether it was given up.
    """

    link: DraftLink
    generation: int
    known_len: int = 0
    late: Answer[DraftResult] | None = None
    left: bool = False

    @property
    def usable(self) -> bool:
        """Whether the drafter still knows the session by this connection."""
        return self.link.connected and self.link.generation == self.generation

    @property
    def waiting(self) -> bool:
        """Whether an answer is still to come that nobody waits for."""
        return self.late is not None and not self.late.done


@dataclass(eq=False)
class Ask:
    """A propose at one drafter; times are of time.monotonic().

    Attributes:
        place: whom it was put to.
        answer: the tree to come.
        ticket: of the drafter's breaker.
        asked: when it was sent.
        after_prefill: whether the drafter has to read the whole session first.
        hedge: whether another drafter was asked before.
    """

    place: Place
    answer: Answer[DraftResult]
    ticket: int | None
    asked: float
    after_prefill: bool
    hedge: bool

    @property
    def silent(self) -> bool:
        """Whether the drafter has said nothing at all since."""
        return self.place.link.heard < self.asked

    @property
    def seconds(self) -> float:
        """How long the answer took, once it is there."""
        return (self.answer.arrived or time.monotonic()) - self.asked


class Question(NamedTuple):
    """What one round asks, of whichever drafter; times are of time.monotonic()."""

    token_ids: Sequence[int]
    epoch: int
    shape: ShapeQuery
    start: float
    deadline: float
    traceparent: str


class Asking(NamedTuple):
    """One round's propose, to be waited for or dropped.

    Attributes:
        question: what was asked.
        guess: the answer where nobody had to be asked, or None.
        asks: whom it was put to; a hedge joins while the round waits.
    """

    question: Question
    guess: Guess | None
    asks: list[Ask]
