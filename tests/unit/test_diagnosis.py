"""What facts about a cluster mean: verdicts that change with the facts, and remedies for all."""

from __future__ import annotations

import asyncio
import socket
import time
from dataclasses import replace

import pytest

from specinfer.messages import WorkerInfo, WorkerLoad, WorkerStatus
from specinfer.messages.admin import FAILED, OK, SKIPPED, WARNING, Finding
from specinfer.redis_connection import RedisSettings
from specinfer.rpc import TlsSettings
from specinfer.server import build_server
from specinfer.step_curve import age
from specinfer_router.diagnosis import (
    RedisFacts,
    certificate_findings,
    clock_finding,
    cluster_findings,
    judge_redis,
    redis_findings,
)
from tests.kit.certificates import Certificates
from tests.kit.fake_workers import info_of

GOOD_REDIS = RedisFacts(
    version="7.0.15",
    policy="noeviction",
    used_bytes=100 * 2**20,
    max_bytes=1000 * 2**20,
    persistent=True,
    user="specinfer",
    clock=1000.0,
)


def worker(tier: str, address: str, **changes: object) -> WorkerStatus:
    info = info_of(tier)
    known = WorkerStatus(
        tier=tier,
        worker_id=info.worker_id,
        address=address,
        source="static",
        connected=True,
        ready=True,
        info=info,
        load=WorkerLoad(num_free_blocks=info.num_blocks),
        breaker="closed",
    )
    return replace(known, **changes)  # type: ignore[arg-type]


def healthy() -> list[WorkerStatus]:
    return [worker("verify", "v1"), worker("verify", "v2"), worker("draft", "d1")]


def version_of(workers: list[WorkerStatus]) -> str:
    info = workers[0].info
    assert info is not None
    return info.version


def verdicts(findings: list[Finding]) -> dict[str, str]:
    return {finding.check: finding.verdict for finding in findings}


def test_a_healthy_cluster_is_all_right() -> None:
    workers = healthy()
    findings = cluster_findings(version_of(workers), workers, 0.1)
    assert set(verdicts(findings).values()) == {OK}
    assert {"verify workers", "draft workers", "versions", "tokenizers"} <= set(verdicts(findings))


def test_what_passes_cost_is_shown_for_each_worker() -> None:
    workers = healthy()
    three_hours_ago = time.time() - 3 * 3600
    workers[1] = replace(
        workers[1],
        info=changed(workers[1].info, costs_measured_at=three_hours_ago, kv_dtype="float8_e4m3fn"),
    )
    workers[2] = replace(workers[2], info=changed(workers[2].info, step_costs=()))
    found = {
        finding.check: finding for finding in cluster_findings(version_of(workers), workers, 0.1)
    }
    assert found["profile of v1"].detail == "a pass of 1/8/32 rows takes 1/1.5/6 ms"
    assert found["profile of v2"].detail == f"{found['profile of v1'].detail}, measured 3 h ago"
    assert found["profile of d1"].verdict == SKIPPED
    assert found["memory of v1"].detail.startswith("keys and values of")
    assert found["memory of v2"].detail.startswith("keys and values in float8_e4m3fn of")


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(-9, "0 min"), (61, "1 min"), (7100, "118 min"), (7200, "2 h"), (172_800, "2 days")],
)
def test_an_age_is_told_roughly(seconds: float, told: str) -> None:
    assert age(1.5e9, 1.5e9 + seconds) == f"{told} ago"
    for unknown in (0.0, -1.0, float("nan"), float("inf")):
        assert age(unknown, 1.5e9) == ""


def changed(info: WorkerInfo | None, **changes: object) -> WorkerInfo:
    assert info is not None
    return replace(info, **changes)  # type: ignore[arg-type]


