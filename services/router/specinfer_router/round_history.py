"""What one session's rounds tell about its next one, and what they add to the common knowledge.

This module knows nothing of shapes, links or the store.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from specinfer_router.calibration import Calibration, DrafterRecord
from specinfer_router.crowd import tellers
from specinfer_router.seats import Checked, Guess

OWN_WEIGHT = 0.1
IDLE_WEIGHT = 0.02
MAX_SHIFT = 2.0
LEAST_CHANCE = 0.01


class RoundLoad(NamedTuple):
    """What a round was planned for.

    Attributes:
        num_sessions: sessions that shared the target.
        num_drafting: sessions that were to be drafted for.
        probe: whether the round was planned to see what a guess brings, not because it would pay.
    """

    num_sessions: int = 1
    num_drafting: int = 1
    probe: bool = False


class RoundHistory:
    """A session's rounds so far.

    Attributes:
        context_len: tokens committed.
        speculating: whether the last round was planned with guesses; None before the first.
        load: what the last round was planned for.
    """

    def __init__(self, calibration: Calibration, *, temperature: float, context_len: int) -> None:
        """Begin a session of `context_len` tokens that draws at `temperature`."""
        self.context_len = context_len
        self.speculating: bool | None = None
        self.load = RoundLoad()
        self._calibration = calibration
        self._temperature = temperature
        self._drafter = ""
        # How much more often guesses were right than usual, on average, the latest ones most.
        self._surprise = 0.0
        self._num_rounds = 0
        # Sessions of a crowd begin to count at different places, so as to tell of different passes,
        # whether they came at once or one with each pass.
        self._place = calibration.places.next()
        self._paused = False

    @property
    def record(self) -> DrafterRecord:
        """What is known of this session's drafter."""
        return self._calibration.record(self._drafter, self._temperature)

    @property
    def shift(self) -> float:
        """How much more often than usual this session's guesses are right, in log odds."""
        usual = self.record.snapshot.overall
        shift = _log_odds(usual + self._surprise) - _log_odds(usual)
        return max(-MAX_SHIFT, min(MAX_SHIFT, shift))

    def observe(
        self, guess: Guess, checked: Checked, *, context_len: int, load: RoundLoad | None = None
    ) -> None:
        """Take in a round: what was guessed and confirmed.

        In a crowd a session tells one of so many rounds (`crowd.tellers`): what a pass took all who
        were in it know, and of guesses there are more than are worth counting. A probe's is told.

        Args:
            guess: what the drafter brought.
            checked: what the target said to it.
            context_len: tokens committed after it.
            load: what it was planned for, where another one has been planned since.
        """
        self.context_len = context_len
        self._num_rounds += 1
        self._drafter = guess.drafter or self._drafter
        paused, self._paused = self._paused, not guess.drafter
        load = load or self.load
        each = tellers(load.num_sessions)
        in_turn = not (self._num_rounds + int(self._place * each)) % each
        if in_turn:
            self._observe_pass(guess, checked, each)
        if not guess.drafter:
            self._surprise *= 1.0 - IDLE_WEIGHT
        elif in_turn or load.probe:
            self._observe_guess(guess, checked, load, each, after_pause=paused or load.probe)

    def _observe_pass(self, guess: Guess, checked: Checked, each: int) -> None:
        """Tell of the target's pass, for `each` sessions."""
        result = checked.result
        # The first pass reads the prompt, and nobody knows how much of it; nor what shared each of
        # several passes.
        alone = len(result.token_ids) == len(result.accepted) + 1
        if self._num_rounds > 1 and alone and result.compute_seconds > 0:
            away = checked.seconds - result.compute_seconds - result.queue_seconds
            self._calibration.observe_pass(
                result.num_rows,
                self.context_len,
                result.compute_seconds,
                share=min(1.0, each * len(guess.tree) / max(1, result.num_rows)),
                overhead_seconds=away,
            )

    def _observe_guess(
        self, guess: Guess, checked: Checked, load: RoundLoad, each: int, *, after_pause: bool
    ) -> None:
        record = self.record
        usual = record.snapshot.overall
        outcomes = record.observe(
            guess.tree,
            checked.result.accepted,
            guess.num_draft_nodes,
            num_sessions=load.num_sessions // each,
            # Between as many as it stands for, which one guess cannot, and itself, which would take
            # so much longer to notice a change (one of two counts once). A probe stands for nobody.
            weight=1 if load.probe else round(math.sqrt(each)),
            after_pause=after_pause,
        )
        for right in outcomes:
            self._surprise += OWN_WEIGHT * (right - usual - self._surprise)
        levels = max(1, guess.draft_depth)
        seconds = guess.seconds / record.slowness(load.num_drafting)
        # What read a prompt too says at least that a tree takes no longer than that.
        if not guess.after_prefill or seconds < record.cost.seconds(levels):
            record.cost.observe(levels, seconds, after_pause=after_pause)


def _log_odds(chance: float) -> float:
    chance = min(max(chance, LEAST_CHANCE), 1.0 - LEAST_CHANCE)
    return math.log(chance / (1.0 - chance))
