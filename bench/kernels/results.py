"""A kernel bench's lines as a JSON file, with its command, the machine, and how busy that was."""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from specinfer_bench.machine import machine_facts

LOAD_BEFORE = os.getloadavg()[0]


def add_json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, help="write the results to this file")


def summary_of(seconds: Mapping[str, Sequence[float]], base: str) -> dict[str, object]:
    """Median milliseconds of `base`, and of each other its time over the base's, round by round."""
    others = {
        name: round(statistics.median(map(float.__truediv__, times, seconds[base])), 3)
        for name, times in seconds.items()
        if name != base
    }
    return {"milliseconds": round(statistics.median(seconds[base]) * 1e3, 5), "over": others}


def save(arguments: argparse.Namespace, lines: Sequence[Mapping[str, object]]) -> None:
    """Write the file that was asked for, if any. The load average says what else ran."""
    if arguments.json is None:
        return
    report = {
        "command": " ".join(("python", *sys.argv)),
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "machine": machine_facts(),
        "load_average": {
            "before": round(LOAD_BEFORE, 2),
            "after": round(os.getloadavg()[0], 2),
        },
        "lines": list(lines),
    }
    arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