def test_every_trouble_has_its_own_line_and_a_remedy() -> None:
    good = healthy()
    info = good[0].info
    draining = WorkerLoad(num_waiting=3, num_free_blocks=0)
    cases = [
        ([good[2]], "verify workers", FAILED),
        (good[:2], "draft workers", WARNING),
        ([good[0], good[2]], "verify workers", WARNING),
        ([*good, worker("draft", "d2", connected=False, ready=False)], "draft workers", WARNING),
        ([*good, worker("draft", "d2", refusal="another model")], "draft worker d2", FAILED),
        ([*good, worker("draft", "d2", breaker="open")], "draft worker d2", WARNING),
        (
            [*good, worker("draft", "d2", info=changed(info, version="0")), good[0]],
            "versions",
            WARNING,
        ),
        (
            [*good, worker("draft", "d2", info=changed(info, tokenizer_hash="x"))],
            "tokenizers",
            FAILED,
        ),
        (
            [*good, worker("verify", "v3", info=changed(info, num_blocks=1))],
            "memory of v3",
            WARNING,
        ),
        ([*good, worker("verify", "v3", load=draining)], "memory of v3", WARNING),
    ]
    for workers, check, verdict in cases:
        found = [
            finding
            for finding in cluster_findings(version_of(good), workers, None)
            if finding.check == check
        ]
        assert [finding.verdict for finding in found] == [verdict], check
        assert found[0].remedy, check


def test_without_any_answer_tokenizers_are_not_judged() -> None:
    silent = [worker("verify", "v1", info=None, connected=False, ready=False)]
    assert verdicts(cluster_findings("1", silent, None))["tokenizers"] == SKIPPED


@pytest.mark.parametrize(
    ("ahead", "verdict"), [(0.0, OK), (-1.9, OK), (2.5, WARNING), (-60, WARNING)]
)
def test_a_clock_is_judged_by_how_far_it_is_off(ahead: float, verdict: str) -> None:
    assert clock_finding("clock", ahead).verdict == verdict


def test_a_good_redis_is_all_right() -> None:
    assert set(verdicts(judge_redis(GOOD_REDIS, now=1000.5)).values()) == {OK}


@pytest.mark.parametrize(
    ("changes", "check", "verdict"),
    [
        ({"policy": "allkeys-lru"}, "redis policy", FAILED),
        ({"max_bytes": 0}, "redis memory", WARNING),
        ({"used_bytes": 900 * 2**20}, "redis memory", WARNING),
        ({"persistent": False}, "redis persistence", WARNING),
        ({"user": "default"}, "redis user", WARNING),
        ({"user": ""}, "redis user", SKIPPED),
        ({"clock": 900.0}, "clock of redis", WARNING),
    ],
)
def test_a_redis_that_would_lose_sessions_is_told_apart(
    changes: dict[str, object], check: str, verdict: str
) -> None:
    facts = replace(GOOD_REDIS, **changes)  # type: ignore[arg-type]
    assert verdicts(judge_redis(facts, now=1000.0))[check] == verdict


async def test_a_real_redis_is_read(redis_server: str) -> None:
    found = {
        finding.check: finding for finding in await redis_findings(RedisSettings(redis_server))
    }
    assert found["redis"].verdict == OK
    assert found["clock of redis"].verdict == OK
    assert found["redis user"].verdict == WARNING


async def test_a_redis_that_is_not_there_is_one_line() -> None:
    settings = RedisSettings("redis://127.0.0.1:1/0", timeout_seconds=0.2, num_retries=0)
    (finding,) = await redis_findings(settings)
    assert finding.verdict == FAILED
    assert "127.0.0.1:1" in finding.detail


async def test_a_redis_that_hangs_is_one_line_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}/0"
        async with asyncio.timeout(5):
            (finding,) = await redis_findings(RedisSettings(url))
    assert finding.verdict == FAILED


async def test_a_certificate_that_ends_soon_is_told(certificates: Certificates) -> None:
    tls = TlsSettings(certificates.ca, certificates.server.certificate, certificates.server.key)
    server = build_server("127.0.0.1:0", ["specinfer.v1.Nothing"], tls=tls)
    await server.start()
    (finding,) = await certificate_findings("certificate", f"127.0.0.1:{server.port}", tls)
    # The kit's certificates are valid for a day.
    assert finding.verdict == WARNING
    assert "days" in finding.detail
    await server.server.stop(0)


async def test_a_certificate_of_nobody_we_know_fails(certificates: Certificates) -> None:
    stranger = certificates.stranger
    tls = TlsSettings(None, stranger.certificate, stranger.key)
    server = build_server("127.0.0.1:0", ["specinfer.v1.Nothing"], tls=tls)
    await server.start()
    address = f"127.0.0.1:{server.port}"
    for trusted, verdict in ((TlsSettings(certificates.ca), FAILED), (tls, WARNING)):
        (finding,) = await certificate_findings("a", address, trusted)
        assert finding.verdict == verdict
    await server.server.stop(0)
