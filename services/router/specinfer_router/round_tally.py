"""A session's counts over its rounds, for its last event. Knows nothing of how rounds are made."""

from __future__ import annotations

from collections import Counter
from itertools import accumulate

from specinfer.messages import RoundFacts, SpeculationSummary


class RoundTally:
    """Counts over a session's rounds."""

    def __init__(self) -> None:
        self._num_rounds = self._num_drafts = self._num_draft_tokens = 0
        # Rounds by how many guesses were confirmed.
        self._accepted: Counter[int] = Counter()
        self._reasons: Counter[str] = Counter()

    def add(self, facts: RoundFacts) -> None:
        """Count one round."""
        self._num_rounds += 1
        if facts.root_only_reason:
            self._reasons[facts.root_only_reason] += 1
        if facts.num_draft_tokens:
            self._num_drafts += 1
            self._num_draft_tokens += facts.num_draft_tokens
        if facts.num_accepted_tokens:
            self._accepted[facts.num_accepted_tokens] += 1

    def summary(self) -> SpeculationSummary:
        """The counts so far."""
        # A guess at some depth was confirmed in every round that confirmed so many or more.
        deepest = max(self._accepted, default=0)
        per_pos = accumulate(self._accepted[depth] for depth in range(deepest, 0, -1))
        num_accepted_per_pos = tuple(per_pos)[::-1]
        return SpeculationSummary(
            num_rounds=self._num_rounds,
            num_drafts=self._num_drafts,
            num_draft_tokens=self._num_draft_tokens,
            num_accepted_tokens=sum(num_accepted_per_pos),
            num_accepted_tokens_per_pos=num_accepted_per_pos,
            root_only_reasons=tuple(sorted(self._reasons.items())),
        )
