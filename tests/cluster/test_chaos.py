"""Faults on real processes, the cheapest rows of the matrix, and a short soak, on a tiny pair."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from specinfer.errors import SpecinferError
from specinfer_bench.chaos import redis as servers
from specinfer_bench.chaos.actions import fill_disk
from specinfer_bench.chaos.cluster import ChaosCluster, ClusterOptions, chaos_cluster, faketime
from specinfer_bench.chaos.load import unbroken
from specinfer_bench.chaos.matrix import MatrixOptions, run_row
from specinfer_bench.chaos.readings import Answer, Case
from specinfer_bench.chaos.row import Row, hold
from specinfer_bench.chaos.rows import ROLLING, named
from specinfer_bench.chaos.soak import SoakOptions, emptied, soak

# Eight processes start, and some of them again, which takes a while on a busy machine.
pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(600),
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("redis-server") is None, reason="there is no redis-server"),
]

ROWS = ("draft-stopped", "router-killed", "redis-flushed")


@pytest.fixture(scope="module")
def options(tiny_pair: tuple[Path, Path]) -> MatrixOptions:
    target, draft = tiny_pair
    return MatrixOptions(
        ClusterOptions(target, draft),
        prompts=("one", "two and", "three or more", "a longer text of some words"),
        # The tiny model is fast: long answers, so that streams are under way when it happens.
        max_tokens=300,
        num_grpc=6,
        num_http=2,
    )


Ready = tuple[ChaosCluster, dict[Case, Answer]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def ready(options: MatrixOptions) -> AsyncIterator[Ready]:
    async with chaos_cluster(options.cluster) as cluster:
        yield cluster, await unbroken(cluster.routers, options.cases())


async def test_faults_cost_time_alone(ready: Ready, options: MatrixOptions) -> None:
    cluster, right = ready
    for name in ROWS:
        row = named(name)
        assert row is not None
        result = await run_row(row, cluster, options, right)
        assert result.clean, result
        assert result.verdict is not None
        assert result.verdict.num_running == options.num_grpc + options.num_http


async def test_a_wrong_token_and_an_error_would_be_seen(
    ready: Ready, options: MatrixOptions
) -> None:
    """The control: against a record with one token flipped, and with no router left at all."""
    cluster, right = ready
    case = next(iter(right))
    tokens = list(right[case].token_ids)
    tokens[150] ^= 1
    flipped = {**right, case: dataclasses.replace(right[case], token_ids=tuple(tokens))}
    row = Row[ChaosCluster]("as-usual", "nothing", (hold(0.5),), "all", settle_seconds=0.1)
    result = await run_row(row, cluster, options, flipped)
    assert result.verdict is not None
    assert result.verdict.num_different > 0
    assert result.verdict.num_failed == 0
    assert not result.clean


@pytest.mark.chaos
async def test_every_process_restarts_under_streams_and_nobody_fails(
    ready: Ready, options: MatrixOptions
) -> None:
    cluster, right = ready
    sixteen = dataclasses.replace(options, num_grpc=14)
    result = await run_row(ROLLING, cluster, sixteen, right)
    assert result.clean, result
    assert all(process.num_starts == 2 for process in cluster.processes.values())


@pytest.mark.chaos
async def test_a_short_soak_leaves_nothing(options: MatrixOptions) -> None:
    report = await soak(SoakOptions(options, seconds=20.0, num_users=6, session_seconds=8.0))
    assert not report.failed, report.failed[:5]
    assert not report.different, report.different[:5]
    assert not report.left
    assert not report.grown
    assert set(report.requests) >= {"read", "http", "left", "cancelled", "resumed", "structured"}


async def test_a_soak_sees_a_key_that_was_left(ready: Ready) -> None:
    cluster, _ = ready
    async with servers.client(cluster.redis_port) as redis:
        await redis.set("specinfer:{planted}:session", "1")
    left = await emptied(cluster, session_seconds=0.5)
    assert any("planted" in line and "for ever" in line for line in left)
    assert any("planted" in line and "is left" in line for line in left)


@pytest.mark.chaos
@pytest.mark.skipif(faketime() is None, reason="libfaketime is not installed")
async def test_clocks_of_an_hour_apart_are_survived(options: MatrixOptions) -> None:
    row = named("clock-wrong")
    assert row is not None
    cluster_options = dataclasses.replace(options.cluster, **row.options)
    async with chaos_cluster(cluster_options) as cluster:
        right = await unbroken(cluster.routers, options.cases())
        result = await run_row(row, cluster, options, right)
        assert result.clean, result


async def test_a_disk_can_be_filled_and_emptied(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    try:
        servers.mount_small(folder, "1m")
    except SpecinferError as error:
        pytest.skip(str(error))
    try:
        cluster = ChaosCluster(ClusterOptions(tmp_path, tmp_path), tmp_path)
        (tmp_path / "redis").symlink_to(folder)
        await fill_disk().run(cluster)
        with pytest.raises(OSError, match="No space"):
            (folder / "more").write_bytes(b"x" * 65536)
        servers.empty(folder)
        (folder / "more").write_bytes(b"x" * 65536)
    finally:
        servers.unmount(folder)
