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
from specinfer_router.links import WorkerLink
from specinfer_router.policy import PlainSpeed
from specinfer_router.store import DurableStore, SessionStore, StoreHooks

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


def show_store(metrics: RouterMetrics, store: SessionStore, counts: StoreCounts) -> None:
    """Show how the session store fares; one in memory is never away."""

    def away() -> float:
        return store.away_seconds if isinstance(store, DurableStore) else 0.0

    metrics.watch_one("store_up", lambda: away() == 0.0)
    metrics.watch_one("store_outages", lambda: counts.num_outages + (away() > 0.0))
    metrics.watch_one("store_outage_seconds", lambda: counts.outage_seconds + away())
    metrics.watch_one("store_restores", lambda: counts.num_restores)


def show_router(metrics: RouterMetrics, admission: Admission, plain: PlainSpeed) -> None:
    """Show who is let in, and what a token costs without guesses."""
    metrics.watch_one("num_requests_running", lambda: admission.num_running)
    metrics.watch_one("num_requests_waiting", lambda: admission.num_waiting)
    metrics.watch(
        "admission_refusals",
        lambda: {(reason,): count for reason, count in admission.refusals.items()},
    )
    metrics.watch_one("plain_round_seconds", lambda: plain.seconds)


def show_cluster(metrics: RouterMetrics, cluster: Cluster) -> None:
    """Show the workers of both tiers, as this router sees them."""

    def by_worker(read: Callable[[WorkerLink[Any]], float]) -> dict[tuple[str, ...], float]:
        tiers = (("verify", cluster.verifiers), ("draft", cluster.drafters))
        return {(tier, link.address): read(link) for tier, pool in tiers for link in pool.links}

    def by_state() -> dict[tuple[str, ...], float]:
        counts: dict[tuple[str, ...], float] = {
            (tier, state): 0.0
            for tier in ("verify", "draft")
            for state in ("ready", "draining", "down")
        }
        for tier, pool in (("verify", cluster.verifiers), ("draft", cluster.drafters)):
            for link in pool.links:
                counts[tier, _state(link)] += 1
        return counts

    metrics.watch("num_workers", by_state)
    metrics.watch("worker_sessions", lambda: by_worker(lambda link: link.num_seats))
    metrics.watch(
        "breaker_state", lambda: by_worker(lambda link: _BREAKER_STATES[link.breaker.state])
    )


def _state(link: WorkerLink[Any]) -> str:
    if not link.connected:
        return "down"
    return "ready" if link.ready else "draining"
