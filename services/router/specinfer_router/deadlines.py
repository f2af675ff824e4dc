"""How long a verify worker may take for a round before it counts as hung.

From what its passes were measured to cost: a fixed number is too short for a large model with a
long prompt and too long for a small one. This module knows nothing of workers, links or trees.
"""

from __future__ import annotations

from dataclasses import dataclass

from specinfer.step_curve import StepCurve

# Rows of a pass that a round may have to wait for; prompts of others fill it up.
FULL_PASS_ROWS = 256
PREFILL_ROWS = 64
MAX_DOUBLINGS = 16
# However long the work, a wait ends after so many times what it should cost.
CAP_FACTOR = 4.0


@dataclass(frozen=True)
class RoundWait:
    """One wait for a round.

    Attributes:
        seconds: how long it is.
        last: whether no longer one follows.
    """

    seconds: float
    last: bool


@dataclass(frozen=True)
class StepDeadline:
    """Seconds for a round, unless `fixed_seconds` says them.

        floor + factor * (passes * cost(full pass) + sessions * cost(prefill)), doubled by each miss

    Trees go before prompts, and sessions share a pass: a round waits for the pass that is under way
    and for as many as the trees of all sessions fill. Prompts are read one after the other.

    Attributes:
        fixed_seconds: the same for every round; 0 derives them.
        floor_seconds: for what the measurement does not know: the network, a busy machine.
        factor: how much slower than measured a worker may be.
        cap_seconds: most seconds for one wait, unless the work itself should take a good part of
            them: then CAP_FACTOR times that. A long prompt on a slow machine is not given up.
        grammar_seconds: more for a session that brings a grammar, which is compiled first.
    """

    fixed_seconds: float = 0.0
    floor_seconds: float = 2.0
    factor: float = 8.0
    cap_seconds: float = 120.0
    grammar_seconds: float = 10.0

    @property
    def most_seconds(self) -> float:
        """Longest that a wait for ordinary work can be."""
        return self.fixed_seconds or self.cap_seconds

    def wait(
        self,
        costs: StepCurve,
        *,
        num_rows: int,
        num_prefill: int = 0,
        num_waiting: int = 1,
        num_steps: int = 1,
        num_misses: int = 0,
        with_grammar: bool = False,
    ) -> RoundWait:
        """Seconds for a round, and whether no longer wait will follow.

        Args:
            costs: what the worker measured of itself.
            num_rows: nodes of the tree, root included.
            num_prefill: tokens to be computed before them.
            num_waiting: sessions that may be served first, ours included.
            num_steps: passes that the round takes, one after the other.
            num_misses: waits for the same round that were over already.
            with_grammar: whether the worker has to compile a grammar first.
        """
        if self.fixed_seconds:
            return RoundWait(num_steps * self.fixed_seconds, last=True)
        sessions = max(1, num_waiting)
        cost = _num_passes(num_rows, sessions) * costs.at(max(num_rows, FULL_PASS_ROWS))
        cost *= num_steps
        cost += sessions * num_prefill * costs.at(PREFILL_ROWS) / PREFILL_ROWS
        seconds = self.floor_seconds + self.factor * cost
        seconds += self.grammar_seconds if with_grammar else 0.0
        seconds *= 2.0 ** min(num_misses, MAX_DOUBLINGS)
        most = max(self.cap_seconds, CAP_FACTOR * cost)
        return RoundWait(min(most, seconds), last=seconds >= most)


def work_of(num_rows: int, num_waiting: int) -> tuple[int, int]:
    """The same for rounds that may take as long, where nothing is to be prefilled."""
    return _num_passes(num_rows, max(1, num_waiting)), max(num_rows, FULL_PASS_ROWS)


def _num_passes(num_rows: int, sessions: int) -> int:
    return 1 + -(-num_rows * sessions // FULL_PASS_ROWS)
