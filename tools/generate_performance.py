"""Fill the measured parts of docs/performance.md and README.md from bench/results/suite.

`--check` only compares, the pictures too. It measures nothing: `make bench` does.
"""

import sys
from pathlib import Path

from specinfer_bench.suite.page import PICTURES, filled
from specinfer_bench.suite.pictures import stale
from specinfer_bench.suite.results import Results
from tools.generated_file import write_or_check

ROOT = Path(__file__).resolve().parent.parent
TOOL = "tools/generate_performance.py"
RESULTS = ROOT / "bench" / "results" / "suite"
# Each page with the folder of the pictures as it is seen from there.
PAGES = {"docs/performance.md": PICTURES, "README.md": f"docs/{PICTURES}"}


def main() -> int:
    """Write the files, or with `--check` say whether they are what would be written."""
    results = Results.read(RESULTS)
    status = 0
    for name, pictures in PAGES.items():
        text = filled((ROOT / name).read_text(encoding="utf-8"), results, pictures)
        status |= write_or_check(ROOT / name, text, TOOL)
    if "--check" in sys.argv[1:] and (left := stale(results, ROOT / "docs" / PICTURES)):
        print(f"{', '.join(left)} show other numbers; run make bench", file=sys.stderr)
        status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
