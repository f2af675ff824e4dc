"""Every metric of specinfer: its name, unit and meaning, in one place. Needs the `router` extra.

The four speculation counters are vLLM's under our prefix. The mean number of tokens a round is

    1 + rate(specinfer_spec_decode_num_accepted_tokens_total[5m])
        / rate(specinfer_spec_decode_num_drafts_total[5m])

and the acceptance rate of guesses is accepted tokens over draft tokens. This module knows nothing
of sessions or workers.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from specinfer.messages import Finished, RoundFacts

# Deeper guesses are counted with the deepest: a label may not take any number of values.
MAX_POSITION = 32
_FAST = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SLOW = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
_TOKENS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)


class RouterMetrics:
    """What a router counts. All metrics carry the label `model_name`."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        """Register everything; a registry takes one router."""
        self._registry = registry
        self._model = model_name
        self._num_drafts = self._counter(
            "spec_decode_num_drafts", "Rounds with at least one guessed token."
        )
        self._num_draft_tokens = self._counter(
            "spec_decode_num_draft_tokens", "Tokens that drafters guessed."
        )
        self._num_accepted = self._counter(
            "spec_decode_num_accepted_tokens", "Guessed tokens that the target confirmed."
        )
        self._per_pos = Counter(
            "specinfer_spec_decode_num_accepted_tokens_per_pos",
            "Guessed tokens that the target confirmed, by depth in the tree, depth 1 as 0.",
            ("model_name", "position"),
            registry=registry,
        )
        self._root_only = Counter(
            "specinfer_root_only_rounds",
            "Rounds without a guess, by reason.",
            ("model_name", "reason"),
            registry=registry,
        )
        self._round_seconds = Histogram(
            "specinfer_round_seconds",
            "Time of a round by part: draft, verify, queue, network, router.",
            ("model_name", "part"),
            buckets=_FAST,
            registry=registry,
        )
        self._round_tokens = self._histogram(
            "tokens_per_round", "Tokens that one round brought.", _TOKENS
        )
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first tokens.", _SLOW
        )
        self._request_seconds = self._histogram(
            "e2e_request_latency_seconds", "From a request's arrival to its end.", _SLOW
        )
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self._cached_tokens = self._counter(
            "cached_prompt_tokens", "Tokens of prompts found in a prefix cache."
        )
        self._generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self._sessions = Gauge(
            "specinfer_num_sessions_running",
            "Sessions in progress.",
            ("model_name",),
            registry=registry,
        ).labels(model_name)
        self._requests = Counter(
            "specinfer_requests",
            "Requests ended, by outcome: a finish reason or an error's reason.",
            ("model_name", "outcome"),
            registry=registry,
        )

    def observe_round(self, facts: RoundFacts, num_tokens: int) -> None:
        """Count one committed round."""
        if facts.root_only_reason:
            self._root_only.labels(self._model, facts.root_only_reason).inc()
        if facts.num_draft_tokens:
            self._num_drafts.inc()
            self._num_draft_tokens.inc(facts.num_draft_tokens)
            self._num_accepted.inc(facts.num_accepted_tokens)
        for position in range(facts.num_accepted_tokens):
            self._per_pos.labels(self._model, min(position, MAX_POSITION)).inc()
        for part, seconds in (
            ("draft", facts.draft_seconds),
            ("verify", facts.verify_seconds),
            ("queue", facts.queue_seconds),
            ("network", facts.network_seconds),
            ("router", facts.router_seconds),
        ):
            self._round_seconds.labels(self._model, part).observe(seconds)
        self._round_tokens.observe(num_tokens)
        self._generation_tokens.inc(num_tokens)

    def observe_first_token(self, seconds: float) -> None:
        """Count the wait for a request's first tokens."""
        self._first_token.observe(seconds)

    def session_started(self) -> None:
        """Count a session in."""
        self._sessions.inc()

    def session_ended(self) -> None:
        """Count a session out."""
        self._sessions.dec()

    def observe_finished(self, finished: Finished) -> None:
        """Count the tokens of a request that ran to its end."""
        self._prompt_tokens.inc(finished.usage.num_prompt_tokens)
        self._cached_tokens.inc(finished.usage.num_cached_tokens)

    def observe_request(self, outcome: str, seconds: float) -> None:
        """Count a request that ended in whatever way."""
        self._requests.labels(self._model, outcome).inc()
        self._request_seconds.observe(seconds)

    def watch_waiting(self, num_waiting: Callable[[], int]) -> None:
        """Report how many requests wait for a place, asked at each scrape."""
        gauge = Gauge(
            "specinfer_num_requests_waiting",
            "Requests that wait for a place.",
            ("model_name",),
            registry=self._registry,
        )
        gauge.labels(self._model).set_function(num_waiting)

    def watch_workers(self, tier: str, num_ready: Callable[[], int]) -> None:
        """Report how many workers of a tier are ready, asked at each scrape."""
        gauge = Gauge(
            f"specinfer_num_{tier}_workers_ready",
            f"Workers of the {tier} tier that take sessions.",
            ("model_name",),
            registry=self._registry,
        )
        gauge.labels(self._model).set_function(num_ready)

    def _counter(self, name: str, meaning: str) -> Counter:
        counter = Counter(f"specinfer_{name}", meaning, ("model_name",), registry=self._registry)
        return counter.labels(self._model)

    def _histogram(self, name: str, meaning: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(
            f"specinfer_{name}",
            meaning,
            ("model_name",),
            buckets=buckets,
            registry=self._registry,
        )
        return histogram.labels(self._model)
