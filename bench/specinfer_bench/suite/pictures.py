"""Which pictures there are, and whether one shows the numbers that are in the files.

It draws nothing, so that a check needs no matplotlib.
"""

from __future__ import annotations

import re
from pathlib import Path

from specinfer_bench.suite.results import Results

SWEEP, OPEN, SPEED, RATES = "load.svg", "first-token.svg", "speed.svg", "goodput.svg"
SOURCES = {SWEEP: "load-sweep", OPEN: "load-open", SPEED: "speed-", RATES: "load-rates"}
"""The parts that a picture shows, by how their names begin."""
_DIGEST = re.compile(r"numbers: ([0-9a-f ]*)")


def expected_digest(results: Results, name: str) -> str:
    """What a picture of these results carries; "" when there is nothing to draw."""
    parts = results.digests.items()
    return " ".join(digest[:16] for part, digest in parts if part.startswith(SOURCES[name]))


def drawn_digest(path: Path) -> str:
    """What a picture carries; "" when it is not there or not ours."""
    if not path.is_file():
        return ""
    found = _DIGEST.search(path.read_text(encoding="utf-8"))
    return found.group(1).strip() if found else ""


def stale(results: Results, folder: Path) -> list[str]:
    """Pictures in a folder that do not show these results."""
    return [
        name for name in SOURCES if drawn_digest(folder / name) != expected_digest(results, name)
    ]
