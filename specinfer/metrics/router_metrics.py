"""What a router counts; every name is the catalogue's.

Counting a round takes some tens of microseconds at most and never looks at tokens one by one. This
module knows nothing of sessions or workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from prometheus_client import CollectorRegistry

from specinfer.messages import RoundFacts, Usage
from specinfer.metrics.instruments import Instruments
from specinfer.metrics.metric import Source
from specinfer.metrics.round_counts import RoundCounts, exemplar
from specinfer.metrics.vllm import VllmAliases
from specinfer.telemetry import Span, current_span
from specinfer.tree import TokenTree

NO_KEY = "none"


class RouterMetrics:
    """What a router counts. All metrics carry the label `model_name`."""

    def __init__(
        self,
        registry: CollectorRegistry,
        model_name: str,
        *,
        model_hash: str = "",
        version: str = "",
        vllm_names: bool = False,
    ) -> None:
        """Register everything; a registry takes one router.

        Args:
            registry: what is exposed.
            model_name: the model that is served.
            model_hash: its hash, for `build_info`.
            version: of specinfer, for `build_info`.
            vllm_names: show what vLLM has too under vLLM's names as well.
        """
        instruments = Instruments(registry, Source.ROUTER, {"model_name": model_name})
        self._instruments = instruments
        instruments.watch("build_info", lambda: {(version, Source.ROUTER, model_hash): 1.0})
        self._rounds = RoundCounts(instruments)
        self._draft_round_trip = instruments.histogram("draft_round_trip_seconds").of()
        self._take_requests(instruments)
        self._take_survival(instruments)
        if vllm_names:
            registry.register(VllmAliases(instruments))

    def _take_requests(self, of: Instruments) -> None:
        self._first_token = of.histogram("time_to_first_token_seconds").of()
        self._event_gap = of.histogram("inter_event_seconds").of()
        self._per_token = of.histogram("request_time_per_output_token_seconds").of()
        self._request_seconds = of.histogram("e2e_request_latency_seconds").of()
        self._queue_seconds = of.histogram("request_queue_time_seconds").of()
        self._prompt_tokens = of.counter("prompt_tokens").of()
        self._cached_tokens = of.counter("cached_prompt_tokens").of()
        self._requests = of.counter("requests")
        self._sessions = of.gauge("num_sessions_running").of()
        self._streams = of.gauge("num_streams_running")
        self._key_requests = of.counter("key_requests")
        self._key_tokens = of.counter("key_tokens")

    def _take_survival(self, of: Instruments) -> None:
        self._resumes = of.counter("resumes").of()
        self._takeovers = of.counter("takeovers").of()
        self._lease_losses = of.counter("lease_losses").of()
        self._store_seconds = of.histogram("store_operation_seconds")
        self._store_errors = of.counter("store_errors")

    def observe_round(self, facts: RoundFacts, num_tokens: int) -> None:
        """Count one committed round."""
        self._rounds.observe_round(facts, num_tokens, current_span())

    def observe_tree(
        self,
        tree: TokenTree,
        accepted: Sequence[int],
        *,
        num_draft_nodes: int,
        drafter: str = "",
        worker: str = "",
    ) -> None:
        """Count a round's guesses by rank and by who made them; see `RoundCounts.observe_tree`."""
        self._rounds.observe_tree(
            tree, accepted, num_draft_nodes=num_draft_nodes, drafter=drafter, worker=worker
        )

    def observe_draft_round_trip(self, seconds: float) -> None:
        """Count a tree that came in time."""
        self._draft_round_trip.observe(seconds)

    def claimed(self, *, orphaned: bool) -> None:
        """Count a session that goes on here: asked for by a client, or found without a router."""
        (self._takeovers if orphaned else self._resumes).inc()

    def lease_lost(self) -> None:
        """Count a session that another router took from this one."""
        self._lease_losses.inc()

    def observe_store(self, operation: str, seconds: float, *, failed: bool) -> None:
        """Count one operation of the session store."""
        self._store_seconds.of(operation).observe(seconds)
        if failed:
            self._store_errors.of(operation).inc()

    def worker_left(self, worker: str) -> None:
        """Drop the series of a worker that has left for good."""
        self._instruments.forget("worker", worker)

    def observe_admitted(self, key_id: str, queue_seconds: float) -> None:
        """Count a request that was let in, and its wait."""
        self._queue_seconds.observe(queue_seconds)
        self._key_requests.of(key_id or NO_KEY).inc()

    @contextmanager
    def stream(self, kind: str) -> Iterator[None]:
        """Count a stream as running: "generate", "resume" or "follow"."""
        self._streams.of(kind).inc()
        try:
            yield
        finally:
            self._streams.of(kind).dec()

    @contextmanager
    def session(self, key_id: str) -> Iterator[SessionTimes]:
        """Count a session as running; what comes of it is told to the result."""
        self._sessions.inc()
        try:
            yield SessionTimes(self, key_id)
        finally:
            self._sessions.dec()

    def observe_request(self, outcome: str, seconds: float, span: Span) -> None:
        """Count a request that ended in whatever way; `span` is its own."""
        self._requests.of(outcome).inc()
        self._request_seconds.observe(seconds, exemplar(span))

    def observe_first_event(self, seconds: float) -> None:
        """Count the wait for a request's first tokens."""
        self._first_token.observe(seconds, exemplar(current_span()))

    def observe_event_gap(self, seconds: float) -> None:
        """Count the time between two events of a stream."""
        self._event_gap.observe(seconds)

    def observe_per_token(self, seconds: float) -> None:
        """Count a request's mean time for a token after its first event."""
        self._per_token.observe(seconds)

    def observe_usage(self, usage: Usage, key_id: str) -> None:
        """Count the tokens of a request that ran to its end."""
        key = key_id or NO_KEY
        self._prompt_tokens.inc(usage.num_prompt_tokens)
        self._cached_tokens.inc(usage.num_cached_tokens)
        self._key_tokens.of(key, "prompt").inc(usage.num_prompt_tokens)
        self._key_tokens.of(key, "generation").inc(usage.num_completion_tokens)

    def watch_wasted(self, unused: Callable[[], Mapping[str, float]]) -> None:
        """Ask for guesses that were never verified, by reason, beside those that were rejected."""

        def by_reason() -> dict[tuple[str, ...], float]:
            counts: dict[tuple[str, ...], float] = {("rejected",): self._rounds.num_rejected}
            return counts | {(reason,): count for reason, count in unused().items()}

        self.watch("wasted_draft_tokens", by_reason)

    def watch(self, name: str, read: Callable[[], Mapping[tuple[str, ...], float]]) -> None:
        """Ask `read` for a metric at each scrape, by the values of its labels in order."""
        self._instruments.watch(name, read)

    def watch_one(self, name: str, read: Callable[[], float]) -> None:
        """Ask `read` for a metric without labels of its own at each scrape."""
        self._instruments.watch_one(name, read)


class SessionTimes:
    """The times of one session's events, measured from its request's arrival."""

    def __init__(self, metrics: RouterMetrics, key_id: str) -> None:
        self._metrics = metrics
        self._key_id = key_id
        self._first: float | None = None
        self._last = 0.0
        self._num_tokens = 0

    def event(self, seconds: float, num_tokens: int) -> bool:
        """Take an event in that came after `seconds`; whether it is the first."""
        first = self._first is None
        if self._first is None:
            self._first = seconds
            self._metrics.observe_first_event(seconds)
        else:
            self._metrics.observe_event_gap(seconds - self._last)
            self._num_tokens += num_tokens
        self._last = seconds
        return first

    def finished(self, usage: Usage) -> None:
        """Take in that the text is complete."""
        self._metrics.observe_usage(usage, self._key_id)
        if self._first is not None and self._num_tokens:
            self._metrics.observe_per_token((self._last - self._first) / self._num_tokens)
