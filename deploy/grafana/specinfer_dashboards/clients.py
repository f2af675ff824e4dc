"""What callers see and who they are. This module knows nothing of Grafana's JSON."""

from __future__ import annotations

from dataclasses import replace

from specinfer_dashboards import promql, shared
from specinfer_dashboards.panels import Dashboard, Query, Row, Unit, heat, lines

_WAITING = (
    lines(
        "Time to first token",
        Unit.SECONDS,
        "What a user waits before anything moves. Compare with the time in the queue beside it: "
        "the difference is the reading of the prompt.",
        "FirstTokensLate",
        *shared.quantiles("time_to_first_token_seconds"),
    ),
    heat(
        "Time to first token, all requests",
        Unit.SECONDS,
        "Two bands are two kinds of request. A band that moves up is load.",
        "FirstTokensLate",
        Query(promql.buckets("time_to_first_token_seconds"), "{{le}}"),
    ),
    lines(
        "Time in the queue",
        Unit.SECONDS,
        "How long requests waited for their place. Lasting waits ask for verify workers, or for "
        "more places where KV blocks are left.",
        "RequestsRefused",
        *shared.quantiles("request_queue_time_seconds"),
    ),
)

_PACE = (
    lines(
        "Gap between two events",
        Unit.SECONDS,
        "An event brings all tokens of a round, so a reader sees steps of this length. A long "
        "tail is pauses: prompts of others, workers that were changed.",
        "SpeculationSlowsDown",
        *shared.quantiles("inter_event_seconds"),
    ),
    heat(
        "Gaps between events",
        Unit.SECONDS,
        "A second band far above the first is pauses that readers notice.",
        "SpeculationSlowsDown",
        Query(promql.buckets("inter_event_seconds"), "{{le}}"),
    ),
    lines(
        "Time per token of a request",
        Unit.SECONDS,
        "A request's mean after its first event; what many call inter-token latency.",
        "SpeculationSlowsDown",
        *shared.quantiles("request_time_per_output_token_seconds"),
    ),
    lines(
        "Whole request",
        Unit.SECONDS,
        "From arrival to end. It follows the length of answers: judge it with the tokens below.",
        "FirstTokensLate",
        *shared.quantiles("e2e_request_latency_seconds"),
    ),
    lines(
        "Tokens an event",
        Unit.TOKENS,
        "How many tokens come at once. With 1 nothing was guessed.",
        "AcceptanceFell",
        Query(shared.TOKENS_A_ROUND, "mean"),
        Query(promql.quantile(0.95, "tokens_per_round"), "p95"),
    ),
    lines(
        "Mean length of prompts and answers",
        Unit.TOKENS,
        "When latency changed and these did too, callers ask something else than before.",
        "FirstTokensLate",
        Query(f"{promql.rate('prompt_tokens')} / {promql.rate('requests')}", "prompt"),
        Query(f"{promql.rate('generation_tokens')} / {promql.rate('requests')}", "answer"),
    ),
)

_ACCESS = (
    lines(
        "Running and waiting",
        Unit.COUNT,
        "When somebody always waits, the next panel shows whether they are refused in the end.",
        "RequestsRefused",
        Query(promql.now("num_requests_running"), "running"),
        Query(promql.now("num_requests_waiting"), "waiting"),
    ),
    replace(
        lines(
            "Refused requests",
            Unit.REQUESTS,
            "By reason. `tokens_per_minute` and `requests_per_minute` are a key's limits; raise "
            "them with `specinfer keys` if the caller should have more.",
            "RequestsRefused",
            Query(promql.rate("admission_refusals", by="reason"), "{{reason}}"),
        ),
        stacked=True,
    ),
    replace(
        lines(
            "Requests by outcome",
            Unit.REQUESTS,
            "`reader_stalled` is a client that does not read, `invalid_request` one that asks "
            "wrongly; the log of the router has the id of each.",
            "StreamsFail",
            Query(promql.rate("requests", by="outcome") + " > 0", "{{outcome}}"),
        ),
        stacked=True,
    ),
    lines(
        "Requests by key",
        Unit.REQUESTS,
        "Who asks, by the id of the key. One key with most of it may deserve a limit of its own.",
        "RequestsRefused",
        Query(f"topk(10, {promql.rate('key_requests', by='key')})", "{{key}}"),
    ),
    lines(
        "Tokens by key",
        Unit.TOKENS_PER_SECOND,
        "Prompt and generated tokens together, by the id of the key.",
        "RequestsRefused",
        Query(f"topk(10, {promql.rate('key_tokens', by='key')})", "{{key}}"),
    ),
    lines(
        "Tokens by kind",
        Unit.TOKENS_PER_SECOND,
        "What keys' requests were made of. Prompts that outweigh answers by far are cheaper with "
        "a shared beginning: the prefix cache finds it.",
        "KvNearlyFull",
        Query(promql.rate("key_tokens", by="kind"), "{{kind}}"),
    ),
)

CLIENTS = Dashboard(
    "clients",
    "Clients",
    "What do callers see, and who are they?",
    (Row("Waiting", _WAITING), Row("Pace", _PACE), Row("Access", _ACCESS)),
)
