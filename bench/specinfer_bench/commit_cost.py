"""What keeping sessions in Redis adds to a round: 64 sessions, with memory and with Redis in turn.

    redis-server --port 6379 --appendonly yes --maxmemory-policy noeviction &
    python -m specinfer_bench.commit_cost --redis redis://127.0.0.1:6379/0 --output commit-cost.json

The stores are the router's own and the Redis is real. The workers are waits of a stated length: a
pass takes as many sessions as its rows allow and answers them all at once, as a worker's frame
does, so commits come in bursts. Both arms run in turn, the first one alternating. This module
starts nothing, and knows nothing of models.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from specinfer.redis_connection import RedisSettings
from specinfer.sampling import SamplingParams, StopConditions
from specinfer_bench.cluster_report import write_report
from specinfer_bench.machine import machine_facts
from specinfer_bench.spread import Spread, spread
from specinfer_router.store import (
    CANCELLED,
    DurableStore,
    MemoryStore,
    RedisStore,
    SessionRecord,
    SessionStore,
    SessionTerms,
)

MODULE = "specinfer_bench.commit_cost"
GOAL_MS = 1.0
PROMPT_TOKENS = 500
ARMS = ("memory", "redis")


@dataclass(frozen=True)
class Load:
    """What runs.

    Attributes:
        sessions: sessions at once.
        rounds: rounds of each in one turn of an arm.
        draft_seconds, verify_seconds: length of a pass.
        max_rows: rows of a verify pass.
        tree_nodes: rows of one session's tree, the root included.
        tokens: tokens of a commit.
    """

    sessions: int = 64
    rounds: int = 20
    draft_seconds: float = 0.004
    verify_seconds: float = 0.040
    max_rows: int = 256
    tree_nodes: int = 9
    tokens: int = 4


@dataclass(frozen=True)
class RoundTimes:
    """Seconds of one round."""

    propose: float
    verify: float
    commit: float

    @property
    def whole(self) -> float:
        """All of it."""
        return self.propose + self.verify + self.commit


class Tier:
    """Workers as waits: one pass at a time, of at most `width` sessions, answered all at once."""

    def __init__(self, seconds: float, width: int) -> None:
        self._seconds = seconds
        self._width = width
        self._waiting: list[asyncio.Future[None]] = []
        self._passes: asyncio.Task[None] | None = None

    async def ask(self) -> float:
        """Wait for an answer; returns the seconds it took."""
        begun = time.perf_counter()
        answered = asyncio.get_running_loop().create_future()
        self._waiting.append(answered)
        if self._passes is None:
            self._passes = asyncio.create_task(self._run())
        await answered
        return time.perf_counter() - begun

    async def _run(self) -> None:
        while self._waiting:
            taken, self._waiting = self._waiting[: self._width], self._waiting[self._width :]
            await asyncio.sleep(self._seconds)
            for answered in taken:
                answered.set_result(None)
        self._passes = None


async def turn(store: SessionStore, load: Load) -> list[RoundTimes]:
    """The rounds of all sessions on one store."""
    drafters = Tier(load.draft_seconds, load.sessions)
    verifiers = Tier(load.verify_seconds, max(1, load.max_rows // load.tree_nodes))
    # All are there before the first round, so that both arms begin in step.
    records = [await _opened(store, load) for _ in range(load.sessions)]
    together = (_session(store, each, load, drafters, verifiers) for each in records)
    return [times for rounds in await asyncio.gather(*together) for times in rounds]


async def _opened(store: SessionStore, load: Load) -> SessionRecord:
    stop = StopConditions(max_tokens=load.rounds * load.tokens)
    terms = SessionTerms("benchmark", PROMPT_TOKENS, SamplingParams(seed=1), stop)
    record = SessionRecord(uuid.uuid4().hex, terms, tuple(range(PROMPT_TOKENS)))
    await store.create(record)
    return record


async def _session(
    store: SessionStore, record: SessionRecord, load: Load, drafters: Tier, verifiers: Tier
) -> list[RoundTimes]:
    found = []
    for epoch in range(load.rounds):
        propose, verify = await drafters.ask(), await verifiers.ask()
        begun = time.perf_counter()
        await store.commit(record.session_id, epoch, range(load.tokens))
        found.append(RoundTimes(propose, verify, time.perf_counter() - begun))
    await store.finish(record.session_id, CANCELLED)
    return found


@dataclass(frozen=True)
class Cost:
    """Milliseconds, of all rounds of an arm."""

    commit_p50: float
    commit_p99: float
    propose_p50: float
    verify_p50: float
    round_p50: float


def cost(times: Sequence[RoundTimes]) -> Cost:
    """An arm's percentiles."""
    return Cost(
        commit_p50=_percentile([each.commit for each in times], 0.5),
        commit_p99=_percentile([each.commit for each in times], 0.99),
        propose_p50=_percentile([each.propose for each in times], 0.5),
        verify_p50=_percentile([each.verify for each in times], 0.5),
        round_p50=_percentile([each.whole for each in times], 0.5),
    )


def _percentile(seconds: Sequence[float], share: float) -> float:
    return round(1e3 * sorted(seconds)[int(share * (len(seconds) - 1))], 4)


async def measure(redis: RedisSettings, load: Load, turns: int) -> dict[str, object]:
    """Run both arms `turns` times each, after a warm-up of both."""
    stores: dict[str, SessionStore] = {
        "memory": MemoryStore(),
        "redis": DurableStore(RedisStore(redis, ttl_seconds=600.0)),
    }
    times: dict[str, list[list[RoundTimes]]] = {arm: [] for arm in ARMS}
    try:
        for at in range(-1, turns):
            for arm in ARMS if at % 2 else reversed(ARMS):
                found = await turn(stores[arm], load)
                if at >= 0:
                    times[arm].append(found)
    finally:
        for store in stores.values():
            await store.close()
    arms = {arm: cost([each for part in times[arm] for each in part]) for arm in ARMS}
    return {
        "goal_ms": GOAL_MS,
        "load": asdict(load),
        "rounds_of_an_arm": turns * load.sessions * load.rounds,
        "arms_ms": {arm: asdict(found) for arm, found in arms.items()},
        "added_commit_ms": asdict(_added(times, "commit_p50")),
        "added_round_ms": asdict(_added(times, "round_p50")),
        "added_propose_ms": asdict(_added(times, "propose_p50")),
    }


def _added(times: dict[str, list[list[RoundTimes]]], name: str) -> Spread:
    """The medians with Redis less those with memory, turn by turn."""
    medians = {arm: [getattr(cost(part), name) for part in times[arm]] for arm in ARMS}
    return spread([b - a for a, b in zip(medians["memory"], medians["redis"], strict=True)])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--redis", required=True, help="URL of a Redis")
    parser.add_argument("--sessions", type=int, default=64, help="sessions at once")
    parser.add_argument("--turns", type=int, default=20, help="times that each arm runs")
    parser.add_argument("--output", type=Path, help="also write the report to this file")
    return parser.parse_args()


def main() -> None:
    """Measure and print the report."""
    arguments = _arguments()
    load = Load(sessions=arguments.sessions)
    before = os.getloadavg()[0]
    report = asyncio.run(measure(RedisSettings(arguments.redis), load, arguments.turns))
    setup = {
        "command": f"python -m {MODULE} " + shlex.join(sys.argv[1:]),
        "machine": machine_facts(),
        "load_average": before,
    }
    write_report({**report, "setup": setup}, arguments.output)


if __name__ == "__main__":
    main()
