"""What a dashboard is: rows of panels, each with its queries, its unit and what to do about it.

This module knows nothing of Grafana's JSON or of any particular metric.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """How a panel is drawn; none of them is deprecated."""

    LINES = "timeseries"
    NUMBER = "stat"
    BARS = "bargauge"
    HEAT = "heatmap"
    STATES = "state-timeline"


class Unit(StrEnum):
    """What a panel's numbers are, by Grafana's names."""

    SECONDS = "s"
    SHARE = "percentunit"
    TIMES = "suffix:x"
    COUNT = "none"
    BYTES = "bytes"
    PER_SECOND = "cps"
    REQUESTS = "reqps"
    TOKENS = "suffix: tokens"
    TOKENS_PER_SECOND = "suffix: tokens/s"
    ROUNDS_PER_SECOND = "suffix: rounds/s"
    ROWS_PER_SECOND = "suffix: rows/s"
    SECONDS_PER_SECOND = "suffix: s/s"


@dataclass(frozen=True)
class Query:
    """One expression.

    Attributes:
        expression: PromQL with the dashboard's variables in it.
        legend: of its series, with labels as {{label}}.
    """

    expression: str
    legend: str = ""


@dataclass(frozen=True)
class Step:
    """From which value on a number has which colour; from None on for the lowest."""

    value: float | None
    color: str


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        title: short.
        unit: of all its numbers.
        advice: what it shows, and what to do when it looks wrong.
        runbook: title of the entry in docs/runbook.md that goes on from there.
        queries: at least one.
        kind: how it is drawn.
        width, height: in Grafana's grid of 24 columns.
        stacked: whether its lines are areas on top of each other.
        maximum: of its axis, where that is known.
        steps: colours by value.
        states: words for the values of a gauge that says a state.
    """

    title: str
    unit: Unit
    advice: str
    runbook: str
    queries: tuple[Query, ...]
    kind: Kind = Kind.LINES
    width: int = 8
    height: int = 8
    stacked: bool = False
    maximum: float | None = None
    steps: tuple[Step, ...] = ()
    states: tuple[tuple[str, str, str], ...] = ()


@dataclass(frozen=True)
class Row:
    """Panels below a heading."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Dashboard:
    """One dashboard.

    Attributes:
        name: of its file and in its address.
        title: what people call it.
        about: which questions it answers.
        rows: from top to bottom.
    """

    name: str
    title: str
    about: str
    rows: tuple[Row, ...]

    @property
    def panels(self) -> tuple[Panel, ...]:
        """All panels, from top to bottom."""
        return tuple(panel for row in self.rows for panel in row.panels)


def lines(title: str, unit: Unit, advice: str, runbook: str, *queries: Query) -> Panel:
    """A panel of lines over time; change a copy with dataclasses.replace for what is special."""
    return Panel(title, unit, advice, runbook, queries)


def number(title: str, unit: Unit, advice: str, runbook: str, query: Query) -> Panel:
    """One number, small."""
    return Panel(title, unit, advice, runbook, (query,), Kind.NUMBER, width=4, height=5)


def heat(title: str, unit: Unit, advice: str, runbook: str, query: Query) -> Panel:
    """A distribution over time."""
    return Panel(title, unit, advice, runbook, (query,), Kind.HEAT)


def bars(title: str, unit: Unit, advice: str, runbook: str, *queries: Query) -> Panel:
    """One bar for each value of a label, of the shown time."""
    return Panel(title, unit, advice, runbook, queries, Kind.BARS)
