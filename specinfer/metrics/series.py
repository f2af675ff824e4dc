"""One series of numbers: what is counted, at the price of an addition.

The client library takes a lock, checks labels and scans buckets at each of the thirty numbers of a
round, which costs a tenth of a router's time. A series here has one writer, the thread that counts,
and is read at each scrape from wherever. This module knows nothing of names, labels or what the
numbers mean.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

from prometheus_client.core import (
    CounterMetricFamily,
    Exemplar,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.utils import floatToGoString


class Series(ABC):
    """Numbers of one set of label values."""

    @abstractmethod
    def show(self, family: object, labels: Sequence[str]) -> None:
        """Add what it is now to the library's family of its kind."""


class Count(Series):
    """What grows by being counted.

    Attributes:
        value: the sum so far.
    """

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, amount: float = 1.0) -> None:
        """Add to it; `amount` is not negative."""
        self.value += amount

    def show(self, family: object, labels: Sequence[str]) -> None:
        """Add it to a CounterMetricFamily."""
        assert isinstance(family, CounterMetricFamily)
        family.add_metric(labels, self.value)


class Level(Count):
    """What goes up and down."""

    __slots__ = ()

    def dec(self, amount: float = 1.0) -> None:
        """Take away from it."""
        self.value -= amount

    def show(self, family: object, labels: Sequence[str]) -> None:
        """Add it to a GaugeMetricFamily."""
        assert isinstance(family, GaugeMetricFamily)
        family.add_metric(labels, self.value)


class Distribution(Series):
    """How often which values came.

    Args:
        bounds: upper bounds of the buckets, ascending; beyond the last there is one more.
    """

    __slots__ = ("_bounds", "_counts", "_exemplars", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = (*bounds, float("inf"))
        self._counts = [0] * len(self._bounds)
        self._exemplars: dict[int, Exemplar] = {}
        self._sum = 0.0

    def observe(
        self, value: float, exemplar: Mapping[str, str] | None = None, *, times: int = 1
    ) -> None:
        """Count a value that came `times` times, which `exemplar` names a trace of."""
        bucket = bisect_left(self._bounds, value)
        self._counts[bucket] += times
        self._sum += times * value
        if exemplar is not None:
            self._exemplars[bucket] = Exemplar(dict(exemplar), value, time.time())

    def observe_all(self, values: Sequence[float]) -> None:
        """Count every one of them."""
        bounds, counts = self._bounds, self._counts
        for value in values:
            counts[bisect_left(bounds, value)] += 1
        self._sum += sum(values)

    def show(self, family: object, labels: Sequence[str]) -> None:
        """Add it to a HistogramMetricFamily."""
        assert isinstance(family, HistogramMetricFamily)
        buckets: list[tuple[str, float] | tuple[str, float, Exemplar]] = []
        totals = accumulate(list(self._counts))
        for bucket, (bound, total) in enumerate(zip(self._bounds, totals, strict=True)):
            exemplar = self._exemplars.get(bucket)
            name = _bound_name(bound)
            buckets.append((name, total) if exemplar is None else (name, total, exemplar))
        family.add_metric(labels, buckets, self._sum)


def _bound_name(bound: float) -> str:
    """A bucket's bound as the library writes it."""
    write: Callable[[float], str] = floatToGoString
    return write(bound)
