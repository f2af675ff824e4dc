"""Every metric of specinfer, in one place: docs/metrics.md, dashboards and alerts are made from it.

The four speculation counters are vLLM's under our prefix. A round is one draft tree and one verify
step, and what it commits is shown as one event. The mean number of tokens a round is

    1 + rate(specinfer_spec_decode_num_accepted_tokens_total[5m])
        / rate(specinfer_spec_decode_num_drafts_total[5m])

and the speed against plain decoding of the same requests, prompts included, is

    rate(specinfer_tokens_per_round_sum[5m]) / rate(specinfer_round_duration_seconds_sum[5m])
        * specinfer_plain_round_seconds

This module knows nothing of who counts, and of nothing that runs.
"""

from __future__ import annotations

from specinfer.metrics.metric import Label, Metric, Source, counter, gauge, histogram

MAX_POSITION = 32
_FAST = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SLOW = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
_TOKENS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)
_DEPTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)
_NODES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_SESSIONS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128)
_RATIOS = (0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)

ROUTER = (Source.ROUTER,)
VERIFY = (Source.VERIFY,)
DRAFT = (Source.DRAFT,)
WORKERS = (Source.VERIFY, Source.DRAFT)
ALL = (Source.ROUTER, Source.VERIFY, Source.DRAFT)

TIER = Label("tier", ("draft", "verify"))
WORKER = Label("worker", most=64)
DRAFTER = Label("drafter", most=16)
KEY = Label("key", most=100)
POSITION = Label("position", tuple(str(depth) for depth in range(MAX_POSITION + 1)))
RANK = Label("rank", ("0", "1", "2", "3", "4", "5", "6", "7"))
PART = Label("part", ("draft", "verify", "queue", "network", "commit", "router"))
ROOT_ONLY_REASON = Label(
    "reason",
    ("disabled", "budget", "no_drafter", "circuit_open", "deadline", "draft_error", "no_guess"),
)
WASTE_REASON = Label("reason", ("rejected", "late", "lost_hedge"))
OUTCOME = Label(
    "outcome",
    (
        "stop",
        "length",
        "cancelled",
        "client_closed",
        "deadline_exceeded",
        "internal",
        "invalid_checkpoint",
        "invalid_request",
        "invalid_tree",
        "lease_lost",
        "mismatch",
        "not_found",
        "permission_denied",
        "reader_stalled",
        "resource_exhausted",
        "router_leaving",
        "stale_epoch",
        "unauthenticated",
        "unavailable",
    ),
)
STREAM_KIND = Label("kind", ("generate", "resume", "follow"))
REFUSAL = Label(
    "reason",
    (
        "draining",
        "queue_full",
        "queue_timeout",
        "deadline",
        "priority",
        "max_streams",
        "tokens_per_minute",
        "requests_per_minute",
    ),
)
TOKEN_KIND = Label("kind", ("prompt", "generation"))
WORKER_STATE = Label("state", ("ready", "draining", "down"))
MOVE_REASON = Label(
    "reason",
    (
        *("draining", "distrusted", "slow", "unavailable", "not_found", "resource_exhausted"),
        *("stale_epoch", "internal", "invalid_tree", "invalid_request", "lease_lost"),
    ),
)
OPERATION = Label(
    "operation",
    (
        *("create", "commit", "claim", "restore", "orphans", "finish", "load", "tail"),
        *("sessions", "summary", "document", "check"),
    ),
)
ROW_KIND = Label("kind", ("prefill", "root", "guess"))
BLOCK_STATE = Label("state", ("used", "free", "cached"))
PROPOSAL_END = Label("outcome", ("done", "late", "stuck"))
AHEAD_END = Label("outcome", ("hit", "miss"))

