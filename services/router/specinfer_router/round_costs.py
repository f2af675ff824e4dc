"""What a round costs, by what passes, proposes and the way between them cost.

This module knows nothing of who chooses, or of what a round brings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

from specinfer.tree import TokenTree
from specinfer_router.calibration import MAX_LEVELS, Calibration, DrafterRecord
from specinfer_router.crowd import CROWD
from specinfer_router.plain_pace import tokens_within

# Less than this share of a pass decides nothing, and is noise where a cost is learnt from answers.
LEAST_SHARE = 1 / 64
# Costs and contexts that differ by less than this share of an octave make the same choice.
STEPS_AN_OCTAVE = 6


@dataclass(frozen=True)
class RoundCosts:
    """Seconds of a round's parts, as they are when a shape is chosen.

    Attributes:
        calibration: what passes cost.
        num_sessions: sessions that share a pass.
        context_len: keys that each row sees.
        draft_fixed, draft_level: of a propose, and of each level of its tree.
        known_level: of a level, by the drafter's own measurement; 0 when it is not known.
        plain_seconds: for how long a crowd's plain tokens come together.
    """

    calibration: Calibration
    num_sessions: int
    context_len: int
    draft_fixed: float
    draft_level: float
    known_level: float
    plain_seconds: float = 0.0

    @classmethod
    def of(
        cls,
        calibration: Calibration,
        record: DrafterRecord,
        num: int,
        context: int,
        plain_seconds: float = 0.0,
    ) -> Self:
        """For `num` sessions at once of `context` tokens each, drafted for together."""
        slowness = record.slowness(num)
        fixed, level = (slowness * seconds for seconds in record.cost.parts())
        known = slowness * record.cost.known_level
        return cls(calibration, num, context, fixed, level, known, plain_seconds)

    def verify(self, num_nodes: int) -> float:
        """A pass that carries `num_nodes` guesses a session, and what comes with every round."""
        known = self.calibration
        seconds = known.costs.at(self.num_sessions * (num_nodes + 1), self.context_len)
        return seconds + known.overhead_seconds.value

    def plain(self) -> float:
        """A plain token; where several come together, they share what comes with a round."""
        alone = self.verify(0)
        if self.num_sessions <= CROWD:
            return alone
        together = tokens_within(self.plain_seconds, alone)
        return alone - self.calibration.overhead_seconds.value * (1.0 - 1.0 / together)

    def round_of(self, tree: TokenTree, num_tokens: int) -> float:
        """Of a round that has such a tree checked in all sessions, or decodes so many tokens."""
        if tree.num_draft_tokens:
            return self.verify(tree.num_draft_tokens) + self.draft(tree.max_depth)
        return self.verify(0) + (num_tokens - 1) * self.calibration.costs.at(
            self.num_sessions, self.context_len
        )

    def draft(self, depth: int) -> float:
        """A propose of `depth` levels."""
        return self.draft_fixed + depth * self.draft_level

    def steps(self) -> tuple[int, int, int]:
        """The same for contexts and drafters that make the same choice; passes are not in it."""
        least = LEAST_SHARE * self.verify(0)
        drafts = (self.draft_fixed, MAX_LEVELS * self.draft_level)
        fixed, levels = (coarse(seconds if seconds > least else 0.0) for seconds in drafts)
        return coarse(self.context_len), fixed, levels


def coarse(value: float) -> int:
    """The same number for values that differ little."""
    return round(STEPS_AN_OCTAVE * math.log2(value)) if value > 0 else -(10**6)
