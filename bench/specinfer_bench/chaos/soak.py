"""`python -m specinfer_bench.chaos.soak`: hours of mixed load, after which nothing may be left.

What may not grow is memory and file descriptors; what may not be left are sessions and KV blocks
at workers, streams and requests at routers, keys in Redis once their time is up. This module knows
nothing of faults.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from specinfer import AsyncClient
from specinfer_bench.chaos.cluster import ChaosCluster, ClusterOptions, chaos_cluster
from specinfer_bench.chaos.leftovers import (
    Usage,
    gauges_left,
    growth,
    immortal_keys,
    session_keys,
    usage_of,
)
from specinfer_bench.chaos.load import unbroken
from specinfer_bench.chaos.matrix import MatrixOptions
from specinfer_bench.chaos.mixed import Tally, User, Users, structured
from specinfer_bench.machine import machine_facts
from specinfer_bench.prompts import read_prompts

MODULE = "specinfer_bench.chaos.soak"
DEMO = Path("models/demo")
NUM_PROMPTS = 8
NUM_SAMPLES = 240
FINISH_SECONDS = 120.0
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class SoakOptions:
    """One soak.

    Attributes:
        matrix: cluster, prompts and tokens of each answer.
        seconds: how long the load lasts.
        num_users: users at once.
        session_seconds: how long Redis keeps a session after its last change.
    """

    matrix: MatrixOptions
    seconds: float = 3600.0
    num_users: int = 16
    session_seconds: float = 60.0


@dataclass(frozen=True)
class SoakReport:
    """What came of it.

    Attributes:
        seconds: of load.
        requests: number of each kind.
        failed, different: requests that were, some of them for people.
        first, last, most: memory and descriptors of each process, by its name.
        grown: processes that grew.
        left: what was left when all was over.
    """

    seconds: float
    requests: Mapping[str, int]
    failed: Sequence[str]
    different: Sequence[str]
    first: Mapping[str, Usage]
    last: Mapping[str, Usage]
    most: Mapping[str, Usage]
    grown: Sequence[str]
    left: Sequence[str]

    @property
    def clean(self) -> bool:
        """Whether nothing failed, differed, grew or was left."""
        return not (self.failed or self.different or self.grown or self.left)


async def soak(options: SoakOptions) -> SoakReport:
    """Start a cluster, load it, and look at what is left; raises SpecinferError without one."""
    flags = ("--session-seconds", str(options.session_seconds))
    wanted = options.matrix.cluster
    async with chaos_cluster(
        ClusterOptions(**{**vars(wanted), "router_flags": (*wanted.router_flags, *flags)})
    ) as cluster:
        tally = Tally()
        samples = await _load(cluster, options, tally)
        left = await emptied(cluster, options.session_seconds)
        return SoakReport(
            seconds=options.seconds,
            requests=dict(tally.requests),
            failed=tally.failed,
            different=tally.different,
            first={name: usages[0] for name, usages in samples.items()},
            last={name: usages[-1] for name, usages in samples.items()},
            most={name: _most(usages) for name, usages in samples.items()},
            grown=growth(samples),
            left=left,
        )


async def _load(
    cluster: ChaosCluster, options: SoakOptions, tally: Tally
) -> dict[str, list[Usage]]:
    """Let users do what they do; the use of every process over the time."""
    right = await unbroken(cluster.routers, options.matrix.cases())
    async with AsyncClient(cluster.routers) as client:
        text = await structured(client)
    name = cluster.model_name
    users = Users(cluster.routers, cluster.gateways, name, right, text)
    stopping = asyncio.Event()
    tasks = [
        asyncio.create_task(User(users, tally, seed).run(stopping))
        for seed in range(options.num_users)
    ]
    samples: dict[str, list[Usage]] = {name: [] for name in cluster.processes}
    for _ in range(NUM_SAMPLES):
        await asyncio.sleep(options.seconds / NUM_SAMPLES)
        for name, process in cluster.processes.items():
            samples[name].append(usage_of(process.pid))
        if any(task.done() for task in tasks):
            break
    stopping.set()
    async with asyncio.timeout(FINISH_SECONDS):
        await asyncio.gather(*tasks)
    return samples


async def emptied(cluster: ChaosCluster, session_seconds: float) -> list[str]:
    """What is left once sessions had their time to go."""
    immortal = [f"redis: {key} stays for ever" for key in await immortal_keys(cluster.redis_port)]
    deadline = time.monotonic() + 2 * session_seconds + 10.0
    left = [""]
    while left and time.monotonic() < deadline:
        await asyncio.sleep(POLL_SECONDS)
        keys = await session_keys(cluster.redis_port)
        left = [*await gauges_left(cluster.metrics), *(f"redis: {key} is left" for key in keys)]
    return [*immortal, *left]


def _most(usages: Sequence[Usage]) -> Usage:
    return Usage(max(one.memory_bytes for one in usages), max(one.num_files for one in usages))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600.0, help="how long the load lasts")
    parser.add_argument("--users", type=int, default=16, help="users at once")
    parser.add_argument("--tokens", type=int, default=64, help="most tokens of an answer")
    parser.add_argument("--session-seconds", type=float, default=60.0, help="life of a session")
    parser.add_argument("--output", type=Path, default=Path("bench/results/soak.json"))
    return parser.parse_args()


def main() -> int:
    """Exit status 0 when nothing failed, differed, grew or was left."""
    arguments = _arguments()
    prompts = read_prompts(DEMO / "prompts.jsonl", NUM_PROMPTS)
    pair = ClusterOptions((DEMO / "target").resolve(), (DEMO / "draft").resolve())
    options = SoakOptions(
        MatrixOptions(pair, prompts, arguments.tokens),
        arguments.seconds,
        arguments.users,
        arguments.session_seconds,
    )
    report = asyncio.run(soak(options))
    facts = {name: _plain(value) for name, value in vars(report).items()}
    text = json.dumps({"clean": report.clean, "machine": machine_facts(), **facts}, indent=2)
    arguments.output.write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")
    return 0 if report.clean else 1


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return vars(value) if isinstance(value, Usage) else value


if __name__ == "__main__":
    sys.exit(main())
