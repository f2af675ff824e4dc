"""Expressions that more than one dashboard shows. This module knows nothing of Grafana's JSON."""

from __future__ import annotations

from specinfer_dashboards import promql
from specinfer_dashboards.panels import Query

# The targets that the alerts hold streams to: see deploy/prometheus/rules.
GOOD_FIRST_TOKEN_SECONDS = 2.5

ACCEPTED = promql.rate("spec_decode_num_accepted_tokens")
GUESSED = promql.rate("spec_decode_num_draft_tokens")
ACCEPTANCE = f"{ACCEPTED} / {GUESSED}"
SPEEDUP = (
    f"{promql.amount('tokens_per_round')} / {promql.amount('round_duration_seconds')}"
    f" * {promql.now('plain_round_seconds', over='avg')}"
)
FAILED_SHARE = f"{promql.rate('requests', promql.FAILED)} / {promql.rate('requests')}"
TOKENS_A_ROUND = promql.mean("tokens_per_round")


def quantiles(name: str, *matchers: str) -> tuple[Query, ...]:
    """The middle of a histogram and its tail."""
    return tuple(
        Query(promql.quantile(of, name, *matchers), f"p{of * 100:g}") for of in (0.5, 0.95, 0.99)
    )
