"""The catalogue's metrics of one process: what it counts itself, and what is asked at each scrape.

A label takes the values that the catalogue allows and no others, so that nobody can make series at
will. This module knows nothing of what the numbers mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import product
from typing import Any, Generic, TypeVar

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric as Shown
from prometheus_client.registry import Collector

from specinfer.metrics.catalogue import CATALOGUE
from specinfer.metrics.metric import OTHER, Kind, Label, Metric, Source
from specinfer.metrics.series import Count, Distribution, Level, Series

# Series with known labels begin at 0, so that the first event is a rise; more than so many do not.
MAX_AT_ZERO = 64

Read = Callable[[], Mapping[tuple[str, ...], float]]
_Series = TypeVar("_Series", bound=Series)
_FAMILIES: dict[Kind, Callable[..., Any]] = {
    Kind.COUNTER: CounterMetricFamily,
    Kind.GAUGE: GaugeMetricFamily,
    Kind.HISTOGRAM: HistogramMetricFamily,
}


class Bound:
    """Maps the values of one label to those that it may have."""

    def __init__(self, label: Label) -> None:
        self._most = label.most
        self._known = set(label.values)

    def __call__(self, value: str) -> str:
        """`value`, or "other" when it is not one of the label's or came too late."""
        if value in self._known:
            return value
        if len(self._known) < self._most:
            self._known.add(value)
            return value
        return OTHER

    def forget(self, value: str) -> None:
        """Make room for another value."""
        if self._most:
            self._known.discard(value)


class Family(Collector, Generic[_Series]):
    """One metric with its series; `of` gives the series of some label values."""

    def __init__(
        self,
        metric: Metric,
        make: Callable[[], _Series],
        fixed: Mapping[str, str],
        before_shown: Callable[[], None],
    ) -> None:
        self.metric = metric
        self._before_shown = before_shown
        self._make = make
        self._fixed = fixed
        self._bounds = tuple(Bound(label) for label in metric.labels)
        self._series: dict[tuple[str, ...], _Series] = {}
        for values in _at_zero(metric):
            self.of(*values)

    def of(self, *values: str) -> _Series:
        """The series of these values of the metric's own labels, in the catalogue's order."""
        found = self._series.get(values)
        if found is not None:
            return found
        bounded = tuple(bound(value) for bound, value in zip(self._bounds, values, strict=True))
        if bounded not in self._series:
            self._series[bounded] = self._make()
        return self._series[bounded]

    def forget(self, label: str, value: str) -> None:
        """Drop the series of a value that will not come again, and give its place to others."""
        place = [item.name for item in self.metric.labels].index(label)
        for values in [values for values in self._series if values[place] == value]:
            del self._series[values]
        self._bounds[place].forget(value)

    def collect(self) -> Iterator[Shown]:
        """All series, as they are now."""
        self._before_shown()
        shown = _family(self.metric, self._fixed)
        # Copied at once: the thread that counts may begin a series meanwhile.
        for values, series in tuple(self._series.items()):
            series.show(shown, [*self._fixed.values(), *values])
        yield shown


class Watched(Collector):
    """Metrics that somebody else keeps: they are read at each scrape."""

    def __init__(self, fixed: Mapping[str, str]) -> None:
        self._fixed = dict(fixed)
        self._reads: dict[str, tuple[Metric, Read]] = {}

    def add(self, metric: Metric, read: Read) -> None:
        """Show `metric` with what `read` says, by the values of its own labels."""
        self._reads[metric.name] = (metric, read)

    def collect(self) -> Iterator[Shown]:
        """All of them, as they are now."""
        return (shown for _, shown in self.shown())

    def shown(self) -> Iterator[tuple[Metric, Shown]]:
        """All of them, as they are now, beside their entries in the catalogue."""
        for metric, read in self._reads.values():
            yield metric, self._shown(metric, read())

    def _shown(self, metric: Metric, numbers: Mapping[tuple[str, ...], float]) -> Shown:
        shown = _family(metric, self._fixed)
        family: Any = shown
        bounds = [Bound(label) for label in metric.labels]
        begun = _at_zero(metric) if metric.kind is Kind.COUNTER else ()
        sums: dict[tuple[str, ...], float] = dict.fromkeys(begun, 0.0)
        for values, number in numbers.items():
            bounded = tuple(bound(value) for bound, value in zip(bounds, values, strict=True))
            sums[bounded] = sums.get(bounded, 0.0) + number
        for bounded, number in sums.items():
            family.add_metric([*self._fixed.values(), *bounded], number)
        return shown


