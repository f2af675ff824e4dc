"""What the last requests did, round by round, for whoever asks where the time went.

Bounded in requests, in rounds of each and in rounds of all. This module knows nothing of how
requests are served.
"""

from __future__ import annotations

import re
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from specinfer.errors import NotFound, SpecinferError
from specinfer.messages import (
    Finished,
    GenerateEvent,
    RequestReport,
    RoundFacts,
    RoundReport,
    Started,
    Timings,
    TokensEvent,
)

MAX_REQUESTS = 1_000
MAX_ROUNDS = 1_000
MAX_ALL_ROUNDS = 50_000
RUNNING = "running"

# The fields of a RoundReport, which is made of them when somebody asks.
_Round = tuple[int, int, float, float, RoundFacts]


@dataclass
class _Rounds:
    """How many rounds a log keeps, of all its requests."""

    count: int = 0


@dataclass
class RequestLogEntry:
    """One request as it goes on.

    Attributes:
        request_id: id of the request.
        key_id: API key that it belongs to, or "".
        arrived: when it came, on the log's clock.
        arrived_at: when it came, in seconds since 1970.
        kept: what its rounds are counted in; its own once it is forgotten.
    """

    request_id: str
    key_id: str
    arrived: float
    arrived_at: float
    clock: Callable[[], float]
    session_id: str = ""
    outcome: str = RUNNING
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    queue_seconds: float = 0.0
    prepare_seconds: float = 0.0
    first_token_seconds: float = 0.0
    total_seconds: float = 0.0
    rounds: deque[_Round] = field(default_factory=lambda: deque(maxlen=MAX_ROUNDS))
    kept: _Rounds = field(default_factory=_Rounds)
    _end: str = ""

    @property
    def seconds(self) -> float:
        """Time since the request came."""
        return self.clock() - self.arrived

    @property
    def timings(self) -> Timings:
        """Where the time went so far."""
        total = self.total_seconds or self.seconds
        return Timings(self.queue_seconds, self.prepare_seconds, self.first_token_seconds, total)

    def admitted(self, queue_seconds: float) -> None:
        """Note how long it waited for its place."""
        self.queue_seconds = queue_seconds

    def add(self, event: GenerateEvent) -> None:
        """Note an event at the moment it was made."""
        if isinstance(event, TokensEvent):
            self._add_round(event)
        elif isinstance(event, Started):
            self.session_id = event.session_id
            self.num_prompt_tokens = event.num_prompt_tokens
            self.prepare_seconds = max(0.0, self.seconds - self.queue_seconds)
        elif isinstance(event, Finished):
            self.num_cached_tokens = event.usage.num_cached_tokens

    def told(self, event: GenerateEvent) -> None:
        """Note an event at the moment its reader takes it."""
        if isinstance(event, Finished):
            self._end = event.reason

    def failed(self, error: SpecinferError) -> None:
        """Note that it ends with an error."""
        self._end = error.reason.lower()

    def ended(self) -> None:
        """Note that it has ended, as it was said to or else by its reader's leaving."""
        self.outcome = self._end or "cancelled"
        self.total_seconds = self.seconds

    def report(self) -> RequestReport:
        """All of it."""
        return RequestReport(
            request_id=self.request_id,
            session_id=self.session_id,
            outcome=self.outcome,
            arrived_at=self.arrived_at,
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=self.num_cached_tokens,
            timings=self.timings,
            rounds=tuple(RoundReport(*one) for one in self.rounds),
        )

    def _add_round(self, event: TokensEvent) -> None:
        now, took = self.seconds, round_seconds(event.round)
        self.first_token_seconds = self.first_token_seconds or now
        start = max(0.0, now - took)
        self.kept.count += len(self.rounds) < MAX_ROUNDS
        self.rounds.append((event.offset, len(event.token_ids), start, took, event.round))


class RequestLog:
    """The last requests by id; the oldest are forgotten."""

    def __init__(
        self,
        *,
        max_requests: int = MAX_REQUESTS,
        max_rounds: int = MAX_ALL_ROUNDS,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._max_requests = max_requests
        self._max_rounds = max_rounds
        self._clock = clock
        self._rounds = _Rounds()
        # By key and request id: nobody hides another key's request behind the same id.
        self._entries: OrderedDict[tuple[str, str], RequestLogEntry] = OrderedDict()

    def begin(self, request_id: str, key_id: str) -> RequestLogEntry:
        """An entry for a request that has just come; `keep` makes it be found."""
        return RequestLogEntry(request_id, key_id, self._clock(), time.time(), self._clock)

    def keep(self, entry: RequestLogEntry) -> None:
        """Remember a request that was admitted; one of its key with the same id is replaced."""
        name = (entry.key_id, entry.request_id)
        if name in self._entries:
            self._forget(self._entries.pop(name))
        self._entries[name] = entry
        self._rounds.count += len(entry.rounds)
        entry.kept = self._rounds
        while len(self._entries) > 1 and (
            len(self._entries) > self._max_requests or self._rounds.count > self._max_rounds
        ):
            self._forget(self._entries.popitem(last=False)[1])

    def _forget(self, entry: RequestLogEntry) -> None:
        # It may still be running, and goes on counting for itself alone.
        self._rounds.count -= len(entry.rounds)
        entry.kept = _Rounds(len(entry.rounds))

    def find(self, identity: str, key_id: str) -> RequestReport:
        """The report of a request by its own id, that of its session or of its answer over HTTP.

        Raises:
            NotFound: it is unknown, forgotten, or another key's.
        """
        # A call with several choices runs as many requests; the first one stands for it.
        names = ((key_id, identity), (key_id, f"{identity}-0"))
        entry = next((self._entries[name] for name in names if name in self._entries), None)
        if entry is None:
            # The ids of answers over HTTP end with their session's.
            sessions = (identity, re.split("[-_]", identity)[-1])
            own = (e for e in reversed(self._entries.values()) if e.key_id == key_id)
            entry = next((e for e in own if e.session_id in sessions), None)
        if entry is None:
            raise NotFound(
                f"no request {identity!r} among the last {self._max_requests} of this router",
                field="request_id",
            )
        return entry.report()


def round_seconds(facts: RoundFacts) -> float:
    """What a round took in all."""
    return (
        facts.draft_seconds
        + facts.verify_seconds
        + facts.queue_seconds
        + facts.network_seconds
        + facts.router_seconds
    )
