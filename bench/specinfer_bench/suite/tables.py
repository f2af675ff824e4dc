"""Results as Markdown, one function for each kind of part. Knows nothing of files or pages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from specinfer_bench.load.agreement import TOLERANCE
from specinfer_bench.suite.results import Document

ARM_NAMES = {"off": "off", "static": "on, one shape", "by_cost": "chosen by cost"}
# The number of sessions that the goal of the router's time is stated for.
GOAL_SESSIONS = 64
COUNT_NAMES = {
    "requests": "requests",
    "prompt_tokens": "prompt tokens",
    "generation_tokens": "tokens generated",
    "first_tokens": "first tokens",
    "first_token_seconds": "seconds to first tokens, in all",
    "request_seconds": "seconds of requests, in all",
}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def speed_table(documents: Mapping[str, Document]) -> str:
    """Speculation against plain decoding, a row for each `specinfer bench`."""
    head = (
        *("target", "temperature", "speedup (min to max)", "tokens/s off", "on"),
        *("tokens a round", "first token ms off", "on", "identical"),
    )
    return table(head, [_speed_row(each) for each in documents.values()])


def _speed_row(report: Document) -> list[str]:
    temperature, arms = report["setup"]["options"]["temperature"], report["arms"]
    off, on = arms["off"], arms["on"]
    return [
        grown_to(report),
        f"{temperature:g}",
        _speedup(report),
        f"{off['tokens_per_second']:.1f}",
        f"{on['tokens_per_second']:.1f}",
        f"{on['tokens_per_round']:.2f}",
        f"{off['first_token_ms']:.0f}",
        f"{on['first_token_ms']:.0f}",
        _yes(report["identical"]),
    ]


def grown_to(report: Document) -> str:
    """The size of a report's target: the suite's word, or that of `specinfer bench` by itself."""
    setup = report["setup"]
    return str(setup.get("grow") or setup["options"]["grow"] or "demo")


def _speedup(report: Document) -> str:
    low, high = report["speedup_min"], report["speedup_max"]
    spread = f" ({low:.2f} to {high:.2f})" if low < high else ""
    return f"**{report['speedup']:.2f}**{spread}"


def sweep_table(report: Document) -> str:
    """Speed of all sessions together by their number, then what the goals say."""
    head = ["sessions", "turns"]
    for arm in ARM_NAMES.values():
        head.append(f"{arm}, tokens/s")
    head += [f"{name} over off" for arm, name in ARM_NAMES.items() if arm != "off"]
    head += ["tokens a round, by cost", "identical"]
    return table(head, [_sweep_row(cell) for cell in report["cells"]]) + "\n\n" + _goals(report)


def _sweep_row(cell: Document) -> list[str]:
    arms = cell["arms"]
    return [
        str(cell["sessions"]),
        str(cell["turns"]),
        *(f"{arms[arm]['tokens_per_second']:.1f}" for arm in ARM_NAMES),
        _ratio(arms["static"], bold=False),
        _ratio(arms["by_cost"], bold=True),
        f"{arms['by_cost']['tokens_per_event']:.2f}",
        _yes(cell["identical"]),
    ]


def _ratio(arm: Document, *, bold: bool) -> str:
    """The median over the turns, and the turns' own extremes."""
    low, high = arm["ratio_min"], arm["ratio_max"]
    median = f"**{arm['ratio']:.2f}**" if bold else f"{arm['ratio']:.2f}"
    return f"{median} ({low:.2f} to {high:.2f})" if low < high else median


def _goals(report: Document) -> str:
    lowest, low_load = report["lowest_by_cost"], report["lowest_by_cost_low_load"]
    parts = [
        "Speeds and ratios are medians of a cell's turns (lowest to highest); one shape ran in the "
        "first of them. "
        f"Chosen by cost, the lowest ratio at any load is {lowest:.2f} "
        f"(goal {report['goal_any_load']:.2f}: {_met(lowest >= report['goal_any_load'])})"
    ]
    if low_load is not None:
        parts.append(
            f"at one to four sessions {low_load:.2f} "
            f"(goal {report['goal_low_load']:.1f}: {_met(low_load >= report['goal_low_load'])})"
        )
    return "; ".join(parts) + "."


def open_table(documents: Mapping[str, Document]) -> str:
    """What clients see whose requests come when they come."""
    first = next(iter(documents.values()))["objective"]
    head = (
        *("speculation", "requests/s", "done", "failed", "dropped", "late", "tokens/s"),
        *("first token ms p50", "p90", "p99", "ms a token p50", "p99", "gap ms p50", "p99"),
        "goodput, requests/s",
    )
    says = (
        f"Goodput counts requests with their first token within {first['first_token_seconds']:g} s "
        f"of their scheduled arrival and {1e3 * first['token_seconds']:g} ms a token after that."
    )
    return table(head, [_open_row(each) for each in documents.values()]) + "\n\n" + says