SPECULATION = (
    counter(
        "spec_decode_num_drafts",
        "rounds",
        "Rounds with at least one guessed token.",
        vllm="spec_decode_num_drafts",
    ),
    counter(
        "spec_decode_num_draft_tokens",
        "tokens",
        "Tokens that drafters guessed.",
        vllm="spec_decode_num_draft_tokens",
    ),
    counter(
        "spec_decode_num_accepted_tokens",
        "tokens",
        "Guessed tokens that the target confirmed.",
        vllm="spec_decode_num_accepted_tokens",
    ),
    counter(
        "spec_decode_num_accepted_tokens_per_pos",
        "tokens",
        "Guessed tokens that the target confirmed, by depth in the tree, depth 1 as 0.",
        POSITION,
        vllm="spec_decode_num_accepted_tokens_per_pos",
    ),
    counter(
        "spec_decode_num_drafts_per_pos",
        "rounds",
        "Rounds whose tree had a guess at this depth, depth 1 as 0.",
        POSITION,
    ),
    counter(
        "spec_decode_num_draft_tokens_per_rank",
        "tokens",
        "Guessed tokens by their place among the guesses below the same node, the best as 0.",
        RANK,
    ),
    counter(
        "spec_decode_num_accepted_tokens_per_rank",
        "tokens",
        "Confirmed tokens by their place among the guesses below the same node, the best as 0.",
        RANK,
    ),
    counter(
        "drafter_draft_tokens",
        "tokens",
        "Guessed tokens by who guessed them: a drafter's model, or the caller's prediction.",
        DRAFTER,
        WORKER,
    ),
    counter(
        "drafter_accepted_tokens",
        "tokens",
        "Confirmed tokens by who guessed them: a drafter's model, or the caller's prediction.",
        DRAFTER,
        WORKER,
    ),
    counter(
        "wasted_draft_tokens",
        "tokens",
        "Guessed tokens of no use: not confirmed, come after the deadline, or beaten by a hedge.",
        WASTE_REASON,
    ),
    histogram("tree_nodes", "tokens", "Guessed tokens in a round that had any.", _NODES),
    histogram("tree_depth", "levels", "Depth of a round's tree where there was one.", _DEPTHS),
    histogram("tokens_per_round", "tokens", "Tokens that one round, or event, brought.", _TOKENS),
    counter("root_only_rounds", "rounds", "Rounds without a guess, by reason.", ROOT_ONLY_REASON),
)

ROUNDS = (
    histogram(
        "round_seconds",
        "seconds",
        "Time of a round by part; the parts add up to the round.",
        _FAST,
        PART,
    ),
    histogram("round_duration_seconds", "seconds", "Time of a whole round.", _FAST),
    histogram(
        "draft_round_trip_seconds",
        "seconds",
        "From asking a drafter to having its tree; late ones are not in it.",
        _FAST,
    ),
    counter("late_trees", "trees", "Trees that did not come before their deadline.", WORKER),
    counter("hedged_proposes", "calls", "Proposes that a second drafter was asked for too."),
    counter("hedge_wins", "calls", "Hedged proposes that the second drafter answered first."),
    gauge(
        "breaker_state",
        "state",
        "What is sent to a worker: 0 all, 1 a single try, 2 nothing for a while.",
        TIER,
        WORKER,
    ),
    counter("breaker_openings", "events", "How often a worker was cut off.", TIER, WORKER),
    gauge(
        "plain_round_seconds",
        "seconds",
        "Measured time of a token where no round has guesses, or of a step until there was any.",
    ),
)

REQUESTS = (
    histogram(
        "time_to_first_token_seconds",
        "seconds",
        "From a request's arrival to its first tokens.",
        _SLOW,
        vllm="time_to_first_token_seconds",
    ),
    histogram(
        "inter_event_seconds",
        "seconds",
        "Between two events of a stream; an event brings the tokens of a round.",
        _FAST,
        vllm="inter_token_latency_seconds",
    ),
    histogram(
        "request_time_per_output_token_seconds",
        "seconds",
        "A request's mean time for a token after the first event.",
        _FAST,
        vllm="request_time_per_output_token_seconds",
    ),
    histogram(
        "e2e_request_latency_seconds",
        "seconds",
        "From a request's arrival to its end.",
        _SLOW,
        vllm="e2e_request_latency_seconds",
    ),
    histogram(
        "request_queue_time_seconds",
        "seconds",
        "How long a request waited for its place.",
        _SLOW,
        vllm="request_queue_time_seconds",
    ),
    counter("prompt_tokens", "tokens", "Tokens of prompts.", vllm="prompt_tokens"),
    counter("cached_prompt_tokens", "tokens", "Tokens of prompts found in a prefix cache."),
    counter("generation_tokens", "tokens", "Tokens generated.", vllm="generation_tokens"),
    counter(
        "requests",
        "requests",
        "Requests ended, by outcome: a finish reason or an error's reason.",
        OUTCOME,
        vllm="request_success",
    ),
    counter("admission_refusals", "requests", "Requests not let in, by reason.", REFUSAL),
    gauge(
        "num_requests_running",
        "requests",
        "Requests that hold a place.",
        vllm="num_requests_running",
    ),
    gauge(
        "num_requests_waiting",
        "requests",
        "Requests that wait for a place.",
        vllm="num_requests_waiting",
    ),
    gauge("num_sessions_running", "sessions", "Sessions whose rounds are running."),
    gauge("num_streams_running", "streams", "Streams being answered, by kind.", STREAM_KIND),
    counter("key_requests", "requests", "Requests by API key id, of those let in.", KEY),
    counter("key_tokens", "tokens", "Tokens by API key id and kind.", KEY, TOKEN_KIND),
)

