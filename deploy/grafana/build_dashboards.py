"""Write deploy/grafana/dashboards from the typed ones; `--check` only compares.

It knows nothing of what is in them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from specinfer_dashboards.clients import CLIENTS
from specinfer_dashboards.draft import DRAFT_BOARD
from specinfer_dashboards.grafana import RUNBOOK_NAME, dashboard_json, runbook_json
from specinfer_dashboards.overview import OVERVIEW
from specinfer_dashboards.runbook import read_entries
from specinfer_dashboards.sessions import SESSIONS
from specinfer_dashboards.speculation import SPECULATION
from specinfer_dashboards.verify import VERIFY_BOARD

FOLDER = Path(__file__).resolve().parent / "dashboards"
RUNBOOK = Path(__file__).resolve().parents[2] / "docs" / "runbook.md"
DASHBOARDS = (OVERVIEW, SPECULATION, VERIFY_BOARD, DRAFT_BOARD, SESSIONS, CLIENTS)


def main() -> int:
    """Write the files, or with `--check` say whether they are what would be written."""
    wanted = built()
    there = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.json")}
    if "--check" in sys.argv[1:]:
        if there == wanted:
            return 0
        print(
            "deploy/grafana/dashboards is not what deploy/grafana/build_dashboards.py makes of "
            "its dashboards and docs/runbook.md; run it",
            file=sys.stderr,
        )
        return 1
    for name in there.keys() - wanted.keys():
        (FOLDER / name).unlink()
    for name, text in wanted.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    return 0


def built() -> dict[str, str]:
    """The text of every file, by its name."""
    entries = read_entries(RUNBOOK)
    made: dict[str, dict[str, Any]] = {
        board.name: dashboard_json(board, entries) for board in DASHBOARDS
    }
    made[RUNBOOK_NAME] = runbook_json(entries)
    return {f"{name}.json": json.dumps(board, indent=2) + "\n" for name, board in made.items()}


if __name__ == "__main__":
    sys.exit(main())
