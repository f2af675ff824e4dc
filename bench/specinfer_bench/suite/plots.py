"""Draws results. Every picture carries the digest of the numbers that it shows.

Colours are Okabe and Ito's, which people with any colour vision tell apart; every arm has a marker
and a line of its own beside that. Needs matplotlib; nothing else of ours imports it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from specinfer_bench.suite.pictures import OPEN, RATES, SOURCES, SPEED, SWEEP, expected_digest
from specinfer_bench.suite.results import Document, Results
from specinfer_bench.suite.tables import ARM_NAMES, grown_to

BLUE, ORANGE, GREEN, BLACK = "#0072B2", "#D55E00", "#009E73", "#000000"
STYLES = {"off": (BLACK, "o", "-"), "static": (ORANGE, "s", "--"), "by_cost": (BLUE, "D", "-")}
# Text stays text, and the same numbers give the same file.
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "specinfer",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "figure.facecolor": "white",
}


def draw_all(results: Results, folder: Path) -> None:
    """Draw what there are numbers for, and remove pictures whose numbers are gone."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in SOURCES:
        (folder / name).unlink(missing_ok=True)
    with mpl.rc_context(SETTINGS):
        if "load-sweep" in results.documents:
            _save(_sweep(results.documents["load-sweep"]), folder / SWEEP, results)
        if "load-rates" in results.documents:
            _save(_goodput(results.documents["load-rates"]), folder / RATES, results)
        if results.named("load-open"):
            _save(_first_token(results.named("load-open")), folder / OPEN, results)
        if results.named("speed-"):
            _save(_speed(results.named("speed-")), folder / SPEED, results)


def _save(figure: Figure, path: Path, results: Results) -> None:
    digest = f"numbers: {expected_digest(results, path.name)}"
    figure.savefig(path, metadata={"Date": None, "Description": digest})


def _sweep(report: Document) -> Figure:
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    speed, ratio = figure.subplots(1, 2)
    sessions = [cell["sessions"] for cell in report["cells"]]
    for arm, (colour, marker, line) in STYLES.items():
        cells = [cell["arms"][arm] for cell in report["cells"]]
        style = {"color": colour, "marker": marker, "linestyle": line, "label": ARM_NAMES[arm]}
        speed.plot(sessions, [cell["tokens_per_second"] for cell in cells], **style)
        ratio.plot(sessions, [cell["ratio"] for cell in cells], **style)
    for axes in (speed, ratio):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sessions, [str(each) for each in sessions])
        axes.set_xlabel("sessions at once")
        axes.set_ylim(bottom=0)
    speed.set_ylabel("tokens a second, all sessions")
    ratio.set_ylabel("times the speed without speculation")
    ratio.axhline(report["goal_any_load"], color=GREEN, linestyle=":", linewidth=1.5)
    ratio.annotate(
        f"goal at any load: {report['goal_any_load']:.2f}",
        (sessions[0], report["goal_any_load"]),
        xytext=(0, -12),
        textcoords="offset points",
        color=GREEN,
    )
    speed.legend(frameon=False, title="speculation")
    return figure


def _goodput(report: Document) -> Figure:
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    goodput, first = figure.subplots(1, 2)
    rates = [cell["rate"] for cell in report["cells"]]
    for arm, (colour, marker, line) in STYLES.items():
        cells = [cell["arms"][arm] for cell in report["cells"]]
        style = {"color": colour, "marker": marker, "linestyle": line, "label": ARM_NAMES[arm]}
        goodput.plot(rates, [cell["goodput"] for cell in cells], **style)
        first.plot(rates, [cell["first_token_ms_p50"] / 1e3 for cell in cells], **style)
    goodput.plot(rates, rates, color=GREEN, linestyle=":", linewidth=1.5, label="all that came")
    first.axhline(report["objective"]["first_token_seconds"], color=GREEN, linestyle=":")
    for axes in (goodput, first):
        axes.set_xlabel("requests a second that came")
        axes.set_ylim(bottom=0)
    goodput.set_ylabel("requests a second within the objective")
    first.set_ylabel("seconds to first token, median")
    goodput.legend(frameon=False, title="speculation")
    return figure


def _first_token(documents: Mapping[str, Document]) -> Figure:
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    first, whole = figure.subplots(1, 2, sharey=True)
    for report in documents.values():
        rows = [row for row in report["requests"] if row["outcome"] == "done"]
        _share(first, report, [row["first_token"] - row["scheduled"] for row in rows])
        _share(whole, report, [row["ended"] - row["scheduled"] for row in rows])
    first.set_xlabel("seconds from arrival to first token")
    whole.set_xlabel("seconds from arrival to the end")
    first.set_ylabel("share of all requests")
    objective = next(iter(documents.values()))["objective"]["first_token_seconds"]
    first.axvline(objective, color=GREEN, linestyle=":", linewidth=1.5)
    first.annotate("objective", (objective, 0.02), ha="right", rotation=90, color=GREEN)
    whole.legend(frameon=False, title="speculation", loc="lower right")
    return figure


def _share(axes: Axes, report: Document, seconds: list[float]) -> None:
    """Steps up to the share of requests that were done: the others never were."""
    colour, _, line = STYLES[report["speculation"]]
    scheduled = max(1, report["summary"]["scheduled"])
    shares = [index / scheduled for index in range(len(seconds) + 1)]
    label = ARM_NAMES[report["speculation"]]
    axes.step([0.0, *sorted(seconds)], shares, where="post", color=colour, ls=line, label=label)
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.02)


def _speed(documents: Mapping[str, Document]) -> Figure:
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.subplots()
    for at, report in enumerate(documents.values()):
        for arm, shift, colour, hatch in (("off", -0.2, BLACK, ""), ("on", 0.2, BLUE, "//")):
            value = report["arms"][arm]["tokens_per_second"]
            label = f"speculation {arm}" if at == 0 else None
            bar = axes.bar(
                at + shift, value, 0.38, color=colour, hatch=hatch, edgecolor="white", label=label
            )
            axes.bar_label(bar, fmt="%.0f")
    axes.set_xticks(range(len(documents)), [_target(each) for each in documents.values()])
    axes.set_ylabel("tokens a second, one session")
    axes.legend(frameon=False)
    axes.grid(axis="x", visible=False)
    return figure


def _target(report: Document) -> str:
    temperature = report["setup"]["options"]["temperature"]
    how = "greedy" if temperature == 0 else f"temperature {temperature:g}"
    return f"{grown_to(report)}, {how}\n{report['speedup']:.2f} times"
