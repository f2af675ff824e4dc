"""Which roots go along into a pass before they are asked for.

A session that decodes plainly asks for its root's row alone, and under MATCH the next root is known
when the last one is answered. While the answer travels to the router and the next step comes back,
the engine computes that root; the step that comes finds its answer there, so that plain decoding
waits for passes only and not for the wire. Whatever else comes (a tree with guesses, the session
opened anew) takes the unasked step back and changes no token.

Only where rows are cheap: one that nobody asks for any more, the last of a text, then costs nobody
much. This module knows nothing of tensors, futures or what a pass computes.
"""

from __future__ import annotations

from collections.abc import Collection

from specinfer.messages import VerifyResult
from specinfer.step_curve import StepCurve
from specinfer.tree import TokenTree
from specinfer_verify.checks import Limits
from specinfer_verify.session import Session

# Steps in a row without guesses after which the next one is expected to have none either.
PLAIN_STEPS = 2
# A pass with such rows costs at most so many times a pass of one row.
CHEAP = 1.25


class RootsAhead:
    """Chooses them for one engine, and counts them.

    Attributes:
        num_computed: roots computed before they were asked for.
        num_used: those of them that were asked for.

    Args:
        limits: of the engine.
        max_rows: most rows of a pass that has such roots; 0 never computes one.
    """

    def __init__(self, limits: Limits, max_rows: int = 0) -> None:
        self.num_computed = self.num_used = 0
        self._limits = limits
        self._max_rows = max_rows

    def chosen(self, sessions: Collection[Session]) -> list[Session]:
        """Sessions whose roots join the next pass; all that could or nobody.

        Some without the others would be answered at another time than they, and the weights be
        read twice for each round.
        """
        if not self._max_rows:
            return []
        ready = [session for session in sessions if self._ready(session)]
        waiting = sum(len(session.pending.tree) for session in sessions if session.pending)
        return ready if waiting + len(ready) <= self._max_rows else []

    def keep(self, session: Session, result: VerifyResult) -> None:
        """Have a session's unasked result there for the step that comes."""
        self.num_computed += 1
        session.pending, session.ahead = None, result

    def take(self, session: Session, epoch: int, tree: TokenTree) -> VerifyResult | None:
        """The result of a step that just came, where it is there already."""
        result = session.take_ahead(epoch, tree)
        self.num_used += result is not None
        return result

    def _ready(self, session: Session) -> bool:
        return (
            session.num_plain_steps >= PLAIN_STEPS
            and session.pending is None
            and session.ahead is None
            and session.grammar is None
            and session.num_missing == 0
            and not self._limits.end_at(session.state.token_ids)
        )


def cheap_rows(costs: StepCurve, max_rows: int) -> int:
    """The most rows up to which a pass costs about as much as one of a single row."""
    most = CHEAP * costs.at(1)
    return max(count for count in range(1, max_rows + 1) if costs.at(count) <= most)
