"""Expressions over the catalogue's metrics, so that no panel can ask for one that nobody shows.

Each takes a name without the prefix, and matchers such as `outcome="stop"`; the dashboard's
variables `model_name` and `router`, `verify` or `draft` (instances of who shows it) are matched as
well. A metric, a label or a kind that the catalogue does not have raises KeyError. This module
knows nothing of panels.
"""

from __future__ import annotations

import re

from specinfer.metrics.catalogue import CATALOGUE
from specinfer.metrics.metric import Kind, Metric, Source

MODEL = 'model_name=~"$model_name"'
EVERYWHERE = ("model_name", "instance", "job", "tier", "le")
# How requests end that the caller brought about, or that a client goes on with by itself.
NOT_FAILED = (
    *("stop", "length", "cancelled", "client_closed", "reader_stalled", "resource_exhausted"),
    *("invalid_request", "invalid_checkpoint", "not_found", "permission_denied"),
    *("unauthenticated", "router_leaving", "lease_lost", "stale_epoch"),
)
FAILED = f'outcome!~"{"|".join(NOT_FAILED)}"'
_BY_NAME = {metric.name: metric for metric in CATALOGUE}


def rate(name: str, *matchers: str, by: str = "") -> str:
    """How much a counter grows a second, summed by labels."""
    metric = _metric(name, (Kind.COUNTER,), matchers, by)
    return f"{_over('sum', by)} (rate({_series(metric, matchers)}[$__rate_interval]))"


def increase(name: str, *matchers: str, by: str = "") -> str:
    """How much a counter has grown within the shown time, summed by labels."""
    metric = _metric(name, (Kind.COUNTER,), matchers, by)
    return f"{_over('sum', by)} (increase({_series(metric, matchers)}[$__range]))"


def now(name: str, *matchers: str, by: str = "", over: str = "sum") -> str:
    """What a gauge says, summed by labels, or put together by another operator."""
    metric = _metric(name, (Kind.GAUGE,), matchers, by)
    return f"{_over(over, by)} ({_series(metric, matchers)})"


def events(name: str, *matchers: str, by: str = "") -> str:
    """How many values a histogram takes a second."""
    return _part(name, "count", matchers, by)


def amount(name: str, *matchers: str, by: str = "") -> str:
    """How much the values of a histogram add up to a second."""
    return _part(name, "sum", matchers, by)


def mean(name: str, *matchers: str, by: str = "") -> str:
    """The mean of a histogram's values."""
    return f"{amount(name, *matchers, by=by)} / {events(name, *matchers, by=by)}"


def quantile(of: float, name: str, *matchers: str, by: str = "") -> str:
    """What a share of a histogram's values does not exceed."""
    return f"histogram_quantile({of:g}, {buckets(name, *matchers, by=by)})"


def buckets(name: str, *matchers: str, by: str = "") -> str:
    """Values a second by bucket, for a heat map."""
    return _part(name, "bucket", matchers, f"le, {by}" if by else "le")


def _part(name: str, part: str, matchers: tuple[str, ...], by: str) -> str:
    metric = _metric(name, (Kind.HISTOGRAM,), matchers, by)
    series = _series(metric, matchers, f"_{part}")
    return f"{_over('sum', by)} (rate({series}[$__rate_interval]))"


def _over(operator: str, by: str) -> str:
    return f"{operator} by ({by})" if by else operator


def _series(metric: Metric, matchers: tuple[str, ...], part: str = "") -> str:
    instance = f'instance=~"${_shown_by(metric, matchers)}"'
    return f"{metric.shown}{part}{{{','.join((MODEL, instance, *matchers))}}}"


def _shown_by(metric: Metric, matchers: tuple[str, ...]) -> Source:
    if len(metric.sources) == 1:
        return metric.sources[0]
    for source in metric.sources:
        if f'tier="{source}"' in matchers:
            return source
    raise KeyError(f"{metric.name} is shown by several tiers: say which")


def _metric(name: str, kinds: tuple[Kind, ...], matchers: tuple[str, ...], by: str) -> Metric:
    metric = _BY_NAME[name]
    if metric.kind not in kinds:
        raise KeyError(f"{name} is a {metric.kind} in the catalogue")
    known = {*EVERYWHERE, *(label.name for label in metric.labels)}
    asked = {*re.findall(r"\w+", by), *(re.split(r"[=!]", matcher)[0] for matcher in matchers)}
    if not asked <= known:
        raise KeyError(f"{name} has no label {', '.join(sorted(asked - known))}")
    return metric
