"""Runs rows: a cluster, load on it, the row's actions, and the verdict of those who read.

This module knows nothing of files or of how results are shown.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace

from specinfer.errors import SpecinferError
from specinfer_bench.chaos.background import Background
from specinfer_bench.chaos.cluster import ChaosCluster, ClusterOptions, chaos_cluster
from specinfer_bench.chaos.load import Load, LoadOptions, unbroken
from specinfer_bench.chaos.readings import Answer, Case, Verdict, judge
from specinfer_bench.chaos.row import AnyCluster, Cluster, Row

BACKGROUND_RESPONSES = 8
BACKGROUND_SECONDS = 240.0


@dataclass(frozen=True)
class MatrixOptions:
    """What all rows have in common.

    Attributes:
        cluster: the cluster of rows that say nothing else.
        prompts: texts to continue.
        max_tokens: tokens of each answer.
        num_grpc, num_http: clients of either kind.
    """

    cluster: ClusterOptions
    prompts: Sequence[str]
    max_tokens: int = 96
    num_grpc: int = 16
    num_http: int = 4

    def cases(self) -> list[Case]:
        """Every prompt greedily and at temperature 0.8."""
        return [
            Case(prompt, temperature, seed, self.max_tokens)
            for seed, prompt in enumerate(self.prompts, 1)
            for temperature in (0.0, 0.8)
        ]


@dataclass(frozen=True)
class RowResult:
    """One row that was run.

    Attributes:
        name: of the row.
        seconds: from the first action to the end of the last one.
        load_average: of the machine, when the row began.
        trouble: what went wrong beside streams, such as a process that did not end; or "".
        verdict: what users noticed, or None when there is nothing to judge.
    """

    name: str
    seconds: float
    load_average: float
    trouble: str
    verdict: Verdict | None

    @property
    def clean(self) -> bool:
        """Whether the goal was met."""
        return self.verdict is not None and self.verdict.clean and not self.trouble


async def run_rows(
    rows: Sequence[Row[ChaosCluster]], options: MatrixOptions
) -> AsyncIterator[RowResult]:
    """Run rows in turn; those with the same options share a cluster that is healed between them."""
    async with AsyncExitStack() as stack:
        cluster: ChaosCluster | None = None
        right: dict[Case, Answer] = {}
        for row in rows:
            wanted = replace(options.cluster, **row.options)
            try:
                if cluster is None or cluster.options != wanted:
                    await stack.aclose()
                    cluster = await stack.enter_async_context(chaos_cluster(wanted))
                right = right or await unbroken(cluster.routers, options.cases())
            except SpecinferError as error:
                cluster = None
                yield RowResult(row.name, 0.0, os.getloadavg()[0], f"no cluster: {error}", None)
                continue
            result = await run_row(row, cluster, options, right)
            yield result
            if result.trouble:
                cluster = None


async def run_on(
    cluster: AnyCluster, rows: Sequence[Row[AnyCluster]], options: MatrixOptions
) -> AsyncIterator[RowResult]:
    """Run rows in turn on a cluster that is there; raises SpecinferError when it does not serve."""
    right = await unbroken(cluster.routers, options.cases())
    for row in rows:
        yield await run_row(row, cluster, options, right)


async def run_row(
    row: Row[AnyCluster], cluster: AnyCluster, options: MatrixOptions, right: Mapping[Case, Answer]
) -> RowResult:
    """Run one row on a cluster that is whole, and make it whole again."""
    busy = os.getloadavg()[0]
    try:
        if row.background:
            seconds, trouble, verdict = await _in_background(row, cluster, options)
        else:
            seconds, trouble, verdict = await _under_load(row, cluster, options, right)
        trouble = trouble or await _healed(cluster)
    except (SpecinferError, OSError) as error:
        return RowResult(row.name, 0.0, busy, f"{type(error).__name__}: {error}", None)
    return RowResult(row.name, round(seconds, 1), round(busy, 1), trouble, verdict)


async def _under_load(
    row: Row[AnyCluster], cluster: AnyCluster, options: MatrixOptions, right: Mapping[Case, Answer]
) -> tuple[float, str, Verdict]:
    load = Load(
        LoadOptions(
            cluster.routers,
            cluster.gateways,
            cluster.model_name,
            options.cases(),
            options.num_grpc,
            options.num_http,
        )
    )
    load.start()
    try:
        await load.flowing()
        begin = time.monotonic()
        trouble = await _act(row, cluster)
        acted = time.monotonic()
        await asyncio.sleep(row.settle_seconds)
        end = time.monotonic()
    finally:
        await load.finish()
    return acted - begin, trouble, judge(load.readings, right, begin, end)


async def _in_background(
    row: Row[AnyCluster], cluster: AnyCluster, options: MatrixOptions
) -> tuple[float, str, Verdict]:
    cases = options.cases()[:BACKGROUND_RESPONSES]
    background = Background(cluster.gateways, cluster.model_name, cases)
    right = await background.unbroken()
    await background.begin()
    begin = time.monotonic()
    trouble = await _act(row, cluster)
    acted = time.monotonic()
    await background.finish(BACKGROUND_SECONDS)
    return acted - begin, trouble, judge(background.readings, right, begin, time.monotonic())


async def _healed(cluster: Cluster) -> str:
    """Make a cluster whole again; returns why it does not become so, or ""."""
    try:
        await cluster.heal()
    except SpecinferError as error:
        return f"the cluster does not heal: {error}"
    return ""


async def _act(row: Row[AnyCluster], cluster: AnyCluster) -> str:
    """Do what the row says; returns what went wrong with that, or ""."""
    for action in row.actions:
        try:
            await action.run(cluster)
        except SpecinferError as error:
            return f"{action.text}: {error}"
    return ""
