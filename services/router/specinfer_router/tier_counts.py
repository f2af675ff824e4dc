"""What the sessions of a router met at the workers of one tier, in numbers.

Whoever meets it says so here; whoever shows it reads it. This module knows nothing of links, rounds
or Prometheus.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from specinfer.messages import DraftResult
from specinfer_router.answer import Answer


@dataclass(frozen=True)
class TierCounts:
    """Numbers of one tier since the router began.

    Attributes:
        moves: sessions that left a worker, by what it did.
        wasted: guessed tokens that were never verified, by reason.
    """

    moves: Counter[str] = field(default_factory=Counter)
    wasted: Counter[str] = field(default_factory=Counter)

    def waste(self, answer: Answer[DraftResult], reason: str) -> None:
        """Note the guesses of an answer that nobody waits for any more, once it comes."""

        def note() -> None:
            if not answer.failed:
                self.wasted[reason] += answer.result.tree.num_draft_tokens

        answer.watch(note)
