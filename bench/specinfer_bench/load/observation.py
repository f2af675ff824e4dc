"""What was seen of one request, and the times that follow from it. Knows nothing of who asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

DONE, FAILED, DROPPED = "done", "failed", "dropped"


@dataclass
class Observation:
    """One request; times are seconds after the start of the run.

    Attributes:
        scheduled: when it was to be sent.
        sent: when it was sent, or None if it never was.
        events: time and number of tokens of each event.
        ended: when its end was seen, or it was given up.
        outcome: done, failed or dropped; "" while it runs.
        error: kind and message of the error that ended it, or "".
        token_ids: tokens generated.
        num_prompt_tokens: tokens of the prompt, as the server counted them.
        told_first_token_seconds, told_seconds: what the server's last event says it took, from the
            request's arrival there to the first tokens and to the end.
    """

    scheduled: float
    sent: float | None = None
    events: list[tuple[float, int]] = field(default_factory=list)
    ended: float = 0.0
    outcome: str = ""
    error: str = ""
    token_ids: list[int] = field(default_factory=list)
    num_prompt_tokens: int = 0
    told_first_token_seconds: float = 0.0
    told_seconds: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Tokens that came."""
        return sum(number for _, number in self.events)

    @property
    def first_token_seconds(self) -> float | None:
        """From the scheduled arrival to the first tokens, waiting in the client included.

        A user who comes while the server is stuck waits from the moment of coming. To count from
        the sending would leave out just the waits that a slow server causes: coordinated omission.
        """
        return self.events[0][0] - self.scheduled if self.events else None

    @property
    def latency_seconds(self) -> float:
        """From the scheduled arrival to the end."""
        return self.ended - self.scheduled

    @property
    def token_seconds(self) -> float | None:
        """Mean time of a token after the first event; None when all came at once."""
        if not self.events:
            return None
        num_later = self.num_tokens - self.events[0][1]
        return (self.events[-1][0] - self.events[0][0]) / num_later if num_later else None

    @property
    def gaps(self) -> list[float]:
        """Times between events."""
        return [later - earlier for (earlier, _), (later, _) in pairwise(self.events)]
