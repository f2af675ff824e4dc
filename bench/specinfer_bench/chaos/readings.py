"""What was read of streams, and what that says: failures, differences and pauses.

This module knows nothing of clusters, clients or faults.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

MAX_COMPLAINTS = 5


@dataclass(frozen=True)
class Case:
    """One request, which has one right answer.

    Attributes:
        prompt: text to continue.
        temperature: 0 is greedy.
        seed: decides the noise.
        max_tokens: tokens of the answer; the model's end does not end it.
    """

    prompt: str
    temperature: float
    seed: int
    max_tokens: int


@dataclass(frozen=True)
class Answer:
    """What the unbroken run of a case gave."""

    token_ids: tuple[int, ...]
    text: str


@dataclass
class Reading:
    """What one client read of one stream, over as many connections as it took.

    Attributes:
        client: which door it came by and its number, such as "grpc 3".
        case: what was asked.
        begun, ended: of the request, by time.monotonic(); `ended` is None while it runs.
        times: when each event with tokens or text came.
        token_ids: tokens, or None of a client that sees text alone.
        text: text so far.
        error: why it failed, or "".
        breaks: connections that broke meanwhile.
    """

    client: str
    case: Case
    begun: float
    ended: float | None = None
    times: list[float] = field(default_factory=list)
    token_ids: list[int] | None = None
    text: str = ""
    error: str = ""
    breaks: int = 0

    def overlaps(self, begin: float, end: float) -> bool:
        """Whether it ran at some moment between the two."""
        return self.begun <= end and (self.ended is None or self.ended >= begin)

    def pause(self, begin: float, end: float) -> float:
        """The longest silence between two of its events that touches that time; 0 without one."""
        return max(
            (
                late - early
                for early, late in pairwise(self.times)
                if early <= end and late >= begin
            ),
            default=0.0,
        )

    def complaint(self, right: Answer) -> str:
        """Where it differs from the unbroken run, or ""."""
        if self.token_ids is not None and tuple(self.token_ids) != right.token_ids:
            place = _first_difference(self.token_ids, right.token_ids)
            return f"{self.client}: {len(self.token_ids)} tokens, token {place} is another"
        if self.text != right.text:
            place = _first_difference(self.text, right.text)
            return f"{self.client}: {len(self.text)} characters, character {place} is another"
        return ""


@dataclass(frozen=True)
class Verdict:
    """What users noticed while something was wrong.

    Attributes:
        num_running: streams under way when it began.
        num_requests: requests that ran at some moment of it.
        num_failed: those that ended with an error.
        num_different: those with a token, or of clients without tokens a character, that the
            unbroken run does not have there.
        num_breaks: connections that broke and were followed by another.
        pause_p50, pause_p99: over those requests, of the longest silence of each, in seconds.
        first_p99: longest wait for the first event among requests begun meanwhile, all but one in
            a hundred, in seconds.
        complaints: some of what was wrong, for people.
    """

    num_running: int
    num_requests: int
    num_failed: int
    num_different: int
    num_breaks: int
    pause_p50: float
    pause_p99: float
    first_p99: float
    complaints: tuple[str, ...]

    @property
    def clean(self) -> bool:
        """Whether nobody noticed more than a pause."""
        return self.num_failed == 0 and self.num_different == 0 and self.num_requests > 0


def judge(
    readings: Sequence[Reading], right: Mapping[Case, Answer], begin: float, end: float
) -> Verdict:
    """Hold everything that was read against the unbroken runs; pauses from `begin` to `end`.

    Readings outside of that time are held to their tokens all the same.
    """
    failed = [f"{one.client}: {one.error}" for one in readings if one.error]
    different = [
        complaint
        for one in readings
        if not one.error and (complaint := one.complaint(right[one.case]))
    ]
    during = [one for one in readings if one.overlaps(begin, end)]
    pauses = [one.pause(begin, end) for one in during if one.times]
    firsts = [one.times[0] - one.begun for one in during if one.begun >= begin and one.times]
    return Verdict(
        num_running=sum(one.overlaps(begin, begin) for one in readings),
        num_requests=len(during),
        num_failed=len(failed),
        num_different=len(different),
        num_breaks=sum(one.breaks for one in readings),
        pause_p50=percentile(pauses, 0.5),
        pause_p99=percentile(pauses, 0.99),
        first_p99=percentile(firsts, 0.99),
        complaints=tuple([*failed, *different][:MAX_COMPLAINTS]),
    )


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least that share of all does not exceed; 0 of none."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3)


def _first_difference(left: Sequence[object], right: Sequence[object]) -> int:
    for place, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return place
    return min(len(left), len(right))
