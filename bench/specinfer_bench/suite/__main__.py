"""`make bench`: the short form of every benchmark; writes its results and docs/performance.md.

    make bench
    make bench ARGS="--only load-sweep peers-200m"

Each part is a process of its own: one that fails or hangs is told of with its reason, and the rest
goes on. What the time does not reach on a slow machine is left out, and said so; it can be run by
itself.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from contextlib import closing
from pathlib import Path

from specinfer_bench.ending import exit_on_term
from specinfer_bench.suite.parts import Part, all_parts
from specinfer_bench.suite.pictures import stale
from specinfer_bench.suite.plots import draw_all
from specinfer_bench.suite.results import Results, write_summary
from specinfer_bench.suite.running import FAILED, LEFT_OUT, TIMED_OUT, run_parts

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "bench" / "results" / "suite"
PICTURES = ROOT / "docs" / "images" / "performance"
PAGES = "tools/generate_performance.py"
BUDGET_SECONDS = 890.0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m specinfer_bench.suite",
        description=(__doc__ or "").splitlines()[0],
    )
    parser.add_argument("--only", nargs="+", metavar="PART", help="run these parts alone")
    parser.add_argument("--list", action="store_true", help="name the parts and run nothing")
    parser.add_argument("--pages", action="store_true", help="only make the pages again")
    parser.add_argument("--budget", type=float, default=BUDGET_SECONDS, help="seconds for all")
    return parser.parse_args()


def main() -> int:
    """Run the parts and make the pages; 1 when a part failed or took longer than it may."""
    arguments = _arguments()
    parts = {part.name: part for part in all_parts(ROOT)}
    if arguments.list:
        for part in parts.values():
            print(f"{part.name:28} {part.title}")
        return 0
    unknown = [name for name in arguments.only or () if name not in parts]
    if unknown:
        print(f"no such part: {', '.join(unknown)}; --list names them", file=sys.stderr)
        return 2
    chosen = [parts[name] for name in arguments.only] if arguments.only else list(parts.values())
    states = {} if arguments.pages else _run(chosen, list(parts), arguments.budget)
    _make_pages()
    failed = [name for name, state in states.items() if state in (FAILED, TIMED_OUT)]
    for name in failed:
        print(f"{name} is not done", file=sys.stderr)
    if left := [name for name, state in states.items() if state == LEFT_OUT]:
        _say(f"""the rest runs by `make bench ARGS="--only {" ".join(left)}"`""")
    return 1 if failed else 0


def _run(parts: list[Part], order: list[str], budget: float) -> dict[str, str]:
    RESULTS.mkdir(parents=True, exist_ok=True)
    exit_on_term()
    states = {}
    with closing(run_parts(parts, ROOT, RESULTS, budget, tell=_say)) as run:
        for name, part in run:
            write_summary(RESULTS, {name: part}, order)
            states[name] = part.state
    return states


def _make_pages() -> None:
    results = Results.read(RESULTS)
    draw_all(results, PICTURES)
    if left := stale(results, PICTURES):
        raise RuntimeError(f"drawn, and yet not up to date: {', '.join(left)}")
    subprocess.run([sys.executable, PAGES], cwd=ROOT, check=True)


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
