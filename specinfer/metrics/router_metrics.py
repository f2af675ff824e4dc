"""What a router counts; every name is the catalogue's.

Counting a round takes some tens of microseconds at most and never looks at tokens one by one. This
module knows nothing of sessions or workers.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter

from specinfer.messages import Finished, RoundFacts
from specinfer.metrics.catalogue import MAX_POSITION, PART, RANK
from specinfer.metrics.instruments import Instruments
from specinfer.metrics.metric import Source
from specinfer.metrics.vllm import VllmAliases
from specinfer.tree import TokenTree

PREDICTION = "prediction"
NO_KEY = "none"
_POSITIONS = tuple(str(depth) for depth in range(MAX_POSITION + 1))
_MAX_RANK = len(RANK.values)


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
        self._take_speculation(instruments)
        self._take_rounds(instruments)
        self._take_requests(instruments)
        self._take_survival(instruments)
        if vllm_names:
            registry.register(VllmAliases(instruments))

    def _take_speculation(self, of: Instruments) -> None:
        self._num_drafts = of.counter("spec_decode_num_drafts").of()
        self._num_draft_tokens = of.counter("spec_decode_num_draft_tokens").of()
        self._num_accepted = of.counter("spec_decode_num_accepted_tokens").of()
        accepted = of.counter("spec_decode_num_accepted_tokens_per_pos")
        self._accepted_per_pos = [accepted.of(position) for position in _POSITIONS]
        drafts = of.counter("spec_decode_num_drafts_per_pos")
        self._drafts_per_pos = [drafts.of(position) for position in _POSITIONS]
        self._draft_per_rank = of.counter("spec_decode_num_draft_tokens_per_rank")
        self._accepted_per_rank = of.counter("spec_decode_num_accepted_tokens_per_rank")
        self._drafter_draft = of.counter("drafter_draft_tokens")
        self._drafter_accepted = of.counter("drafter_accepted_tokens")
        self._wasted = of.counter("wasted_draft_tokens")
        self._tree_nodes = of.histogram("tree_nodes").of()
        self._tree_depth = of.histogram("tree_depth").of()
        self._round_tokens = of.histogram("tokens_per_round").of()
        self._root_only = of.counter("root_only_rounds")

    def _take_rounds(self, of: Instruments) -> None:
        parts = of.histogram("round_seconds")
        self._parts = [parts.of(part) for part in PART.values]
        self._round_seconds = of.histogram("round_duration_seconds").of()
        self._draft_round_trip = of.histogram("draft_round_trip_seconds").of()
        self._late_trees = of.counter("late_trees")
        self._hedged = of.counter("hedged_proposes").of()
        self._hedge_wins = of.counter("hedge_wins").of()
        self._breaker_openings = of.counter("breaker_openings")

    def _take_requests(self, of: Instruments) -> None:
        self._first_token = of.histogram("time_to_first_token_seconds").of()
        self._event_gap = of.histogram("inter_event_seconds").of()
        self._per_token = of.histogram("request_time_per_output_token_seconds").of()
        self._request_seconds = of.histogram("e2e_request_latency_seconds").of()
        self._queue_seconds = of.histogram("request_queue_time_seconds").of()
        self._prompt_tokens = of.counter("prompt_tokens").of()
        self._cached_tokens = of.counter("cached_prompt_tokens").of()
        self._generation_tokens = of.counter("generation_tokens").of()
        self._requests = of.counter("requests")
        self._refusals = of.counter("admission_refusals")
        self._sessions = of.gauge("num_sessions_running").of()
        self._streams = of.gauge("num_streams_running")
        self._key_requests = of.counter("key_requests")
        self._key_tokens = of.counter("key_tokens")

    def _take_survival(self, of: Instruments) -> None:
        self._migrations = of.counter("migrations")
        self._resumes = of.counter("resumes").of()
        self._takeovers = of.counter("takeovers").of()
        self._lease_losses = of.counter("lease_losses").of()
        self._store_seconds = of.histogram("store_operation_seconds")
        self._store_errors = of.counter("store_errors")
        self._store_restores = of.counter("store_restores").of()

    def observe_round(self, facts: RoundFacts, num_tokens: int, trace_id: str = "") -> None:
        """Count one committed round."""
        num_draft, num_accepted = facts.num_draft_tokens, facts.num_accepted_tokens
        if facts.root_only_reason:
            self._root_only.of(facts.root_only_reason).inc()
        if num_draft:
            self._num_drafts.inc()
            self._num_draft_tokens.inc(num_draft)
            self._tree_nodes.observe(num_draft)
            self._tree_depth.observe(facts.draft_depth)
            self._wasted.of("rejected").inc(num_draft - num_accepted)
            _count_up_to(self._drafts_per_pos, facts.draft_depth)
        if num_accepted:
            self._num_accepted.inc(num_accepted)
            _count_up_to(self._accepted_per_pos, num_accepted)
        seconds = 0.0
        for part, spent in zip(self._parts, _split(facts), strict=True):
            part.observe(spent)
            seconds += spent
        self._round_seconds.observe(seconds, exemplar_of(trace_id))
        self._round_tokens.observe(num_tokens)
        self._generation_tokens.inc(num_tokens)

    def observe_tree(
        self,
        tree: TokenTree,
        accepted: Sequence[int],
        *,
        num_draft_nodes: int,
        drafter: str = "",
        worker: str = "",
    ) -> None:
        """Count a round's guesses by rank and by who made them.

        Args:
            tree: what was verified; more than a root.
            accepted: nodes that the target confirmed and the text kept, in order.
            num_draft_nodes: nodes that the drafter brought, the root included; they come first,
                and the rest is of the caller's prediction.
            drafter: name of the drafter's model.
            worker: address of the draft worker.
        """
        parents = tree.parents
        num_children = Tally(parents[1:])
        for width, num_nodes in Tally(num_children.values()).items():
            for rank in range(width):
                self._draft_per_rank.of(str(min(rank, _MAX_RANK))).inc(num_nodes)
        for node in accepted:
            rank = parents[:node].count(parents[node])
            self._accepted_per_rank.of(str(min(rank, _MAX_RANK))).inc()
        num_accepted = sum(node < num_draft_nodes for node in accepted)
        if num_draft_nodes > 1:
            self._drafter_draft.of(drafter, worker).inc(num_draft_nodes - 1)
            self._drafter_accepted.of(drafter, worker).inc(num_accepted)
        if len(parents) > num_draft_nodes:
            self._drafter_draft.of(PREDICTION, "").inc(len(parents) - num_draft_nodes)
            self._drafter_accepted.of(PREDICTION, "").inc(len(accepted) - num_accepted)

    def observe_draft_round_trip(self, seconds: float) -> None:
        """Count a tree that came in time."""
        self._draft_round_trip.observe(seconds)

    def late_tree(self, worker: str) -> None:
        """Count a tree that did not come before its deadline."""
        self._late_trees.of(worker).inc()

    def wasted(self, num_tokens: int, reason: str) -> None:
        """Count guesses that were never verified: "late" or "lost_hedge"."""
        self._wasted.of(reason).inc(num_tokens)

    def hedged(self) -> None:
        """Count a propose that a second drafter is asked for too."""
        self._hedged.inc()

    def hedge_won(self) -> None:
        """Count a hedged propose that the second drafter answered first."""
        self._hedge_wins.inc()

    def breaker_opened(self, tier: str, worker: str) -> None:
        """Count a worker that is cut off for a while."""
        self._breaker_openings.of(tier, worker).inc()

    def migrated(self, tier: str, reason: str) -> None:
        """Count a session that had to leave a worker; see the catalogue for the reasons."""
        self._migrations.of(tier, reason).inc()

    def resumed(self) -> None:
        """Count a stream that goes on at a client's offset."""
        self._resumes.inc()

    def taken_over(self) -> None:
        """Count a session taken over from another router."""
        self._takeovers.inc()

    def lease_lost(self) -> None:
        """Count a session that another router took from this one."""
        self._lease_losses.inc()

    def restored(self) -> None:
        """Count a session written again after the store had lost it."""
        self._store_restores.inc()

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

    def observe_refused(self, reason: str) -> None:
        """Count a request that was not let in; see the catalogue for the reasons."""
        self._refusals.of(reason).inc()

    def observe_first_token(self, seconds: float, trace_id: str = "") -> None:
        """Count the wait for a request's first tokens."""
        self._first_token.observe(seconds, exemplar_of(trace_id))

    def observe_event_gap(self, seconds: float) -> None:
        """Count the time between two events of a stream."""
        self._event_gap.observe(seconds)

    def session_started(self) -> None:
        """Count a session in."""
        self._sessions.inc()

    def session_ended(self) -> None:
        """Count a session out."""
        self._sessions.dec()

    @contextmanager
    def stream(self, kind: str) -> Iterator[None]:
        """Count a stream as running: "generate", "resume" or "follow"."""
        self._streams.of(kind).inc()
        try:
            yield
        finally:
            self._streams.of(kind).dec()

    def observe_finished(self, finished: Finished, key_id: str = "") -> None:
        """Count the tokens of a request that ran to its end."""
        usage = finished.usage
        self._prompt_tokens.inc(usage.num_prompt_tokens)
        self._cached_tokens.inc(usage.num_cached_tokens)
        self._key_tokens.of(key_id or NO_KEY, "prompt").inc(usage.num_prompt_tokens)
        self._key_tokens.of(key_id or NO_KEY, "generation").inc(usage.num_completion_tokens)

    def observe_per_token(self, seconds: float, num_tokens: int) -> None:
        """Count a request's mean time for each of the tokens after its first event."""
        if num_tokens > 0:
            self._per_token.observe(seconds / num_tokens)

    def observe_request(self, outcome: str, seconds: float, trace_id: str = "") -> None:
        """Count a request that ended in whatever way."""
        self._requests.of(outcome).inc()
        self._request_seconds.observe(seconds, exemplar_of(trace_id))

    def watch(self, name: str, read: Callable[[], Mapping[tuple[str, ...], float]]) -> None:
        """Ask `read` for a metric at each scrape, by the values of its labels in order."""
        self._instruments.watch(name, read)

    def watch_one(self, name: str, read: Callable[[], float]) -> None:
        """Ask `read` for a metric without labels of its own at each scrape."""
        self._instruments.watch_one(name, read)


def exemplar_of(trace_id: str) -> dict[str, str] | None:
    """What ties an observation to its trace, or None without a trace."""
    return {"trace_id": trace_id} if trace_id else None


def _count_up_to(counters: Sequence[Counter], depth: int) -> None:
    """Count depths 1 to `depth`; those deeper than the last counter count as the deepest."""
    for counter in counters[:depth]:
        counter.inc()
    if depth > len(counters):
        counters[-1].inc(depth - len(counters))


def _split(facts: RoundFacts) -> tuple[float, ...]:
    """A round's seconds in the order of the label `part`."""
    return (
        facts.draft_seconds,
        facts.verify_seconds,
        facts.queue_seconds,
        facts.network_seconds,
        facts.commit_seconds,
        max(0.0, facts.router_seconds - facts.commit_seconds),
    )