class Instruments:
    """Every metric of the catalogue that a process of this kind shows.

    Args:
        registry: what is exposed; it takes one process.
        source: which process it is.
        fixed: labels that all its metrics carry, such as the model's name.
    """

    def __init__(
        self, registry: CollectorRegistry, source: Source, fixed: Mapping[str, str]
    ) -> None:
        self._source = source
        self._fixed = dict(fixed)
        self._registry = registry
        self._families: dict[str, Family[Any]] = {}
        self._watched = Watched(self._fixed)
        self._settle: list[Callable[[], None]] = []
        registry.register(self._watched)
        ProcessCollector(registry=registry)

    def counter(self, name: str) -> Family[Count]:
        """A counter of the catalogue."""
        return self._of_kind(name, Kind.COUNTER, Count)

    def gauge(self, name: str) -> Family[Level]:
        """A gauge of the catalogue that is moved up and down."""
        return self._of_kind(name, Kind.GAUGE, Level)

    def histogram(self, name: str) -> Family[Distribution]:
        """A histogram of the catalogue."""
        return self._of_kind(name, Kind.HISTOGRAM, lambda: Distribution(_BY_NAME[name].buckets))

    def before_shown(self, settle: Callable[[], None]) -> None:
        """Call `settle`, from whichever thread looks, before any series of ours is shown."""
        self._settle.append(settle)

    def watch(self, name: str, read: Read) -> None:
        """Ask `read` for a gauge or counter at each scrape, by the values of its own labels."""
        metric = self._metric(name, (Kind.COUNTER, Kind.GAUGE))
        self._watched.add(metric, read)

    def watch_one(self, name: str, read: Callable[[], float]) -> None:
        """Ask `read` for a gauge or counter without labels of its own at each scrape."""
        self.watch(name, lambda: {(): read()})

    def forget(self, label: str, value: str) -> None:
        """Drop every series of a label's value, such as a worker that left for good."""
        self._settle_all()
        for family in self._families.values():
            if any(item.name == label for item in family.metric.labels):
                family.forget(label, value)

    def known_to_vllm(self) -> Iterator[tuple[Metric, Shown]]:
        """What is shown now and has a name at vLLM, beside its entry in the catalogue."""
        for family in self._families.values():
            if family.metric.vllm:
                for shown in family.collect():
                    yield family.metric, shown
        for metric, shown in self._watched.shown():
            if metric.vllm:
                yield metric, shown

    def _of_kind(self, name: str, kind: Kind, make: Callable[[], _Series]) -> Family[_Series]:
        if name not in self._families:
            metric = self._metric(name, (kind,))
            self._families[name] = Family(metric, make, self._fixed, self._settle_all)
            self._registry.register(self._families[name])
        return self._families[name]

    def _settle_all(self) -> None:
        for settle in self._settle:
            settle()

    def _metric(self, name: str, kinds: Iterable[Kind]) -> Metric:
        metric = _BY_NAME[name]
        if metric.kind not in kinds or self._source not in metric.sources:
            raise KeyError(f"{name} is no {'/'.join(kinds)} of {self._source} in the catalogue")
        return metric


def _family(metric: Metric, fixed: Mapping[str, str]) -> Shown:
    """A metric as the library shows it, without any series."""
    names = [*fixed, *(label.name for label in metric.labels)]
    family: Shown = _FAMILIES[metric.kind](metric.family, metric.help, labels=names)
    return family


def _at_zero(metric: Metric) -> list[tuple[str, ...]]:
    """The label values of the series that are there before anything happens."""
    known = list(product(*(label.values for label in metric.labels)))
    return known if len(known) <= MAX_AT_ZERO else []


_BY_NAME = {metric.name: metric for metric in CATALOGUE}
