"""Whether drafters answer in time, and what they do. Knows nothing of Grafana's JSON."""

from __future__ import annotations

from dataclasses import replace

from specinfer_dashboards import promql, shared
from specinfer_dashboards.panels import Dashboard, Kind, Query, Row, Unit, heat, lines

DRAFT = 'tier="draft"'
_STATES = (("0", "trusted", "green"), ("1", "one try", "orange"), ("2", "cut off", "red"))

_ANSWERS = (
    lines(
        "Round trip to a drafter",
        Unit.SECONDS,
        "From asking to having the tree; late ones are not in it. When it nears the deadline, "
        "trees should be shallower or the drafter faster.",
        "DraftersLate",
        *shared.quantiles("draft_round_trip_seconds"),
    ),
    heat(
        "Round trips",
        Unit.SECONDS,
        "A second band above the first is a drafter that is slower than the others, or one that "
        "reads prompts meanwhile.",
        "DraftersLate",
        Query(promql.buckets("draft_round_trip_seconds"), "{{le}}"),
    ),
    lines(
        "Late trees",
        Unit.PER_SECOND,
        "Trees that missed their deadline, by drafter; the round went on without. One drafter: "
        "look at its machine. All: the network, or `--propose-deadline` is too short.",
        "DraftersLate",
        Query(
            promql.rate("late_trees", by="worker"),
            "{{worker}}",
        ),
    ),
    lines(
        "Second asks",
        Unit.PER_SECOND,
        "Proposes that an idle second drafter was asked for too, and those that it answered "
        "first. Many wins: the first drafters are too slow for what is asked of them.",
        "DraftersLate",
        Query(promql.rate("hedged_proposes"), "asked"),
        Query(promql.rate("hedge_wins"), "won"),
    ),
    replace(
        lines(
            "Breakers",
            Unit.COUNT,
            "Whether a worker of either tier is trusted. One that is cut off is tried again by "
            "itself after a rest; one that stays so is ill.",
            "BreakerOpen",
            Query(
                promql.now("breaker_state", by="tier, worker", over="max"), "{{tier}} {{worker}}"
            ),
        ),
        kind=Kind.STATES,
        states=_STATES,
    ),
    lines(
        "Breakers opened",
        Unit.PER_SECOND,
        "How often workers were cut off. One that opens again and again is found by its worker "
        "label; drain it.",
        "BreakerOpen",
        Query(promql.rate("breaker_openings", by="tier, worker"), "{{tier}} {{worker}}"),
    ),
)

_WORK = (
    lines(
        "Proposals by how they ended",
        Unit.PER_SECOND,
        "`done` reached the asked shape, `late` was cut by the deadline, `stuck` had nothing more "
        "to guess. Much `late`: the drafter is overloaded.",
        "DraftersLate",
        Query(promql.rate("proposals", by="outcome"), "{{outcome}}"),
    ),
    lines(
        "Time of a proposal",
        Unit.SECONDS,
        "Inside the worker, from arrival to tree. The rest of the round trip is the network and "
        "the router.",
        "DraftersLate",
        *shared.quantiles("proposal_seconds"),
    ),
    lines(
        "Tokens proposed",
        Unit.TOKENS_PER_SECOND,
        "By worker. One without any is not asked: see its breaker, and whether its tokenizer fits "
        "(`specinfer doctor`).",
        "BreakerOpen",
        Query(promql.rate("proposed_tokens", by="instance"), "{{instance}}"),
    ),
    lines(
        "Time of a pass",
        Unit.SECONDS,
        "A tree takes a pass for each level. When it grows with the same rows, something else "
        "uses the machine.",
        "DraftersLate",
        *shared.quantiles("step_seconds", DRAFT),
    ),
    heat(
        "Rows of a pass",
        Unit.COUNT,
        "Rows are prompt tokens and nodes. Passes of few rows are cheap to share: one drafter can "
        "feed more sessions.",
        "DraftersLate",
        Query(promql.buckets("step_rows", DRAFT), "{{le}}"),
    ),
    heat(
        "Sessions of a pass",
        Unit.COUNT,
        "How many sessions share a pass. When it is high and proposals are late, add drafters: "
        "`--scale draft=3`.",
        "DraftersLate",
        Query(promql.buckets("step_sessions", DRAFT), "{{le}}"),
    ),
)

_AHEAD = (
    lines(
        "Trees begun ahead",
        Unit.PER_SECOND,
        "Begun while the target verified, and whether its answer made them useful. Mostly `miss`: "
        "the drafter works for nothing; start it with `--ahead off` where it shares its machine.",
        "DraftersLate",
        Query(promql.rate("ahead_trees", by="outcome"), "{{outcome}}"),
    ),
    lines(
        "Work ahead",
        Unit.PER_SECOND,
        "Passes for trees that nobody had asked for, and their rows. They take the time that the "
        "drafter has left; what is asked for goes first.",
        "DraftersLate",
        Query(promql.rate("ahead_passes"), "passes"),
        Query(promql.rate("ahead_rows"), "rows"),
    ),
)

_LOAD = (
    replace(
        lines(
            "Share of time that passes take",
            Unit.SHARE,
            "1 is a drafter that computes all the time: sessions wait for it; add another.",
            "DraftersLate",
            Query(promql.amount("step_seconds", DRAFT, by="instance"), "{{instance}}"),
        ),
        maximum=1.0,
    ),
    lines(
        "Steps waiting and sessions open",
        Unit.COUNT,
        "When steps wait all the time, add drafters; when one has all sessions, look at the "
        "breakers of the others.",
        "DraftersLate",
        Query(promql.now("num_steps_waiting", DRAFT, by="instance"), "{{instance}} waiting"),
        Query(promql.now("num_sessions", DRAFT, by="instance"), "{{instance}} sessions"),
    ),
    replace(
        lines(
            "KV cache in use",
            Unit.SHARE,
            "A drafter that is full takes no more sessions, and those go on without guesses: "
            "raise its `--kv-blocks`.",
            "KvNearlyFull",
            Query(
                promql.now("kv_cache_usage_ratio", DRAFT, by="instance", over="max"),
                "{{instance}}",
            ),
        ),
        maximum=1.0,
    ),
)

DRAFT_BOARD = Dashboard(
    "draft",
    "Draft",
    "Do drafters answer in time, and what do they do?",
    (
        Row("Answers, as routers see them", _ANSWERS),
        Row("Work", _WORK),
        Row("Ahead", _AHEAD),
        Row("Load", _LOAD),
    ),
)