SURVIVAL = (
    gauge("num_workers", "workers", "Known workers of a tier by state.", TIER, WORKER_STATE),
    gauge("worker_sessions", "sessions", "This router's sessions at a worker.", TIER, WORKER),
    counter(
        "migrations",
        "sessions",
        "Sessions moved to another worker or opened again, by what the old one did.",
        TIER,
        MOVE_REASON,
    ),
    counter("resumes", "sessions", "Sessions gone on with here since a client asked for it."),
    counter("takeovers", "sessions", "Sessions gone on with here since their router had died."),
    counter("lease_losses", "sessions", "Sessions that another router took from this one."),
    histogram(
        "store_operation_seconds",
        "seconds",
        "Time of one operation of the session store, in Redis or memory.",
        _FAST,
        OPERATION,
    ),
    counter(
        "store_errors", "operations", "Operations of the session store that failed.", OPERATION
    ),
    gauge("store_up", "state", "1 while the session store answers, 0 in an outage."),
    counter("store_outages", "events", "How often the session store stopped answering."),
    counter("store_outage_seconds", "seconds", "Time without the session store."),
    counter("store_restores", "sessions", "Sessions written again after the store lost them."),
    gauge(
        "store_memory_usage_ratio",
        "ratio",
        "Share of Redis's memory limit in use, or of its machine's memory without a limit.",
    ),
)

WORK = (
    histogram("step_seconds", "seconds", "Time of a pass.", _FAST, sources=WORKERS),
    histogram(
        "step_cost_ratio",
        "ratio",
        "Time of a pass over what as many rows took when the worker measured itself.",
        _RATIOS,
        sources=VERIFY,
    ),
    histogram("step_rows", "rows", "Rows of a pass.", _ROWS, sources=WORKERS),
    histogram(
        "step_sessions", "sessions", "Sessions that share a pass.", _SESSIONS, sources=WORKERS
    ),
    counter(
        "rows",
        "rows",
        "Rows computed: of prompts, roots and guesses.",
        ROW_KIND,
        sources=WORKERS,
    ),
    gauge("num_sessions", "sessions", "Sessions open at the worker.", sources=WORKERS),
    gauge("num_steps_waiting", "steps", "Items that wait for a pass.", sources=WORKERS),
    gauge("kv_blocks", "blocks", "KV blocks by state.", BLOCK_STATE, sources=WORKERS),
    gauge(
        "kv_cache_usage_ratio",
        "ratio",
        "Share of the KV blocks that sessions hold.",
        sources=WORKERS,
        vllm="kv_cache_usage_perc",
    ),
    counter(
        "prefix_cache_queries",
        "tokens",
        "Tokens looked up in the prefix cache.",
        sources=WORKERS,
        vllm="prefix_cache_queries",
    ),
    counter(
        "prefix_cache_hits",
        "tokens",
        "Tokens found in the prefix cache.",
        sources=WORKERS,
        vllm="prefix_cache_hits",
    ),
    counter(
        "num_preemptions",
        "sessions",
        "Sessions that gave their blocks up for another one.",
        sources=VERIFY,
        vllm="num_preemptions",
    ),
    counter("roots_ahead", "rows", "Roots computed before they were asked for.", sources=VERIFY),
    counter("roots_ahead_used", "rows", "Those of them that were asked for.", sources=VERIFY),
    counter(
        "fenced_calls",
        "calls",
        "Calls refused since the session belongs to another router now.",
        sources=WORKERS,
    ),
    counter("proposals", "trees", "Trees by how their growth ended.", PROPOSAL_END, sources=DRAFT),
    counter("proposed_tokens", "tokens", "Tokens guessed.", sources=DRAFT),
    counter("ahead_trees", "trees", "Trees begun unasked, by their use.", AHEAD_END, sources=DRAFT),
    counter("ahead_passes", "steps", "Passes for trees that nobody had asked for.", sources=DRAFT),
    counter("ahead_rows", "rows", "Rows of those passes.", sources=DRAFT),
    histogram(
        "proposal_seconds", "seconds", "From a propose's arrival to its tree.", _FAST, sources=DRAFT
    ),
)

PROCESS = (
    gauge(
        "build_info",
        "info",
        "Always 1; the labels say which version runs and what it serves.",
        Label("version", most=1),
        Label("source", tuple(source.value for source in Source)),
        Label("model_hash", most=1),
        sources=ALL,
    ),
)

GROUPS: dict[str, tuple[Metric, ...]] = {
    "Speculation": SPECULATION,
    "Rounds and drafters": ROUNDS,
    "Requests": REQUESTS,
    "Workers, sessions and the store": SURVIVAL,
    "Inside a worker": WORK,
    "Process": PROCESS,
}
CATALOGUE: tuple[Metric, ...] = tuple(metric for group in GROUPS.values() for metric in group)
