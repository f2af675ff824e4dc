"""What the target's workers do and how full they are. Knows nothing of Grafana's JSON."""

from __future__ import annotations

from dataclasses import replace

from specinfer_dashboards import promql, shared
from specinfer_dashboards.panels import Dashboard, Query, Row, Unit, heat, lines

VERIFY = 'tier="verify"'

_PASSES = (
    lines(
        "Time of a pass",
        Unit.SECONDS,
        "How long the target computes at a time. When it grows with the same rows, something else "
        "uses the machine; with more rows, load has grown.",
        "FirstTokensLate",
        *shared.quantiles("step_seconds", VERIFY),
    ),
    heat(
        "Against the measured cost",
        Unit.TIMES,
        "Time of a pass over what as many rows took when the worker measured itself at its start. "
        "A band above 2 is a slower machine than then: heat, a neighbour, memory that swaps.",
        "FirstTokensLate",
        Query(promql.buckets("step_cost_ratio"), "{{le}}"),
    ),
    lines(
        "Mean cost ratio by worker",
        Unit.TIMES,
        "The same by worker. One that stands out is on a slow machine: drain it.",
        "FirstTokensLate",
        Query(promql.mean("step_cost_ratio", by="instance"), "{{instance}}"),
    ),
    heat(
        "Rows of a pass",
        Unit.COUNT,
        "Rows are prompt tokens, roots and guesses. Wide bands are prompts that are read; passes "
        "of few rows leave the machine idle.",
        "FirstTokensLate",
        Query(promql.buckets("step_rows", VERIFY), "{{le}}"),
    ),
    heat(
        "Sessions of a pass",
        Unit.COUNT,
        "How many sessions share a pass. When many run and passes hold few, they arrive at "
        "different times: drafting takes longer than verifying.",
        "SpeculationSlowsDown",
        Query(promql.buckets("step_sessions", VERIFY), "{{le}}"),
    ),
    replace(
        lines(
            "Rows by kind",
            Unit.ROWS_PER_SECOND,
            "What is computed. Much `prefill` without new requests is sessions that were "
            "preempted or moved and are read again.",
            "PreemptionStorm",
            Query(promql.rate("rows", VERIFY, by="kind"), "{{kind}}"),
        ),
        stacked=True,
    ),
)

_LOAD = (
    replace(
        lines(
            "Share of time that passes take",
            Unit.SHARE,
            "1 is a worker that computes all the time: it is the limit, and others wait for it. "
            "Below a half, the rounds' time goes elsewhere.",
            "RequestsRefused",
            Query(promql.amount("step_seconds", VERIFY, by="instance"), "{{instance}}"),
        ),
        maximum=1.0,
    ),
    lines(
        "Steps waiting",
        Unit.COUNT,
        "Items that wait for a pass. When it stays above the sessions of a pass, add workers.",
        "RequestsRefused",
        Query(promql.now("num_steps_waiting", VERIFY, by="instance"), "{{instance}}"),
    ),
    lines(
        "Sessions open",
        Unit.COUNT,
        "By worker. One with far more than the others has the prefix that all share, or the "
        "others are not trusted: see breakers (Draft).",
        "BreakerOpen",
        Query(promql.now("num_sessions", VERIFY, by="instance"), "{{instance}}"),
    ),
    lines(
        "Roots computed ahead",
        Unit.PER_SECOND,
        "Plain decoding has its next root computed before the router asks. `used` ones were asked "
        "for; the rest are ends of texts and trees that came instead. If half are lost, try "
        "`--roots-ahead off`.",
        "RequestsRefused",
        Query(promql.rate("roots_ahead"), "computed"),
        Query(promql.rate("roots_ahead_used"), "used"),
    ),
)

_MEMORY = (
    replace(
        lines(
            "KV cache in use",
            Unit.SHARE,
            "Share of blocks that sessions hold. Above 90 % sessions will be preempted: add a "
            "worker, raise `--kv-blocks` where memory is left, or let fewer streams in.",
            "KvNearlyFull",
            Query(
                promql.now("kv_cache_usage_ratio", VERIFY, by="instance", over="max"),
                "{{instance}}",
            ),
        ),
        maximum=1.0,
    ),
    replace(
        lines(
            "KV blocks",
            Unit.COUNT,
            "By state. `cached` blocks are free for whoever needs them and hold prefixes until "
            "then. Blocks in use with no session open would be a leak: report it.",
            "KvNearlyFull",
            Query(promql.now("kv_blocks", VERIFY, by="state"), "{{state}}"),
        ),
        stacked=True,
    ),
    replace(
        lines(
            "Prefix cache hits",
            Unit.SHARE,
            "Share of looked-up tokens that were found. When it falls, prompts have changed at "
            "their beginning, or the cache is too small for them.",
            "KvNearlyFull",
            Query(
                promql.rate("prefix_cache_hits", VERIFY)
                + " / "
                + promql.rate("prefix_cache_queries", VERIFY),
                "hits",
            ),
        ),
        maximum=1.0,
    ),
    lines(
        "Preemptions",
        Unit.PER_SECOND,
        "Sessions that gave their blocks up and are read again later. Any lasting rate wastes the "
        "target's time: fewer streams or more blocks.",
        "PreemptionStorm",
        Query(promql.rate("num_preemptions", by="instance"), "{{instance}}"),
    ),
    lines(
        "Calls fenced off",
        Unit.PER_SECOND,
        "Calls of a router that no longer owns the session. A few follow a takeover; many say "
        "that two routers fight for sessions.",
        "LeaseFlapping",
        Query(promql.rate("fenced_calls", VERIFY, by="instance"), "{{instance}}"),
    ),
    lines(
        "Verify workers by state",
        Unit.COUNT,
        "As the router that sees most sees them. `down` ones do not answer; `specinfer doctor` "
        "says why.",
        "NoVerifyWorker",
        Query(promql.now("num_workers", VERIFY, by="state", over="max"), "{{state}}"),
    ),
)

VERIFY_BOARD = Dashboard(
    "verify",
    "Verify",
    "What do the target's workers do, and how full are they?",
    (Row("Passes", _PASSES), Row("Load", _LOAD), Row("Memory and safety", _MEMORY)),
)
