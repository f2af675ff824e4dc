"""What one metric is: name, kind, unit, labels with their bounds, buckets and meaning.

This module knows nothing of what is counted or how it leaves the process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

PREFIX = "specinfer_"
OTHER = "other"


class Kind(StrEnum):
    """How a metric moves."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Source(StrEnum):
    """Whose `/metrics` shows a metric."""

    ROUTER = "router"
    VERIFY = "verify"
    DRAFT = "draft"


@dataclass(frozen=True)
class Label:
    """A label and every value that it may take.

    Attributes:
        name: of the label.
        values: all values it takes, when they are known; anything else is "other".
        most: how many values it may take when they are not known; the first that come have a
            value of their own, and the rest is "other".
    """

    name: str
    values: tuple[str, ...] = ()
    most: int = 0

    @property
    def num_values(self) -> int:
        """Most values the label can ever have, "other" included."""
        return len(self.values or range(self.most)) + 1


@dataclass(frozen=True)
class Metric:
    """One entry of the catalogue.

    Attributes:
        name: without the prefix, and without the `_total` that counters are shown with.
        kind: how it moves.
        unit: of its value, such as "seconds" or "tokens".
        help: what it says, in one or two sentences.
        sources: the processes that show it.
        labels: besides `model_name`, and `tier` at a worker.
        buckets: upper bounds of a histogram.
        vllm: name under which vLLM's dashboards look for it, or "".
    """

    name: str
    kind: Kind
    unit: str
    help: str
    sources: tuple[Source, ...]
    labels: tuple[Label, ...] = ()
    buckets: tuple[float, ...] = ()
    vllm: str = ""

    @property
    def family(self) -> str:
        """Its name as the library wants it."""
        return PREFIX + self.name

    @property
    def shown(self) -> str:
        """Its name in queries; a histogram's is continued by _bucket, _sum or _count."""
        return f"{self.family}_total" if self.kind is Kind.COUNTER else self.family


def counter(
    name: str,
    unit: str,
    help_text: str,
    *labels: Label,
    sources: Sequence[Source] = (Source.ROUTER,),
    vllm: str = "",
) -> Metric:
    """What only grows."""
    return Metric(name, Kind.COUNTER, unit, help_text, tuple(sources), labels, vllm=vllm)


def gauge(
    name: str,
    unit: str,
    help_text: str,
    *labels: Label,
    sources: Sequence[Source] = (Source.ROUTER,),
    vllm: str = "",
) -> Metric:
    """What is so now."""
    return Metric(name, Kind.GAUGE, unit, help_text, tuple(sources), labels, vllm=vllm)


def histogram(
    name: str,
    unit: str,
    help_text: str,
    buckets: tuple[float, ...],
    *labels: Label,
    sources: Sequence[Source] = (Source.ROUTER,),
    vllm: str = "",
) -> Metric:
    """How something is distributed."""
    return Metric(name, Kind.HISTOGRAM, unit, help_text, tuple(sources), labels, buckets, vllm)
