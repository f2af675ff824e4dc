"""What a router shows of its parts at each scrape: who waits, who serves, and how they fare.

The parts keep their own numbers; here they are only read. This module knows nothing of rounds, text
or HTTP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from specinfer.metrics import RouterMetrics
from specinfer_router.admission import Admission
from specinfer_router.cluster import Cluster
from specinfer_router.hedging import HedgeBudget
from specinfer_router.links import WorkerLink
from specinfer_router.policy import PlainSpeed
from specinfer_router.pool import WorkerPool
from specinfer_router.store import DurableStore, SessionStore, StoreHooks
from specinfer_router.store.redis_memory import RedisMemory

_BREAKER_STATES = {"closed": 0.0, "half-open": 1.0, "open": 2.0}


@dataclass
class StoreCounts:
    """What a store did, from before anybody counts on."""

    num_outages: int = 0
    outage_seconds: float = 0.0
    num_restores: int = 0

    def hooks(self) -> StoreHooks:
        """What the store calls."""
        return StoreHooks(restored=self._restored, outage_ended=self._outage_ended)

    def _restored(self) -> None:
        self.num_restores += 1

    def _outage_ended(self, seconds: float) -> None:
        self.num_outages += 1
        self.outage_seconds += seconds


def show_store(
    metrics: RouterMetrics,
    store: SessionStore,
    counts: StoreCounts,
    memory: RedisMemory | None = None,
) -> None:
    """Show how the session store fares; one in memory is never away, nor full."""

    def away() -> float:
        return store.away_seconds if isinstance(store, DurableStore) else 0.0

    metrics.watch_one("store_up", lambda: away() == 0.0)
    metrics.watch_one("store_outages", lambda: counts.num_outages + (away() > 0.0))
    metrics.watch_one("store_outage_seconds", lambda: counts.outage_seconds + away())
    metrics.watch_one("store_restores", lambda: counts.num_restores)
    metrics.watch_one("store_memory_usage_ratio", lambda: 0.0 if memory is None else memory.share)


def show_router(metrics: RouterMetrics, admission: Admission, plain: PlainSpeed) -> None:
    """Show who is let in, and what a token costs without guesses."""
    metrics.watch_one("num_requests_running", lambda: admission.num_running)
    metrics.watch_one("num_requests_waiting", lambda: admission.num_waiting)
    metrics.watch(
        "admission_refusals",
        lambda: {(reason,): count for reason, count in admission.refusals.items()},
    )
    metrics.watch_one("plain_round_seconds", lambda: plain.seconds)


def show_cluster(metrics: RouterMetrics, cluster: Cluster, hedges: HedgeBudget) -> None:
    """Show the workers of both tiers, as this router sees them, and second proposals."""
    tiers: tuple[tuple[str, WorkerPool[Any]], ...]
    tiers = (("verify", cluster.verifiers), ("draft", cluster.drafters))

    def by_worker(read: Callable[[WorkerLink[Any]], float]) -> dict[tuple[str, ...], float]:
        return {(tier, link.address): read(link) for tier, pool in tiers for link in pool.links}

    def by_state() -> dict[tuple[str, ...], float]:
        counts: dict[tuple[str, ...], float] = {
            (tier, state): 0.0 for tier, _ in tiers for state in ("ready", "draining", "down")
        }
        for tier, pool in tiers:
            for link in pool.links:
                counts[tier, _state(link)] += 1
        return counts

    for _, pool in tiers:
        pool.on_removed = metrics.worker_left
    metrics.watch("num_workers", by_state)
    metrics.watch("worker_sessions", lambda: by_worker(lambda link: link.num_seats))
    metrics.watch(
        "breaker_state", lambda: by_worker(lambda link: _BREAKER_STATES[link.breaker.state])
    )
    metrics.watch("breaker_openings", lambda: by_worker(lambda link: link.breaker.num_openings))
    metrics.watch(
        "late_trees", lambda: {(link.address,): link.num_late for link in cluster.drafters.links}
    )
    metrics.watch(
        "migrations",
        lambda: {
            (tier, reason): count
            for tier, pool in tiers
            for reason, count in pool.counts.moves.items()
        },
    )
    metrics.watch_wasted(lambda: cluster.drafters.counts.wasted)
    metrics.watch_one("hedged_proposes", lambda: hedges.num_hedges)
    metrics.watch_one("hedge_wins", lambda: hedges.num_wins)


def _state(link: WorkerLink[Any]) -> str:
    if not link.connected:
        return "down"
    return "ready" if link.ready else "draining"
