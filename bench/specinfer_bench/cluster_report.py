"""What the benchmarks of a running cluster share: how they are told of it and what they leave.

This module knows nothing of what is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specinfer_bench.machine import machine_facts


def cluster_parser(module: str, document: str | None) -> argparse.ArgumentParser:
    """Arguments of a benchmark run as `python -m module`: `--cluster` and `--output`."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}", description=(document or "").splitlines()[0]
    )
    parser.add_argument("--cluster", type=Path, required=True, help="what `up --json` printed")
    parser.add_argument("--output", type=Path, help="also write the report to this file")
    return parser


def setup_facts(module: str, cluster: Mapping[str, Any]) -> dict[str, object]:
    """The command, the cluster's model and the machine."""
    return {
        "command": f"python -m {module} " + shlex.join(sys.argv[1:]),
        "model": cluster["model"],
        "model_hash": cluster["model_hash"],
        "dtype": cluster["dtype"],
        "machine": machine_facts(),
        "load_average": os.getloadavg()[0],
    }


def write_report(report: Mapping[str, object], output: Path | None) -> None:
    """Print a report as JSON, and write it to a file if there is to be one."""
    text = json.dumps(report, indent=2) + "\n"
    sys.stdout.write(text)
    if output:
        output.write_text(text, encoding="utf-8")
