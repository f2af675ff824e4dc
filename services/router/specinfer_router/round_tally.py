"""A session's counts over its rounds, for its last event. Knows nothing of how rounds are made."""

from __future__ import annotations

from collections import Counter

from specinfer.messages import RoundFacts, SpeculationSummary


class RoundTally:
    """Counts over a session's rounds."""

    def __init__(self) -> None:
        self._num_rounds = self._num_drafts = self._num_draft_tokens = 0
        self._per_pos: list[int] = []
        self._reasons: Counter[str] = Counter()

    def add(self, facts: RoundFacts) -> None:
        """Count one round."""
        self._num_rounds += 1
        if facts.root_only_reason:
            self._reasons[facts.root_only_reason] += 1
        if facts.num_draft_tokens:
            self._num_drafts += 1
            self._num_draft_tokens += facts.num_draft_tokens
        missing = facts.num_accepted_tokens - len(self._per_pos)
        self._per_pos.extend([0] * missing)
        for position in range(facts.num_accepted_tokens):
            self._per_pos[position] += 1

    def summary(self) -> SpeculationSummary:
        """The counts so far."""
        return SpeculationSummary(
            num_rounds=self._num_rounds,
            num_drafts=self._num_drafts,
            num_draft_tokens=self._num_draft_tokens,
            num_accepted_tokens=sum(self._per_pos),
            num_accepted_tokens_per_pos=tuple(self._per_pos),
            root_only_reasons=tuple(sorted(self._reasons.items())),
        )
