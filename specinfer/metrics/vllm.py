"""Our numbers under vLLM's names, so that dashboards made for vLLM show something.

Nothing is counted twice: the same series are shown a second time. vLLM's per-token gap is measured
between events there too, and an event may bring several tokens. This module knows nothing of who
counts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from prometheus_client.metrics_core import Metric as Shown
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from specinfer.metrics.instruments import Instruments
from specinfer.metrics.metric import PREFIX, Metric

VLLM = "vllm:"
# What vLLM calls an engine of a data-parallel group; here every process is one by itself.
ENGINE = {"engine": "0"}
_FINISHED = {
    "stop": "stop",
    "length": "length",
    "cancelled": "abort",
    "client_closed": "abort",
    "reader_stalled": "abort",
}


class VllmAliases(Collector):
    """Shows every metric of the catalogue that has a name at vLLM under that name too."""

    def __init__(self, instruments: Instruments) -> None:
        self._instruments = instruments

    def collect(self) -> Iterator[Shown]:
        """The aliases, as their originals are now."""
        for metric, shown in self._instruments.known_to_vllm():
            yield _alias(metric, shown)


def _alias(metric: Metric, shown: Shown) -> Shown:
    alias = Shown(VLLM + metric.vllm, shown.documentation, shown.type)
    alias.samples = [
        sample._replace(name=_name(metric, sample), labels=_labels(sample))
        for sample in shown.samples
    ]
    if metric.vllm == "request_success":
        alias.samples = _by_finish(alias.samples)
    return alias


def _name(metric: Metric, sample: Sample) -> str:
    return VLLM + metric.vllm + sample.name.removeprefix(PREFIX + metric.name)


def _labels(sample: Sample) -> dict[str, str]:
    labels = {name: value for name, value in sample.labels.items() if name != "tier"}
    return {**labels, **ENGINE}


def _by_finish(samples: list[Sample]) -> list[Sample]:
    """Outcomes as vLLM's finish reasons: stop, length, abort, and error for the rest."""
    sums: dict[str, float] = defaultdict(float)
    for sample in samples:
        sums[_FINISHED.get(sample.labels["outcome"], "error")] += sample.value
    rest = {name: value for name, value in samples[0].labels.items() if name != "outcome"}
    name = samples[0].name
    return [
        Sample(name, {**rest, "finished_reason": reason}, total) for reason, total in sums.items()
    ]
