"""Pictures of dashboards. This module knows nothing of where the numbers came from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from specinfer_dashboards.panels import Dashboard, Kind, Panel, Unit
from specinfer_dashboards.reading import Series

NUM_COLUMNS = 3
MAX_LEGENDS = 8
_LABELS = {
    Unit.SECONDS: "seconds",
    Unit.SHARE: "share",
    Unit.TIMES: "times",
    Unit.COUNT: "",
    Unit.BYTES: "bytes",
    Unit.PER_SECOND: "a second",
    Unit.REQUESTS: "requests/s",
}


def draw(board: Dashboard, shown: Mapping[Panel, Sequence[Series]], place: Path) -> None:
    """Write one picture with all panels of a dashboard."""
    mpl.use("Agg")
    num_rows = math.ceil(len(board.panels) / NUM_COLUMNS)
    figure = Figure(figsize=(6 * NUM_COLUMNS, 0.7 + 3.1 * num_rows), layout="constrained")
    figure.suptitle(f"specinfer: {board.title}", fontsize=15, fontweight="bold")
    grid = figure.subplots(num_rows, NUM_COLUMNS, squeeze=False)
    axes = list(grid.flat)
    for panel, axis in zip(board.panels, axes, strict=False):
        axis.set_title(panel.title, fontsize=10, loc="left")
        axis.tick_params(labelsize=8)
        _draw_panel(panel, shown[panel], axis)
    for axis in axes[len(board.panels) :]:
        axis.set_axis_off()
    figure.savefig(place, dpi=80)


def unit_label(unit: Unit) -> str:
    """What stands beside an axis."""
    return _LABELS.get(unit, unit.value.removeprefix("suffix:").strip())


def _draw_panel(panel: Panel, series: Sequence[Series], axis: Axes) -> None:
    if not series:
        axis.text(0.5, 0.5, "nothing", ha="center", va="center", transform=axis.transAxes)
        return
    match panel.kind:
        case Kind.NUMBER:
            _number(panel, series[0], axis)
        case Kind.BARS:
            _bars(panel, series, axis)
        case Kind.HEAT:
            _heat(panel, series, axis)
        case Kind.STATES:
            _states(panel, series, axis)
        case Kind.LINES:
            _lines(panel, series, axis)


def _number(panel: Panel, series: Series, axis: Axes) -> None:
    last = next((value for value in reversed(series.values) if math.isfinite(value)), math.nan)
    axis.set_axis_off()
    text = f"{last:.3g} {unit_label(panel.unit)}"
    axis.text(0.5, 0.5, text, ha="center", va="center", fontsize=24, transform=axis.transAxes)


def _lines(panel: Panel, series: Sequence[Series], axis: Axes) -> None:
    if panel.stacked:
        times = sorted({when for each in series for when in each.times})
        rows = [_on(times, each) for each in series]
        order = sorted(range(len(rows)), key=lambda index: -sum(rows[index]))
        axis.stackplot(
            times,
            [rows[index] for index in order],
            labels=[series[index].legend for index in order if sum(rows[index])],
            alpha=0.8,
        )
    else:
        # Those that moved come first: the legend has room for a few.
        for each in sorted(series, key=lambda each: not any(each.values)):
            axis.plot(each.times, each.values, linewidth=1.2, label=each.legend)
    axis.set_ylim(bottom=0)
    _axes(axis, unit_label(panel.unit))
    _legend(axis)


def _on(times: Sequence[float], series: Series) -> list[float]:
    """Its values at these times, 0 where it has none."""
    known = dict(zip(series.times, series.values, strict=True))
    found = (known.get(when, 0.0) for when in times)
    return [value if math.isfinite(value) else 0.0 for value in found]


def _bars(panel: Panel, series: Sequence[Series], axis: Axes) -> None:
    axis.bar([each.legend for each in series], [each.values[-1] for each in series], width=0.7)
    if panel.maximum is not None:
        axis.set_ylim(0, panel.maximum)
    axis.set_ylabel(unit_label(panel.unit), fontsize=8)
    axis.set_xlabel("over the whole time", fontsize=8)


def _heat(panel: Panel, series: Sequence[Series], axis: Axes) -> None:
    times = sorted({when for each in series for when in each.times})
    totals = [_on(times, each) for each in series]
    # Buckets hold all that is below their bound: a band is the difference of two.
    below = [[0.0] * len(times), *totals[:-1]]
    bands = [
        [max(0.0, mine - lower) or math.nan for mine, lower in zip(row, under, strict=True)]
        for row, under in zip(totals, below, strict=True)
    ]
    mesh = axis.pcolormesh(times, range(len(bands)), bands, cmap="Oranges", shading="nearest")
    axis.set_yticks(range(len(bands)), [f"≤ {each.legend}" for each in series], fontsize=7)
    axis.figure.colorbar(mesh, ax=axis).set_label("a second", fontsize=8)
    _axes(axis, unit_label(panel.unit))


def _states(panel: Panel, series: Sequence[Series], axis: Axes) -> None:
    words = {float(value): (text, color) for value, text, color in panel.states}
    for row, each in enumerate(series):
        for when, value in zip(each.times, each.values, strict=True):
            color = words.get(value, ("", "gray"))[1]
            axis.plot([when], [row], marker="s", markersize=7, color=color)
    axis.set_yticks(range(len(series)), [each.legend for each in series], fontsize=7)
    axis.set_ylim(-0.7, len(series) - 0.3)
    for text, color in words.values():
        axis.plot([], [], marker="s", linestyle="none", color=color, label=text)
    _axes(axis, "")
    _legend(axis)


def _axes(axis: Axes, label: str) -> None:
    axis.set_ylabel(label, fontsize=8)
    axis.set_xlabel("seconds", fontsize=8)


def _legend(axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    if any(labels):
        axis.legend(handles[:MAX_LEGENDS], labels[:MAX_LEGENDS], fontsize=7, loc="best")
