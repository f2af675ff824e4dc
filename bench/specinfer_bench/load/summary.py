"""From observations to the numbers of a report: pure arithmetic, it runs and prints nothing.

Percentiles are nearest-rank: the smallest value that at least that share of all is not above.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from specinfer.errors import InvalidRequest
from specinfer_bench.load.observation import DONE, DROPPED, FAILED, Observation

# Late is what stood in line in the client, not what a timer sent a little after its time.
LATE_SECONDS = 0.05
MAX_ERRORS = 16


@dataclass(frozen=True)
class Objective:
    """What a request is promised.

    Attributes:
        first_token_seconds: longest time from the scheduled arrival to the first tokens.
        token_seconds: longest mean time of a token after that.

    Raises:
        InvalidRequest: when a time is not more than 0.
    """

    first_token_seconds: float
    token_seconds: float

    def __post_init__(self) -> None:
        if not (self.first_token_seconds > 0 and self.token_seconds > 0):
            raise InvalidRequest("an objective is more than 0 seconds", field="objective")

    def met(self, seen: Observation) -> bool:
        """Whether a request got what was promised; one that failed or was dropped did not."""
        first, token = seen.first_token_seconds, seen.token_seconds
        if seen.outcome != DONE or first is None:
            return False
        return first <= self.first_token_seconds and (token or 0.0) <= self.token_seconds


@dataclass(frozen=True)
class Percentiles:
    """Of some times, in milliseconds; all 0 when there was none.

    Attributes:
        count: number of times.
    """

    count: int
    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Goodput:
    """Requests that met the objective.

    Attributes:
        met: how many.
        share: of all that were scheduled, those that failed or were dropped included.
        per_second: of the run.
    """

    met: int
    share: float
    per_second: float


@dataclass(frozen=True)
class LoadSummary:
    """What a run of some requests gave.

    Attributes:
        scheduled, done, failed, dropped: requests.
        late: requests that were sent more than LATE_SECONDS after their time.
        seconds: from the start of the run to its last end.
        tokens: tokens that came, of all requests.
        tokens_per_second, requests_per_second: over `seconds`; requests are those done.
        first_token_ms: from the scheduled arrival.
        token_ms: mean time of a token after the first event, by request.
        gap_ms: between the events of a stream.
        latency_ms: from the scheduled arrival to the end, of requests done.
        sending_ms: how long after their time requests were sent.
        goodput: under the objective.
        errors: failures by kind and message, the most frequent ones.
    """

    scheduled: int
    done: int
    failed: int
    dropped: int
    late: int
    seconds: float
    tokens: int
    tokens_per_second: float
    requests_per_second: float
    first_token_ms: Percentiles
    token_ms: Percentiles
    gap_ms: Percentiles
    latency_ms: Percentiles
    sending_ms: Percentiles
    goodput: Goodput
    errors: dict[str, int]


def summary(observations: Sequence[Observation], objective: Objective) -> LoadSummary:
    """The numbers of one run; `observations` are all that were scheduled."""
    outcomes = Counter(seen.outcome for seen in observations)
    seconds = max((seen.ended for seen in observations), default=0.0)
    tokens = sum(seen.num_tokens for seen in observations)
    delays = [seen.sent - seen.scheduled for seen in observations if seen.sent is not None]
    met = sum(objective.met(seen) for seen in observations)
    return LoadSummary(
        scheduled=len(observations),
        done=outcomes[DONE],
        failed=outcomes[FAILED],
        dropped=outcomes[DROPPED],
        late=sum(delay > LATE_SECONDS for delay in delays),
        seconds=seconds,
        tokens=tokens,
        tokens_per_second=_rate(tokens, seconds),
        requests_per_second=_rate(outcomes[DONE], seconds),
        first_token_ms=percentiles(seen.first_token_seconds for seen in observations),
        token_ms=percentiles(seen.token_seconds for seen in observations),
        gap_ms=percentiles(gap for seen in observations for gap in seen.gaps),
        latency_ms=percentiles(s.latency_seconds for s in observations if s.outcome == DONE),
        sending_ms=percentiles(delays),
        goodput=Goodput(met, _rate(met, len(observations)), _rate(met, seconds)),
        errors=dict(
            Counter(seen.error for seen in observations if seen.error).most_common(MAX_ERRORS)
        ),
    )


def percentiles(seconds: Iterable[float | None]) -> Percentiles:
    """Of those that are there, in milliseconds."""
    found = sorted(1e3 * value for value in seconds if value is not None)
    if not found:
        return Percentiles(0, 0.0, 0.0, 0.0, 0.0)
    return Percentiles(
        len(found), fmean(found), *(nearest_rank(found, share) for share in (0.5, 0.9, 0.99))
    )


def nearest_rank(ordered: Sequence[float], share: float) -> float:
    """The smallest of some values in order that at least `share` of them are not above."""
    # 0.9 of ten values is nine of them, whatever binary fractions make of it.
    return ordered[max(1, math.ceil(share * len(ordered) - 1e-9)) - 1]


def _rate(number: float, of: float) -> float:
    return number / of if of > 0 else 0.0
