"""Which guesses are confirmed, and what the others cost. Knows nothing of Grafana's JSON."""

from __future__ import annotations

from dataclasses import replace

from specinfer_dashboards import promql, shared
from specinfer_dashboards.panels import Dashboard, Query, Row, Unit, bars, heat, lines

_ACCEPTANCE = (
    replace(
        lines(
            "Acceptance",
            Unit.SHARE,
            "Share of all guesses that the target confirmed. Wide trees guess more and so have a "
            "lower share: judge a fall together with tokens a round.",
            "AcceptanceFell",
            Query(shared.ACCEPTANCE, "of all guesses"),
            Query(
                promql.rate("spec_decode_num_accepted_tokens_per_pos", 'position="0"')
                + " / "
                + promql.rate("spec_decode_num_drafts"),
                "of first tokens",
            ),
        ),
        maximum=1.0,
    ),
    replace(
        bars(
            "Acceptance by depth",
            Unit.SHARE,
            "How often a guess at a depth was confirmed, of the rounds whose tree reached it; 0 is "
            "the first token. Where it is below a tenth, trees are too deep: lower the budget.",
            "AcceptanceFell",
            Query(
                promql.increase("spec_decode_num_accepted_tokens_per_pos", by="position")
                + " / ("
                + promql.increase("spec_decode_num_drafts_per_pos", by="position")
                + " > 0)",
                "{{position}}",
            ),
        ),
        maximum=1.0,
    ),
    replace(
        bars(
            "Acceptance by rank",
            Unit.SHARE,
            "How often the best guess below a node was confirmed, the second best and so on; 0 is "
            "the best. When the others bring nothing, narrower trees are cheaper.",
            "AcceptanceFell",
            Query(
                promql.increase("spec_decode_num_accepted_tokens_per_rank", by="rank")
                + " / ("
                + promql.increase("spec_decode_num_draft_tokens_per_rank", by="rank")
                + " > 0)",
                "{{rank}}",
            ),
        ),
        maximum=1.0,
    ),
    replace(
        lines(
            "Acceptance by drafter",
            Unit.SHARE,
            "Share of each drafter's guesses that were confirmed; `prediction` is the caller's "
            "own. One that is far below the others has the wrong model or tokenizer.",
            "AcceptanceFell",
            Query(
                promql.rate("drafter_accepted_tokens", by="drafter, worker")
                + " / "
                + promql.rate("drafter_draft_tokens", by="drafter, worker"),
                "{{drafter}} {{worker}}",
            ),
        ),
        maximum=1.0,
    ),
    heat(
        "Tokens a round",
        Unit.TOKENS,
        "What rounds brought: each is one event for its reader. A band at 1 is rounds whose first "
        "guess was wrong, or that had none.",
        "AcceptanceFell",
        Query(promql.buckets("tokens_per_round"), "{{le}}"),
    ),
    lines(
        "Mean tokens a round",
        Unit.TOKENS,
        "Plain decoding has 1, or up to 8 that come at a time with speculation off or no drafter. "
        "Compare with the mean nodes of a tree below: they are what a token more costs the target.",
        "AcceptanceFell",
        Query(shared.TOKENS_A_ROUND, "tokens a round"),
    ),
)

_TREES = (
    heat(
        "Nodes of a tree",
        Unit.TOKENS,
        "Guesses in rounds that had any. The policy makes trees smaller under load; small ones "
        "without load say that their budget or a request's options are low.",
        "SpeculationSlowsDown",
        Query(promql.buckets("tree_nodes"), "{{le}}"),
    ),
    heat(
        "Depth of a tree",
        Unit.COUNT,
        "Levels in rounds that had a tree. When trees end early, drafters were stopped by their "
        "deadline: see `late` and `stuck` (Draft).",
        "DraftersLate",
        Query(promql.buckets("tree_depth"), "{{le}}"),
    ),
    lines(
        "Mean size of a tree",
        Unit.COUNT,
        "Nodes and levels. When nodes grow and tokens a round do not, guesses are wasted: see "
        "acceptance by rank.",
        "SpeculationSlowsDown",
        Query(promql.mean("tree_nodes"), "nodes"),
        Query(promql.mean("tree_depth"), "levels"),
    ),
)

_WASTE = (
    replace(
        lines(
            "Wasted guesses",
            Unit.TOKENS_PER_SECOND,
            "Guesses of no use: not confirmed, too late, or beaten by a second drafter. Much "
            "`late` asks for a faster drafter or a longer `--propose-deadline`.",
            "DraftersLate",
            Query(promql.rate("wasted_draft_tokens", by="reason"), "{{reason}}"),
        ),
        stacked=True,
    ),
    replace(
        lines(
            "Rounds without guesses",
            Unit.ROUNDS_PER_SECOND,
            "By reason. `budget` is the policy's choice under load; `deadline`, `circuit_open` "
            "and `draft_error` are drafters that fail; `no_drafter` that none is there.",
            "DraftersLate",
            Query(promql.rate("root_only_rounds", by="reason"), "{{reason}}"),
        ),
        stacked=True,
    ),
    replace(
        lines(
            "Rounds with guesses",
            Unit.SHARE,
            "Share of rounds that had a tree. Below half, find the reason beside this panel "
            "before anything else.",
            "DraftersLate",
            Query(
                promql.rate("spec_decode_num_drafts") + " / " + promql.events("tokens_per_round"),
                "with guesses",
            ),
        ),
        maximum=1.0,
    ),
)

_ROUNDS = (
    replace(
        lines(
            "Mean round by part",
            Unit.SECONDS,
            "Where a round's time goes; the parts add up. Much `queue` asks for more verify "
            "workers, much `draft` for shallower trees, much `network` for nearer workers.",
            "SpeculationSlowsDown",
            Query(promql.mean("round_seconds", by="part"), "{{part}}"),
        ),
        stacked=True,
        width=12,
    ),
    replace(
        lines(
            "Round",
            Unit.SECONDS,
            "Whole rounds. Against the mean time of a plain round it says what a guess costs.",
            "SpeculationSlowsDown",
            *shared.quantiles("round_duration_seconds"),
            Query(promql.now("plain_round_seconds", over="avg"), "plain round"),
        ),
        width=12,
    ),
)

SPECULATION = Dashboard(
    "speculation",
    "Speculation",
    "Which guesses are confirmed, and what do the others cost?",
    (
        Row("Acceptance", _ACCEPTANCE),
        Row("Trees", _TREES),
        Row("Wasted and missing work", _WASTE),
        Row("Rounds", _ROUNDS),
    ),
)
