"""`python -m specinfer_bench.chaos`: run rows, keep what came out, write the table."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from specinfer.errors import InvalidRequest
from specinfer_bench.chaos.cluster import ClusterOptions
from specinfer_bench.chaos.matrix import MatrixOptions, run_rows
from specinfer_bench.chaos.report import Report, line_of
from specinfer_bench.chaos.rows import ROWS, Row, named
from specinfer_bench.prompts import read_prompts

MODULE = "specinfer_bench.chaos"
DEMO = Path("models/demo")
NUM_PROMPTS = 8


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    parser.add_argument("--row", action="append", default=[], help="run this row; repeat for more")
    parser.add_argument("--list", action="store_true", help="list the rows and end")
    parser.add_argument("--model", type=Path, default=DEMO / "target", help="the target's folder")
    parser.add_argument("--draft", type=Path, default=DEMO / "draft", help="the drafter's folder")
    parser.add_argument("--prompts", type=Path, default=DEMO / "prompts.jsonl", help="JSON lines")
    parser.add_argument("--streams", type=int, default=16, help="clients of the SDK at once")
    parser.add_argument("--readers", type=int, default=4, help="readers over HTTP beside them")
    parser.add_argument("--tokens", type=int, default=96, help="tokens of each answer")
    parser.add_argument("--output", type=Path, default=Path("bench/results/chaos.json"))
    parser.add_argument("--document", type=Path, default=Path("docs/chaos.md"))
    return parser.parse_args()


def _rows(names: list[str]) -> tuple[Row, ...]:
    rows = []
    for name in names:
        row = named(name)
        if row is None:
            raise InvalidRequest(f"there is no row {name}; --list shows them", field="row")
        rows.append(row)
    return tuple(rows) or ROWS


async def _run(arguments: argparse.Namespace) -> bool:
    options = MatrixOptions(
        ClusterOptions(arguments.model.resolve(), arguments.draft.resolve()),
        read_prompts(arguments.prompts, NUM_PROMPTS),
        arguments.tokens,
        arguments.streams,
        arguments.readers,
    )
    report = Report.read(arguments.output)
    clean = True
    async for result in run_rows(_rows(arguments.row), options):
        print(line_of(result), flush=True)
        clean = clean and result.clean
        report = report.with_result(result)
        report.write(arguments.output)
        arguments.document.write_text(report.document(), encoding="utf-8")
    return clean


def main() -> int:
    """Exit status 0 when every row that was run met the goal."""
    arguments = _arguments()
    if arguments.list:
        for row in ROWS:
            print(f"{row.name:28} {row.fault}")
        return 0
    try:
        return 0 if asyncio.run(_run(arguments)) else 1
    except InvalidRequest as error:
        print(f"{MODULE}: {error.message}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
