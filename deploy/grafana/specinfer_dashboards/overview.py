"""Is it well, and is speculation worth it? This module knows nothing of Grafana's JSON."""

from __future__ import annotations

from dataclasses import replace

from specinfer_dashboards import promql, shared
from specinfer_dashboards.panels import (
    Dashboard,
    Query,
    Row,
    Step,
    Unit,
    heat,
    lines,
    number,
)

_GOOD_IS_LOW = (Step(None, "green"), Step(0.001, "orange"), Step(0.0144, "red"))

_NOW = (
    number(
        "Requests",
        Unit.REQUESTS,
        "Requests that ended, of any outcome. None at all while users are there: look at the next "
        "number and at `specinfer doctor`.",
        "NoRouter",
        Query(promql.rate("requests")),
    ),
    replace(
        number(
            "Streams that fail",
            Unit.SHARE,
            "Share of streams that ended with an error of ours. Above 0.1 % the month's budget is "
            "being spent too fast: see which outcome it is below.",
            "StreamsFail",
            Query(shared.FAILED_SHARE),
        ),
        steps=_GOOD_IS_LOW,
    ),
    replace(
        number(
            "First token, p95",
            Unit.SECONDS,
            "19 of 20 requests had their first token within this time. Above 2.5 s: see whether "
            "they wait in the queue (Clients) or in the target (Verify).",
            "FirstTokensLate",
            Query(promql.quantile(0.95, "time_to_first_token_seconds")),
        ),
        steps=(Step(None, "green"), Step(1.0, "orange"), Step(2.5, "red")),
    ),
    replace(
        number(
            "Speed against plain",
            Unit.TIMES,
            "How many times faster sessions are than without speculation, prompts included, so "
            "rather too low. Below 1 guesses cost more than they bring: see Speculation.",
            "SpeculationSlowsDown",
            Query(shared.SPEEDUP),
        ),
        steps=(Step(None, "red"), Step(0.9, "orange"), Step(1.1, "green")),
    ),
    number(
        "Goodput",
        Unit.TOKENS_PER_SECOND,
        "Tokens that were generated for users; guesses that were not confirmed are not in it. It "
        "falls while requests wait: look at the rows of the target's passes (Verify).",
        "FirstTokensLate",
        Query(promql.rate("generation_tokens")),
    ),
    replace(
        number(
            "Verify workers ready",
            Unit.COUNT,
            "As the router that sees most of them sees them. 0: no stream goes on; start one.",
            "NoVerifyWorker",
            Query(promql.now("num_workers", 'tier="verify"', 'state="ready"', over="max")),
        ),
        steps=(Step(None, "red"), Step(1.0, "green")),
    ),
)

_TRAFFIC = (
    replace(
        lines(
            "Requests by outcome",
            Unit.REQUESTS,
            "How requests ended: `stop` and `length` are good ends, `cancelled` and "
            "`client_closed` are the caller's. For others the router's log has the request's id.",
            "StreamsFail",
            Query(promql.rate("requests", by="outcome") + " > 0", "{{outcome}}"),
        ),
        stacked=True,
    ),
    lines(
        "Failed streams",
        Unit.SHARE,
        "Share of streams that ended with an error of ours, against the goal of 0.1 %. A step up "
        "goes with a deployment or a worker that left: compare with Sessions and Redis.",
        "StreamsFail",
        Query(shared.FAILED_SHARE, "failed"),
        Query("vector(0.001)", "goal"),
    ),
    lines(
        "Refused requests",
        Unit.REQUESTS,
        "Requests that were not let in, by reason. `queue_full` and `queue_timeout` ask for more "
        "verify workers, the others are limits of keys or of priority.",
        "RequestsRefused",
        Query(promql.rate("admission_refusals", by="reason"), "{{reason}}"),
    ),
)

_LATENCY = (
    lines(
        "Time to first token",
        Unit.SECONDS,
        "From arrival to the first tokens. When only the tail grows, long prompts share passes "
        "with others; when all of it grows, requests wait for a place.",
        "FirstTokensLate",
        *shared.quantiles("time_to_first_token_seconds"),
    ),
    heat(
        "Time to first token, all requests",
        Unit.SECONDS,
        "Two bands are two kinds of request, such as short and long prompts or hits and misses of "
        "the prefix cache. A band that moves up is load.",
        "FirstTokensLate",
        Query(promql.buckets("time_to_first_token_seconds"), "{{le}}"),
    ),
    lines(
        "Time per token of a request",
        Unit.SECONDS,
        "A request's mean time for a token after its first event. When it grows while tokens a "
        "round stay, rounds have become slower: see the parts of a round (Speculation).",
        "SpeculationSlowsDown",
        *shared.quantiles("request_time_per_output_token_seconds"),
    ),
)

_SPEED = (
    lines(
        "Speed against plain decoding",
        Unit.TIMES,
        "Tokens a second of a session over what plain decoding would give, as measured here. "
        "When it falls to 1, see acceptance and the reasons for rounds without guesses.",
        "SpeculationSlowsDown",
        Query(shared.SPEEDUP, "speed"),
        Query("vector(1)", "plain"),
    ),
    lines(
        "Tokens",
        Unit.TOKENS_PER_SECOND,
        "Tokens of prompts, those of them found in a prefix cache, and generated ones. Many "
        "prompt tokens with few cached ones crowd out generation.",
        "KvNearlyFull",
        Query(promql.rate("prompt_tokens"), "prompt"),
        Query(promql.rate("cached_prompt_tokens"), "prompt, cached"),
        Query(promql.rate("generation_tokens"), "generated"),
    ),
    lines(
        "Tokens a round",
        Unit.TOKENS,
        "What one pass of the target brings a session on average: 1 is plain decoding. When it "
        "falls, see acceptance by depth and by drafter (Speculation).",
        "AcceptanceFell",
        Query(shared.TOKENS_A_ROUND, "tokens a round"),
    ),
)

_SATURATION = (
    lines(
        "Requests running and waiting",
        Unit.COUNT,
        "Who holds a place and who waits for one. When somebody always waits, add verify workers "
        "or raise `--max-streams` where KV blocks are left.",
        "RequestsRefused",
        Query(promql.now("num_requests_running"), "running"),
        Query(promql.now("num_requests_waiting"), "waiting"),
    ),
    replace(
        lines(
            "KV cache in use",
            Unit.SHARE,
            "Share of each verify worker's KV blocks that sessions hold. Above 90 % sessions will "
            "be preempted: add a worker or let fewer streams in.",
            "KvNearlyFull",
            Query(
                promql.now("kv_cache_usage_ratio", 'tier="verify"', by="instance", over="max"),
                "{{instance}}",
            ),
        ),
        maximum=1.0,
    ),
    lines(
        "Workers ready",
        Unit.COUNT,
        "Workers of each tier that take sessions. Fewer than were started: `specinfer top` "
        "shows which is missing, `specinfer doctor` why.",
        "TargetDown",
        Query(promql.now("num_workers", 'state="ready"', by="tier", over="max"), "{{tier}}, ready"),
    ),
)

OVERVIEW = Dashboard(
    "overview",
    "Overview",
    "Is it well, and is speculation worth it?",
    (
        Row("Now", _NOW),
        Row("Traffic and errors", _TRAFFIC),
        Row("Latency", _LATENCY),
        Row("Speed", _SPEED),
        Row("Saturation", _SATURATION),
    ),
)
