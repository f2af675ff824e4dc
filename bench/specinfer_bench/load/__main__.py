"""`python -m specinfer_bench.load`: put a load on a cluster and write down what its clients saw.

    python -m specinfer_bench.load open --grow 200m --rate 2 --requests 60 --output open.json
    python -m specinfer_bench.load rates --grow 200m --rates 0.5,1,2,4 --output rates.json
    python -m specinfer_bench.load sweep --grow 200m --sessions 1,4,16,64 --output sweep.json

`open` sends requests when they are due, drawn from a Poisson process or from a trace, and compares
what it saw with the router's own metrics. `rates` does so at several rates, with speculation off,
on and chosen by cost, in turn. `sweep` keeps 1 to 64 sessions busy in each of these ways. All take
a running cluster with --cluster, or start one.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from specinfer.errors import SpecinferError
from specinfer_bench.cluster_report import setup_facts, write_report
from specinfer_bench.load.asking import SPECULATION
from specinfer_bench.load.cluster import Cluster, demo_cluster, given_cluster
from specinfer_bench.load.open_loop import OpenLoopOptions
from specinfer_bench.load.rates import RatesOptions
from specinfer_bench.load.runs import OpenRun, open_report, rates_report, sweep_report
from specinfer_bench.load.simulated_cluster import simulated_cluster
from specinfer_bench.load.summary import Objective
from specinfer_bench.load.sweep import SweepOptions
from specinfer_bench.options import GROWN_PRESETS
from specinfer_bench.prompts import read_prompts

MODULE = "specinfer_bench.load"
PROMPTS = Path("models/demo/prompts.jsonl")


def load_parser() -> argparse.ArgumentParser:
    """Arguments of every kind of load."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=_first_line())
    kinds = parser.add_subparsers(dest="kind", required=True)
    _open_arguments(kinds.add_parser("open", help="requests when they are due"))
    _rates_arguments(kinds.add_parser("rates", help="goodput by arrival rate"))
    _sweep_arguments(kinds.add_parser("sweep", help="speed by load, with speculation off and on"))
    return parser


def _first_line() -> str:
    return (__doc__ or "").splitlines()[0].partition(": ")[2]


def _common(parser: argparse.ArgumentParser, *, max_tokens: int) -> None:
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--cluster", type=Path, help="what `specinfer up --json` printed")
    where.add_argument("--grow", choices=GROWN_PRESETS, help="start the demo pair, grown to this")
    where.add_argument("--simulated", action="store_true", help="start workers that are waits")
    parser.add_argument("--dtype", default="bfloat16", help="number format of a cluster started")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="JSON lines with prompts")
    parser.add_argument("--num-prompts", type=int, default=64, help="prompts to take of them")
    parser.add_argument("--max-tokens", type=int, default=max_tokens, help="tokens of an answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--seed", type=int, default=1, help="decides arrivals and noise")
    parser.add_argument("--output", type=Path, help="also write the report to this file")


def _open_arguments(parser: argparse.ArgumentParser) -> None:
    _common(parser, max_tokens=64)
    parser.add_argument("--rate", type=float, default=1.0, help="requests a second, on average")
    parser.add_argument("--requests", type=int, default=60, help="requests of the run")
    parser.add_argument("--trace", type=Path, help="arrivals and lengths from this file instead")
    parser.add_argument("--trace-speed", type=float, default=1.0, help="times as fast as recorded")
    parser.add_argument("--sessions", type=int, default=64, help="most requests in flight")
    parser.add_argument(
        "--max-wait", type=float, default=30.0, help="seconds before one is dropped"
    )
    _objective_arguments(parser)
    parser.add_argument("--speculation", choices=tuple(SPECULATION), default="by_cost")


def _objective_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--objective-first", type=float, default=0.5, help="seconds to first token")
    parser.add_argument("--objective-token", type=float, default=0.05, help="seconds a token")


def _rates_arguments(parser: argparse.ArgumentParser) -> None:
    _common(parser, max_tokens=RatesOptions.max_tokens)
    default = ",".join(map(str, RatesOptions.rates))
    parser.add_argument("--rates", default=default, help="requests a second, a cell each")
    parser.add_argument("--seconds", type=float, default=RatesOptions.seconds, help="of a cell")
    parser.add_argument("--sessions", type=int, default=64, help="most requests in flight")
    parser.add_argument("--max-wait", type=float, default=5.0, help="seconds before one is dropped")
    _objective_arguments(parser)


def _sweep_arguments(parser: argparse.ArgumentParser) -> None:
    _common(parser, max_tokens=SweepOptions.max_tokens)
    default = ",".join(map(str, SweepOptions.sessions))
    parser.add_argument("--sessions", default=default, help="sessions at once, a cell each")
    parser.add_argument("--requests-a-session", type=int, default=SweepOptions.requests_a_session)
    parser.add_argument("--repeats", type=int, default=SweepOptions.repeats, help="turns of a cell")
    late = "begin no further turn that would end past it"
    parser.add_argument("--max-seconds", type=float, default=math.inf, help=late)


@contextmanager
def _cluster(arguments: argparse.Namespace) -> Iterator[Cluster]:
    if arguments.cluster is not None:
        yield given_cluster(arguments.cluster)
        return
    if arguments.simulated:
        with simulated_cluster() as cluster:
            yield cluster
        return
    with demo_cluster(arguments.grow, arguments.dtype) as cluster:
        yield cluster


async def _report(arguments: argparse.Namespace, cluster: Cluster) -> dict[str, object]:
    prompts = read_prompts(arguments.prompts, arguments.num_prompts)
    if arguments.kind == "sweep":
        options = SweepOptions(
            sessions=tuple(int(each) for each in arguments.sessions.split(",")),
            requests_a_session=arguments.requests_a_session,
            max_tokens=arguments.max_tokens,
            repeats=arguments.repeats,
            max_seconds=arguments.max_seconds,
            seed=arguments.seed,
        )
        return await sweep_report(cluster, prompts, options, arguments.temperature)
    objective = Objective(arguments.objective_first, arguments.objective_token)
    if arguments.kind == "rates":
        rates = RatesOptions(
            rates=tuple(float(each) for each in arguments.rates.split(",")),
            seconds=arguments.seconds,
            max_tokens=arguments.max_tokens,
            sending=OpenLoopOptions(arguments.sessions, arguments.max_wait),
            seed=arguments.seed,
        )
        return await rates_report(cluster, prompts, rates, objective, arguments.temperature)
    names = ("rate", "requests", "trace", "trace_speed", "sessions", "max_wait", "max_tokens")
    given = {name: getattr(arguments, name) for name in (*names, "temperature", "seed")}
    run = OpenRun(objective=objective, speculation=arguments.speculation, **given)
    return await open_report(cluster, prompts, run)


def _rounded(value: Any) -> Any:
    """The report with its numbers to four places; more are the machine's."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return value


def main() -> int:
    """Run, print the report and write it; 1 when the numbers cannot be trusted."""
    arguments = load_parser().parse_args()
    try:
        with _cluster(arguments) as cluster:
            report = asyncio.run(_report(arguments, cluster))
            setup = setup_facts(MODULE, cluster)
    except SpecinferError as error:
        sys.stderr.write(f"{error.message}\n")
        return 2
    write_report({"kind": arguments.kind, **_rounded(report), "setup": setup}, arguments.output)
    return 0 if report["trusted"] else 1


if __name__ == "__main__":
    sys.exit(main())
