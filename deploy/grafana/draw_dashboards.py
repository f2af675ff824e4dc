"""Draw what the dashboards' panels show, from a Prometheus, as pictures for docs/dashboards.md.

    python deploy/grafana/draw_dashboards.py --prometheus http://127.0.0.1:9090 --minutes 3

It needs matplotlib and knows nothing of how the numbers came about.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

from build_dashboards import DASHBOARDS
from specinfer_dashboards.drawing import draw
from specinfer_dashboards.reading import Reader

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "images" / "dashboards"


def main() -> int:
    """Write a picture of each dashboard; 1 when a panel has nothing to show."""
    parser = argparse.ArgumentParser(description="draw the dashboards from a Prometheus")
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", metavar="URL")
    parser.add_argument("--minutes", type=float, default=3.0, help="how far to look back")
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="FOLDER")
    options = parser.parse_args()
    seconds = 60 * options.minutes
    end = time.time()
    reader = Reader(options.prometheus, end - seconds, end, step=max(1.0, seconds / 120))
    options.out.mkdir(parents=True, exist_ok=True)
    empty = []
    for board in DASHBOARDS:
        shown = {panel: reader.read(panel) for panel in board.panels}
        draw(board, shown, options.out / f"{board.name}.png")
        empty += [
            f"{board.title}: {panel.title}"
            for panel, series in shown.items()
            if not any(math.isfinite(value) for each in series for value in each.values)
        ]
    for title in empty:
        print(f"nothing to show: {title}", file=sys.stderr)
    return 1 if empty else 0


if __name__ == "__main__":
    sys.exit(main())
