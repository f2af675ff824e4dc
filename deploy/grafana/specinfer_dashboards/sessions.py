"""What happens to sessions, and how the store that keeps them fares. Knows nothing of Grafana."""

from __future__ import annotations

from dataclasses import replace

from specinfer_dashboards import promql
from specinfer_dashboards.panels import Dashboard, Kind, Query, Row, Unit, heat, lines

_STORE_STATES = (("0", "away", "red"), ("1", "answers", "green"))

_SESSIONS = (
    lines(
        "Sessions and streams",
        Unit.COUNT,
        "Sessions whose rounds run, and streams being read, by kind. Sessions without streams are "
        "background work or readers that left; `specinfer sessions list --running` names them.",
        "LeaseFlapping",
        Query(promql.now("num_sessions_running", by="instance"), "{{instance}} sessions"),
        Query(promql.now("num_streams_running", by="kind"), "streams: {{kind}}"),
    ),
    lines(
        "Resumed and taken over",
        Unit.PER_SECOND,
        "Sessions gone on with by another router since their client asked, or since their router "
        "died. A burst is a router that left; a lasting rate is a network that breaks streams.",
        "LeaseFlapping",
        Query(promql.rate("resumes"), "resumed"),
        Query(promql.rate("takeovers"), "taken over"),
    ),
    lines(
        "Leases lost",
        Unit.PER_SECOND,
        "Sessions that another router took from this one. A few follow a pause of a router; a "
        "lasting rate says that routers stop for longer than a lease lives.",
        "LeaseFlapping",
        Query(promql.rate("lease_losses", by="instance"), "{{instance}}"),
    ),
    lines(
        "Sessions moved",
        Unit.PER_SECOND,
        "To another worker, by what the old one did. `draining` is a rolling restart; `slow` and "
        "`unavailable` are workers that fail: see which with `specinfer top`.",
        "BreakerOpen",
        Query(
            promql.rate("migrations", by="tier, reason"),
            "{{tier}} {{reason}}",
        ),
    ),
    lines(
        "Sessions at each worker",
        Unit.COUNT,
        "As routers place them. One worker with none is drained, cut off or full.",
        "BreakerOpen",
        Query(promql.now("worker_sessions", by="tier, worker"), "{{tier}} {{worker}}"),
    ),
    lines(
        "Calls fenced off",
        Unit.PER_SECOND,
        "Calls to verify workers by routers that no longer own the session; they changed nothing. "
        "With many, two routers fight for sessions.",
        "LeaseFlapping",
        Query(promql.rate("fenced_calls", 'tier="verify"'), "fenced"),
    ),
)

_STORE = (
    replace(
        lines(
            "Store",
            Unit.COUNT,
            "Whether Redis answers, by router. One router without it: its network. All: Redis. "
            "Running streams go on from memory for `--redis-outage-seconds`.",
            "StoreAway",
            Query(promql.now("store_up", by="instance", over="min"), "{{instance}}"),
        ),
        kind=Kind.STATES,
        states=_STORE_STATES,
    ),
    lines(
        "Time of a store operation",
        Unit.SECONDS,
        "p95 by operation. `commit` is in every round: above a millisecond or two look at Redis's "
        "own slow log, its disk (`appendfsync`) and the network.",
        "StoreAway",
        Query(
            promql.quantile(0.95, "store_operation_seconds", by="operation"),
            "{{operation}}",
        ),
    ),
    heat(
        "Commits",
        Unit.SECONDS,
        "Every round waits for one. A band that comes and goes is Redis rewriting its log or "
        "saving a snapshot.",
        "StoreAway",
        Query(promql.buckets("store_operation_seconds", 'operation="commit"'), "{{le}}"),
    ),
    lines(
        "Store errors",
        Unit.PER_SECOND,
        "Operations that failed, by operation. With the store up they are Redis's own refusals, "
        "such as a full memory: `specinfer doctor` looks at its policy and rights.",
        "StoreAway",
        Query(promql.rate("store_errors", by="operation"), "{{operation}}"),
    ),
    lines(
        "Time without the store",
        Unit.SECONDS_PER_SECOND,
        "1 is an outage that goes on. Short spikes again and again: the network, or a Redis that "
        "stops for its snapshots.",
        "StoreAway",
        Query(promql.rate("store_outage_seconds", by="instance"), "{{instance}}"),
    ),
    lines(
        "Outages and sessions restored",
        Unit.PER_SECOND,
        "How often the store stopped answering, and sessions written again after it had lost "
        "them. Restores without an outage: somebody deletes keys, or Redis evicts.",
        "StoreAway",
        Query(promql.rate("store_outages"), "outages"),
        Query(promql.rate("store_restores"), "restored"),
    ),
    replace(
        lines(
            "Store memory",
            Unit.SHARE,
            "Share of Redis's memory limit in use, or of its machine's memory where it has none. "
            "At 1 it refuses to write: raise `maxmemory`, or let sessions expire sooner.",
            "StoreMemoryNearlyFull",
            Query(promql.now("store_memory_usage_ratio", over="max"), "used"),
        ),
        maximum=1.0,
    ),
)

SESSIONS = Dashboard(
    "sessions",
    "Sessions and Redis",
    "What happens to sessions, and how does the store that keeps them fare?",
    (Row("Sessions", _SESSIONS), Row("Store", _STORE)),
)
