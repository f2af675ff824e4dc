"""The series of a panel, as a Prometheus has them. Knows nothing of how they are drawn."""

from __future__ import annotations

import json
import re
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from specinfer_dashboards.panels import Kind, Panel, Query

RATE_SECONDS = 20


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        legend: what it is called.
        times: seconds since the first shown moment, rising.
        values: one for each time; not a number where there is none.
    """

    legend: str
    times: tuple[float, ...]
    values: tuple[float, ...]


class Reader:
    """Asks a Prometheus for everything between two moments, all values of the variables chosen."""

    def __init__(self, url: str, start: float, end: float, step: float) -> None:
        self._url = url
        self._start, self._end, self._step = start, end, step

    def read(self, panel: Panel) -> list[Series]:
        """The series of all queries of a panel, in the order of their legends."""
        found = [each for query in panel.queries for each in self._query(panel, query)]
        return found if len(panel.queries) > 1 else sorted(found, key=_order)

    def _query(self, panel: Panel, query: Query) -> Iterator[Series]:
        text = query.expression.replace("$__rate_interval", f"{RATE_SECONDS}s")
        text = text.replace("$__range", f"{self._end - self._start:.0f}s")
        text = re.sub(r"\$(model_name|router|verify|draft)\b", ".*", text)
        if panel.kind is Kind.BARS:
            found = self._ask("query", query=text, time=self._end)
            rows = [(each["metric"], [each["value"]]) for each in found]
        else:
            span = {"start": self._start, "end": self._end, "step": self._step}
            found = self._ask("query_range", query=text, **span)
            rows = [(each["metric"], each["values"]) for each in found]
        for labels, points in rows:
            legend = _filled(query.legend, labels)
            times = tuple(float(when) - self._start for when, _ in points)
            yield Series(legend, times, tuple(float(value) for _, value in points))

    def _ask(self, path: str, **query: str | float) -> list[dict[str, Any]]:
        address = f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(address) as answer:
            result: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        return result


def _order(series: Series) -> tuple[float, str]:
    """By number where legends are numbers, such as upper bounds of buckets."""
    try:
        return (float(series.legend), "")
    except ValueError:
        return (0.0, series.legend)


def _filled(legend: str, labels: dict[str, str]) -> str:
    """A legend with the labels' values in their places."""
    return re.sub(r"{{(\w+)}}", lambda name: labels.get(name[1], ""), legend)
