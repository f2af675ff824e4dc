"""What operators ask of a router: how the cluster stands, whose sessions there are, what is wrong.

This module knows nothing of protobuf, and leaves what a finding means to `diagnosis.py`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from specinfer.errors import InvalidRequest, SpecinferError
from specinfer.messages.admin import (
    CancelOutcome,
    ClusterStatus,
    Finding,
    RouterStatus,
    SessionListing,
    SessionStatus,
)
from specinfer_router.cluster import Cluster
from specinfer_router.diagnosis import cluster_findings
from specinfer_router.router import Router
from specinfer_router.store import (
    CANCELLED,
    RESUMABLE,
    SessionFilter,
    SessionStore,
    SessionSummary,
)

MAX_SESSIONS = 1000
WAITING = "starting: it waits for a first verify worker"
STORE_SECONDS = 0.5

Check = Callable[[], Awaitable[Sequence[Finding]]]


@dataclass(frozen=True)
class Identity:
    """Who this router is.

    Attributes:
        router_id: name that its leases bear.
        version: specinfer's version.
        store: where sessions are kept, without a password; "" for its memory.
    """

    router_id: str
    version: str
    store: str = ""


class Administration:
    """The operators' side of one router.

    Args:
        identity: who the router is.
        cluster: its workers.
        store: where sessions live.
        get_router: what serves the users; None while it waits for a first verify worker.
        registry: what it has counted.
        checks: what to look at in a diagnosis beside the cluster itself.
    """

    def __init__(
        self,
        identity: Identity,
        *,
        cluster: Cluster,
        store: SessionStore,
        get_router: Callable[[], Router | None],
        registry: CollectorRegistry,
        checks: Sequence[Check] = (),
    ) -> None:
        self._identity = identity
        self._cluster = cluster
        self._store = store
        self._get_router = get_router
        self._counts = Counts(registry)
        self._checks = tuple(checks)
        self._start = time.monotonic()

    async def cluster(self) -> ClusterStatus:
        """The router and every worker that it knows, now."""
        router, counts = self._get_router(), self._counts.read()
        capabilities = None if router is None else router.capabilities()
        status = RouterStatus(
            router_id=self._identity.router_id,
            version=self._identity.version,
            model_name=capabilities.model if capabilities else "",
            uptime_seconds=time.monotonic() - self._start,
            not_ready_reason=router.not_ready_reason if router else WAITING,
            num_running=counts.one("num_sessions_running"),
            num_waiting=counts.one("num_requests_waiting"),
            num_requests=counts.by("requests_total", "outcome"),
            num_tokens=counts.one("generation_tokens_total"),
            num_rounds=counts.one("tokens_per_round_count"),
            num_draft_tokens=counts.one("spec_decode_num_draft_tokens_total"),
            num_accepted_tokens=counts.one("spec_decode_num_accepted_tokens_total"),
            num_root_only_rounds=counts.by("root_only_rounds_total", "reason"),
            plain_round_seconds=capabilities.plain_round_seconds if capabilities else 0.0,
            store=self._identity.store,
            store_ready=await self._store_answers(),
            store_away_seconds=self._store.away_seconds,
        )
        return ClusterStatus(status, self._cluster.workers())

    async def sessions(
        self, limit: int, *, key_id: str = "", running_only: bool = False
    ) -> SessionListing:
        """Sessions that the store keeps, in no order.

        Raises:
            InvalidRequest: `limit` is more than MAX_SESSIONS.
            Unavailable: the store does not answer.
        """
        if limit > MAX_SESSIONS:
            raise InvalidRequest(f"at most {MAX_SESSIONS} sessions are listed", field="limit")
        # One more than asked for tells whether there are more.
        page = await self._store.sessions(limit + 1, SessionFilter(key_id, running_only))
        found = tuple(map(session_status, page.found))
        reason = page.partial_reason
        if len(found) > limit:
            reason = f"at most {limit} were asked for, and there are more"
        return SessionListing(found[:limit], reason)

    async def session(self, session_id: str) -> SessionStatus:
        """One session; raises NotFound."""
        return session_status(await self._store.summary(session_id))

    async def cancel(self, session_id: str) -> CancelOutcome:
        """End a session for good, wherever it runs and whosever it is; raises NotFound.

        One that has ended for good stays as it is; how, is the answer.
        """
        store = self._store
        before = (await store.summary(session_id)).finish_reason
        if before not in RESUMABLE:
            return CancelOutcome(before, had_ended=True)
        await store.finish(session_id, CANCELLED)
        # It may have ended between the two questions.
        after = (await store.summary(session_id)).finish_reason or CANCELLED
        return CancelOutcome(after, had_ended=after != CANCELLED)

    async def diagnose(self, callers_clock: float = 0.0) -> list[Finding]:
        """What is wrong with the cluster, or soon will be.

        Args:
            callers_clock: the operator's time in seconds since 1970, or 0 to leave it out.
        """
        skew = time.time() - callers_clock if callers_clock else None
        findings = cluster_findings(self._identity.version, self._cluster.workers(), skew)
        for check in self._checks:
            findings.extend(await check())
        return findings

    async def _store_answers(self) -> bool:
        if self._store.away_seconds:
            return False
        try:
            # One that hangs must not hang whoever asks.
            async with asyncio.timeout(STORE_SECONDS):
                await self._store.check()
        except (SpecinferError, TimeoutError):
            return False
        return True


def session_status(summary: SessionSummary) -> SessionStatus:
    """What operators are told of a session."""
    return SessionStatus(
        session_id=summary.session_id,
        key_id=summary.key_id,
        model_hash=summary.model_hash,
        num_prompt_tokens=summary.num_prompt_tokens,
        num_output_tokens=summary.num_tokens - summary.num_prompt_tokens,
        epoch=summary.epoch,
        owner=summary.owner,
        holder=summary.holder,
        lease_seconds=summary.lease_seconds,
        ttl_seconds=summary.ttl_seconds,
        finish_reason=summary.finish_reason,
        request_id=summary.request_id,
        max_tokens=summary.max_tokens,
        unattended=summary.unattended,
    )


class Counts:
    """Reads counters back from a registry, by their names without the prefix."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._samples: list[tuple[str, dict[str, str], float]] = []

    def read(self) -> Counts:
        """Take the values of this moment."""
        self._samples = [
            (sample.name, dict(sample.labels), sample.value)
            for metric in self._registry.collect()
            for sample in metric.samples
        ]
        return self

    def one(self, name: str) -> int:
        """The sum over all labels; 0 when nothing was counted."""
        return round(sum(value for _, value in self._named(name)))

    def by(self, name: str, label: str) -> dict[str, int]:
        """The sums by the values of one label, without those that are 0."""
        sums: dict[str, float] = {}
        for labels, value in self._named(name):
            sums[labels.get(label, "")] = sums.get(labels.get(label, ""), 0.0) + value
        return {key: round(value) for key, value in sums.items() if value}

    def _named(self, name: str) -> Iterable[tuple[dict[str, str], float]]:
        full = f"specinfer_{name}"
        return ((labels, value) for found, labels, value in self._samples if found == full)
