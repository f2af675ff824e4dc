"""`python -m specinfer_bench.chaos`: run rows, keep what came out, write the table."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from specinfer.errors import InvalidRequest, SpecinferError
from specinfer_bench.chaos.cluster import ClusterOptions
from specinfer_bench.chaos.container_rows import CONTAINER_ROWS
from specinfer_bench.chaos.containers import ContainerCluster
from specinfer_bench.chaos.matrix import MatrixOptions, RowResult, run_on, run_rows
from specinfer_bench.chaos.report import Report, line_of, page
from specinfer_bench.chaos.row import AnyCluster, Row
from specinfer_bench.chaos.rows import ROWS
from specinfer_bench.prompts import read_prompts

MODULE = "specinfer_bench.chaos"
DEMO = Path("models/demo")
NUM_PROMPTS = 8
LEVEL = "CHAOS_LEVEL"
PROCESSES = "processes"
CONTAINERS = "containers"
FILES = {PROCESSES: "chaos.json", CONTAINERS: "chaos-containers.json"}


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
    parser.add_argument("--project", default="specinfer", help="compose project, of containers")
    parser.add_argument("--results", type=Path, default=Path("bench/results"))
    parser.add_argument("--document", type=Path, default=Path("docs/chaos.md"))
    return parser.parse_args()


def _chosen(rows: Sequence[Row[AnyCluster]], names: Sequence[str]) -> list[Row[AnyCluster]]:
    """The rows of these names, or all; raises InvalidRequest for a name without a row."""
    known = {row.name: row for row in rows}
    for name in names:
        if name not in known:
            raise InvalidRequest(f"there is no row {name}; --list shows them", field="row")
    return [known[name] for name in names] or list(rows)


def _level() -> str:
    level = os.environ.get(LEVEL, PROCESSES)
    if level not in (PROCESSES, CONTAINERS):
        raise InvalidRequest(f"{LEVEL} is {PROCESSES} or {CONTAINERS}", field="level")
    return level


async def _results(arguments: argparse.Namespace) -> AsyncIterator[RowResult]:
    options = MatrixOptions(
        ClusterOptions(arguments.model.resolve(), arguments.draft.resolve()),
        read_prompts(arguments.prompts, NUM_PROMPTS),
        arguments.tokens,
        arguments.streams,
        arguments.readers,
    )
    if _level() == PROCESSES:
        async for result in run_rows(_chosen(ROWS, arguments.row), options):
            yield result
        return
    rows = _chosen(CONTAINER_ROWS, arguments.row)
    cluster = ContainerCluster(arguments.project)
    await cluster.start()
    async for result in run_on(cluster, rows, options):
        yield result


async def _run(arguments: argparse.Namespace) -> bool:
    path = arguments.results / FILES[_level()]
    clean = True
    async for result in _results(arguments):
        print(line_of(result), flush=True)
        clean = clean and result.clean
        Report.read(path).with_result(result).write(path)
        found = {level: Report.read(arguments.results / name) for level, name in FILES.items()}
        text = page(found[PROCESSES], found[CONTAINERS])
        arguments.document.write_text(text, encoding="utf-8")
    return clean


def main() -> int:
    """Exit status 0 when every row that was run met the goal."""
    arguments = _arguments()
    try:
        if arguments.list:
            for row in ROWS if _level() == PROCESSES else CONTAINER_ROWS:
                print(f"{row.name:30} {row.fault}")
            return 0
        return 0 if asyncio.run(_run(arguments)) else 1
    except InvalidRequest as error:
        print(f"{MODULE}: {error.message}", file=sys.stderr)
        return 2
    except SpecinferError as error:
        print(f"{MODULE}: {error.message}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
