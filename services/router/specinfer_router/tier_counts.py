"""What the sessions of a router met at the workers of one tier, in numbers.

Whoever meets it says so here; whoever shows it reads it. This module knows nothing of links, rounds
or Prometheus.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field

from specinfer.messages import DraftResult


@dataclass(frozen=True)
class TierCounts:
    """Numbers of one tier since the router began.

    Attributes:
        moves: sessions that left a worker, by what it did.
        wasted: guessed tokens that were never verified, by reason.
    """

    moves: Counter[str] = field(default_factory=Counter)
    wasted: Counter[str] = field(default_factory=Counter)

    def waste(self, answer: asyncio.Future[DraftResult], reason: str) -> None:
        """Note the guesses of an answer that nobody waits for any more, once it comes."""

        def note(late: asyncio.Future[DraftResult]) -> None:
            if not late.cancelled() and late.exception() is None:
                self.wasted[reason] += late.result().tree.num_draft_tokens

        answer.add_done_callback(note)
