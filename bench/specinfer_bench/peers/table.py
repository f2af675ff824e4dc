"""The comparison as Markdown, from the JSON that `python -m specinfer_bench.peers` writes.

This module knows nothing of engines; a test renders a report of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def peers_table(result: Mapping[str, Any]) -> str:
    """The tables of one results file, a heading for each temperature, then what was skipped.

    Raises:
        KeyError: when the file is none of ours.
    """
    setup = result["setup"]
    lines: list[str] = []
    for report in result["reports"]:
        facts = [setup["model"], setup["dtype"], _temperature(report), *_loads(setup)]
        lines += [f"**{', '.join(facts)}**", ""]
        head = _head(report)
        lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        lines += [_row(name, arm, report) for name, arm in report["arms"].items()]
        lines.append("")
        failed = [f"* {name}: failed: {_one_line(why)}" for name, why in report["failed"].items()]
        # Without a blank line Markdown takes the next heading for a part of the last bullet.
        lines += [*failed, ""] if failed else []
    lines += [f"* {name}: skipped: {_one_line(why)}" for name, why in result["skipped"].items()]
    return "\n".join(lines).strip() + "\n"


def _head(report: Mapping[str, Any]) -> list[str]:
    cells = ["arm", "tokens/s", "first token, ms", f"over {report['baseline']}"]
    if report["ours"] != report["baseline"]:
        cells.append(f"{report['ours']} is faster by")
    return [*cells, "same output"]


def _row(name: str, arm: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    first = arm["first_token_ms"]
    cells = [
        name,
        f"{arm['tokens_per_second']:.1f}",
        "" if first is None else f"{first:.0f}",
        "" if name == report["baseline"] else _spread(arm["over_plain"]),
    ]
    if report["ours"] != report["baseline"]:
        cells.append("" if name == report["ours"] else _spread(arm["ours_over_it"]))
    cells.append(_agreement(arm, report))
    return f"| {' | '.join(cells)} |"


def _spread(spread: Mapping[str, float]) -> str:
    median, low, high = (f"{spread[name]:.2f}" for name in ("median", "low", "high"))
    # One run has no spread, and several that agree have none to show.
    return median if low == high else f"{median} ({low} to {high})"


def _agreement(arm: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    if arm["num_same"] is None:
        return "not compared"
    agreement = f"{arm['num_same']} of {report['num_tasks']}"
    places = sorted(arm["first_differences"].values())
    return agreement + (f", from token {places[0]} on" if places else "")


def _loads(setup: Mapping[str, Any]) -> list[str]:
    number = setup.get("num_loads", 1)
    return [f"each engine loaded {number} times"] if number > 1 else []


def _temperature(report: Mapping[str, Any]) -> str:
    temperature = report["temperature"]
    return "greedy" if temperature == 0 else f"temperature {temperature:g}"


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