def _open_row(report: Document) -> list[str]:
    found = report["summary"]
    first, token, gap = found["first_token_ms"], found["token_ms"], found["gap_ms"]
    return [
        ARM_NAMES[report["speculation"]],
        f"{report['offered_per_second']:.2f}",
        *(str(found[name]) for name in ("done", "failed", "dropped", "late")),
        f"{found['tokens_per_second']:.1f}",
        *(f"{first[rank]:.0f}" for rank in ("p50", "p90", "p99")),
        *(f"{token[rank]:.1f}" for rank in ("p50", "p99")),
        *(f"{gap[rank]:.0f}" for rank in ("p50", "p99")),
        f"**{found['goodput']['per_second']:.2f}** ({found['goodput']['share']:.0%})",
    ]


def rates_table(report: Document) -> str:
    """How many requests got what they were promised, by how many came."""
    head = ["requests/s that came", "requests"]
    for what in ("goodput", "first token ms p50", "lost"):
        head += [f"{what}, {name}" for name in ARM_NAMES.values()]
    return table([*head, "identical"], [_rates_row(cell) for cell in report["cells"]])


def _rates_row(cell: Document) -> list[str]:
    arms = [cell["arms"][arm] for arm in ARM_NAMES]
    return [
        f"{cell['rate']:.2f}",
        str(cell["requests"]),
        *(f"{arm['goodput']:.2f} ({arm['share']:.0%})" for arm in arms),
        *(f"{arm['first_token_ms_p50']:.0f}" for arm in arms),
        *(str(arm["lost"]) for arm in arms),
        _yes(cell["identical"]),
    ]


def agreement_table(documents: Mapping[str, Document]) -> str:
    """The clients' numbers beside those that the router shows to Prometheus."""
    head = (
        *("speculation", "number", "router", "as told to clients", "clients' clocks"),
        *("difference", f"within {TOLERANCE:.0%}", "ms a request"),
    )
    rows = [row for each in documents.values() for row in _agreement_rows(each)]
    told = [each["empty_call_ms"] for each in documents.values() if "empty_call_ms" in each]
    calls = " and ".join(f"{call_ms:.1f}" for call_ms in told)
    says = f"\n\nA call that generates nothing took {calls} ms after these runs." if told else ""
    return table(head, rows) + says


def _agreement_rows(report: Document) -> Iterator[list[str]]:
    for name, title in COUNT_NAMES.items():
        both = report["prometheus"][name]
        yield [
            ARM_NAMES[report["speculation"]],
            title,
            f"{both['router']:.6g}",
            f"{both['told']:.6g}" if both.get("told") is not None else "",
            f"{both['client']:.6g}",
            f"{both['difference']:+.1%}",
            "yes" if abs(both["difference"]) <= TOLERANCE else "no",
            f"{both['way_ms']:+.2f}" if both.get("way_ms") else "",
        ]


def overlap_table(report: Document) -> str:
    """Tokens a second with one thing beside another and without."""
    head = (
        *("beside each other", "verify pass, ms", "draft pass, ms", "commit, ms"),
        *("tokens/s off", "on", "on over off", "identical"),
    )
    rows = [_overlap_row(name, each) for name, each in report["overlaps"].items()]
    says = (
        f"A round has {report['guesses']} guesses, one below the other, each right with a chance "
        f"of {report['acceptance']:g} where the one above it is."
    )
    return table(head, rows) + "\n\n" + says


def _overlap_row(name: str, arm: Document) -> list[str]:
    ratio = arm["on over off"]
    return [
        name,
        *(f"{arm[part]:.0f}" for part in ("verify pass, ms", "draft pass, ms", "commit, ms")),
        *(f"{arm[f'tokens a second, {switch}']:.1f}" for switch in ("off", "on")),
        f"**{ratio['median']:.2f}** ({ratio['low']:.2f} to {ratio['high']:.2f})",
        _yes(arm["identical"]),
    ]


def router_table(reports: Sequence[Document]) -> str:
    """What a round costs the router by load, and what it loses against the loop alone."""
    head = (
        *("load", "tokens of a session", "router's ms of a round", "goal"),
        *("rounds/s", "loop alone, rounds/s", "loss", "goal"),
    )
    rows = [
        _router_row(report, name, found)
        for report in reports
        for name, found in report["loads"].items()
    ]
    return table(head, rows)


def _router_row(report: Document, name: str, found: Document) -> list[str]:
    spent, load = found["router_ms_of_a_round"], found["load"]
    goal = _goal(spent["median"], report["goal_ms"], "g", " ms")
    row = [
        name,
        str(load["tokens"]),
        f"**{spent['median']:.3f}** ({spent['low']:.3f} to {spent['high']:.3f})",
        goal if load["sessions"] == GOAL_SESSIONS else "",
        f"{found['rounds_per_second']:.0f}",
    ]
    if "loss" not in found:
        return [*row, "", "", ""]
    lost = found["loss"]
    return [
        *row,
        f"{found['loop_rounds_per_second']:.1f}",
        f"**{lost['median']:.1%}** ({lost['low']:.1%} to {lost['high']:.1%})",
        _goal(lost["median"], report["goal_loss"], ".0%"),
    ]


def _goal(value: float, most: float, form: str, unit: str = "") -> str:
    return f"{most:{form}}{unit}: {_met(value <= most)}"


def printed(report: Document) -> str:
    """What a part printed, as it stands."""
    return "```\n" + "\n".join(report["lines"]) + "\n```"


def _yes(value: bool) -> str:
    return "yes" if value else "**NO**"


def _met(value: bool) -> str:
    return "met" if value else "not met"
