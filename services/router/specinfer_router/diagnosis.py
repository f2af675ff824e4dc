"""What facts about a cluster mean to an operator: a verdict for each, and a remedy.

This module knows nothing of gRPC, and changes nothing.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from specinfer.errors import SpecinferError
from specinfer.messages import WorkerStatus
from specinfer.messages.admin import FAILED, OK, SKIPPED, WARNING, Finding
from specinfer.redis_connection import RedisSettings, close
from specinfer.rpc import TlsSettings
from specinfer.step_curve import SHOWN_ROWS, age, shown

MAX_SKEW_SECONDS = 2.0
CERTIFICATE_DAYS = 21.0
CERTIFICATE_EXPIRED = 10  # X509_V_ERR_CERT_HAS_EXPIRED
MEMORY_SHARE = 0.8
HANDSHAKE_SECONDS = 3.0
REDIS_SECONDS = 2.0


def cluster_findings(
    version: str, workers: Sequence[WorkerStatus], skew_seconds: float | None
) -> list[Finding]:
    """Workers, their versions, models and memory, and the caller's clock.

    Args:
        version: of the router.
        workers: as the router knows them.
        skew_seconds: how far the router's clock is ahead of the caller's, or None.
    """
    findings = [_tier("verify", workers), _tier("draft", workers)]
    findings += [_refused(worker) for worker in workers if worker.refusal]
    findings += [_resting(worker) for worker in workers if worker.breaker not in ("", "closed")]
    findings.append(_versions(version, workers))
    findings.append(_tokenizers(workers))
    findings += [_memory(worker) for worker in workers if worker.info and worker.tier == "verify"]
    findings += [_profile(worker) for worker in workers if worker.info]
    if skew_seconds is not None:
        findings.append(clock_finding("clock of this machine", -skew_seconds))
    return findings


def clock_finding(check: str, ahead_seconds: float) -> Finding:
    """How far a clock is ahead of the router's."""
    detail = f"{ahead_seconds:+.1f} s against the router's"
    if abs(ahead_seconds) <= MAX_SKEW_SECONDS:
        return Finding(check, OK, detail)
    return Finding(
        check,
        WARNING,
        detail,
        "leases do not depend on it, but logs, traces and keys that expire do: run NTP there",
    )


def _tier(tier: str, workers: Sequence[WorkerStatus]) -> Finding:
    known = [worker for worker in workers if worker.tier == tier]
    num_ready = sum(worker.ready for worker in known)
    detail = f"{num_ready} of {len(known)} take sessions"
    lost = [worker.address for worker in known if not worker.connected]
    if lost:
        detail += f"; no connection to {', '.join(lost[:4])}"
    if num_ready == 0 and tier == "verify":
        return Finding(
            "verify workers", FAILED, detail, "start one; nothing is served without the target"
        )
    if num_ready == 0:
        return Finding("draft workers", WARNING, detail, "start one; until then nothing is guessed")
    if num_ready < len(known):
        return Finding(f"{tier} workers", WARNING, detail, "see the log of those that are missing")
    if num_ready == 1 and tier == "verify":
        return Finding(
            "verify workers", WARNING, detail, "run two, so that one may die without a pause"
        )
    return Finding(f"{tier} workers", OK, detail)


def _refused(worker: WorkerStatus) -> Finding:
    return Finding(
        f"{worker.tier} worker {worker.address}",
        FAILED,
        worker.refusal,
        "start it with the checkpoint and tokenizer that belong to the target, or end it",
    )


def _resting(worker: WorkerStatus) -> Finding:
    return Finding(
        f"{worker.tier} worker {worker.address}",
        WARNING,
        f"its circuit breaker is {worker.breaker}: it let deadlines pass or answered nonsense",
        "look at its log and its load; it is tried again by itself",
    )


def _versions(version: str, workers: Sequence[WorkerStatus]) -> Finding:
    others = {worker.info.version for worker in workers if worker.info} - {version}
    if not others:
        return Finding("versions", OK, f"all run {version}")
    return Finding(
        "versions",
        WARNING,
        f"the router runs {version}, workers run {', '.join(sorted(others))}",
        "finish the upgrade: workers first, then routers",
    )


def _tokenizers(workers: Sequence[WorkerStatus]) -> Finding:
    hashes = {worker.info.tokenizer_hash for worker in workers if worker.info}
    if not hashes:
        return Finding("tokenizers", SKIPPED, "no worker has answered yet")
    if len(hashes) == 1:
        return Finding("tokenizers", OK, f"all share {next(iter(hashes))[:12]}")
    return Finding(
        "tokenizers",
        FAILED,
        f"{len(hashes)} different ones: {', '.join(sorted(one[:12] for one in hashes))}",
        "drafters and target need the same tokenizer.json; those that differ are not used",
    )


def _memory(worker: WorkerStatus) -> Finding:
    info = worker.info
    assert info is not None
    tokens = info.num_blocks * info.block_size
    longest = tokens // max(1, info.max_model_len)
    free = worker.load.num_free_blocks / max(1, info.num_blocks) if worker.connected else 1.0
    check = f"memory of {worker.address}"
    form = f" in {info.kv_dtype}" if info.kv_dtype not in ("", info.dtype) else ""
    detail = (
        f"keys and values{form} of {tokens} tokens, {longest} of the longest sessions "
        f"({info.max_model_len} tokens), {free:.0%} free"
    )
    if longest < 1:
        return Finding(
            check, WARNING, detail, "the longest sessions are refused: raise --kv-memory"
        )
    if free < 1 - MEMORY_SHARE and worker.load.num_waiting:
        return Finding(check, WARNING, detail, "sessions wait for blocks: raise --kv-memory")
    return Finding(check, OK, detail)


def _profile(worker: WorkerStatus) -> Finding:
    """What its passes took when it started: trees are chosen by that until passes tell more."""
    assert worker.info is not None
    check, costs = f"profile of {worker.address}", worker.info.step_costs
    if not costs:
        return Finding(check, SKIPPED, "the worker has not measured its passes")
    rows = "/".join(map(str, SHOWN_ROWS))
    measured = age(worker.info.costs_measured_at, time.time())
    detail = f"a pass of {rows} rows takes {shown(costs)} ms"
    return Finding(check, OK, f"{detail}, measured {measured}" if measured else detail)


@dataclass(frozen=True)
class RedisFacts:
    """What Redis says of itself.

    Attributes:
        version: of the server.
        policy: maxmemory-policy.
        used_bytes, max_bytes: memory in use and allowed, 0 for no bound.
        persistent: whether it writes an append-only file.
        user: ACL user that we are, or "" when we may not ask.
        clock: its time in seconds since 1970.
    """

    version: str
    policy: str
    used_bytes: int
    max_bytes: int
    persistent: bool
    user: str
    clock: float


async def redis_findings(settings: RedisSettings) -> list[Finding]:
    """Whether Redis can be reached and is set up to keep sessions."""
    brief = replace(settings, num_retries=0)
    try:
        async with asyncio.timeout(REDIS_SECONDS):
            facts = await read_redis(brief)
    except TimeoutError:
        detail = f"{settings.place} has not answered within {REDIS_SECONDS:g} s"
        return [Finding("redis", FAILED, detail, "running streams go on for a while; mend it")]
    except SpecinferError as error:
        return [
            Finding("redis", FAILED, error.message, "running streams go on for a while; mend it")
        ]
    return judge_redis(facts, now=time.time())


async def read_redis(settings: RedisSettings) -> RedisFacts:
    """Ask Redis on a connection of its own; raises what `RedisSettings.answer` raises."""
    client = cast(Any, settings.connect())
    try:
        info = await settings.answer(client.info())
        # A cluster answers for each node; one stands for all here.
        if info and all(
            isinstance(value, dict) and "redis_version" in value for value in info.values()
        ):
            info = next(iter(info.values()))
        seconds, microseconds = await settings.answer(client.time())
        user = ""
        with suppress(SpecinferError):  # a user need not have the right to ask
            user = str(await settings.answer(client.acl_whoami()))
    finally:
        await close(client)
    return RedisFacts(
        version=str(info.get("redis_version", "")),
        policy=str(info.get("maxmemory_policy", "")),
        used_bytes=int(info.get("used_memory", 0)),
        max_bytes=int(info.get("maxmemory", 0)),
        persistent=bool(info.get("aof_enabled", 0)),
        user=user,
        clock=int(seconds) + int(microseconds) / 1e6,
    )


def judge_redis(facts: RedisFacts, *, now: float) -> list[Finding]:
    """Verdicts over what Redis says of itself; `now` is the router's time since 1970."""
    findings = [Finding("redis", OK, f"version {facts.version}")]
    if facts.policy == "noeviction":
        findings.append(Finding("redis policy", OK, facts.policy))
    else:
        findings.append(
            Finding(
                "redis policy",
                FAILED,
                f"{facts.policy or 'unknown'}: sessions and leases may vanish when memory is full",
                "set maxmemory-policy noeviction",
            )
        )
    findings.append(_redis_memory(facts))
    findings.append(
        Finding("redis persistence", OK, "append-only file")
        if facts.persistent
        else Finding(
            "redis persistence",
            WARNING,
            "no append-only file: a restart forgets all sessions",
            "set appendonly yes and appendfsync everysec, or run a replica",
        )
    )
    findings.append(_redis_user(facts.user))
    findings.append(clock_finding("clock of redis", facts.clock - now))
    return findings


def _redis_memory(facts: RedisFacts) -> Finding:
    used = f"{facts.used_bytes / 2**20:.0f} MiB used"
    if not facts.max_bytes:
        return Finding(
            "redis memory",
            WARNING,
            f"{used}, no maxmemory",
            "set maxmemory, so that it refuses writes instead of being killed",
        )
    detail = f"{used} of {facts.max_bytes / 2**20:.0f} MiB"
    if facts.used_bytes > MEMORY_SHARE * facts.max_bytes:
        return Finding(
            "redis memory", WARNING, detail, "raise maxmemory or lower --session-seconds"
        )
    return Finding("redis memory", OK, detail)


def _redis_user(user: str) -> Finding:
    if not user:
        return Finding("redis user", SKIPPED, "the user may not ask who it is")
    if user == "default":
        return Finding(
            "redis user",
            WARNING,
            "the user default, which may do anything",
            "make a user with the rights in docs/sessions.md and turn default off",
        )
    return Finding("redis user", OK, user)


async def certificate_findings(check: str, address: str, tls: TlsSettings) -> list[Finding]:
    """How long the certificate that `address` shows is still valid.

    Args:
        check: what to call it.
        address: host and port of a TLS server.
        tls: whom to trust; our own certificate is trusted as it is.
    """
    try:
        ends = await _certificate_end(address, tls)
    except ssl.SSLCertVerificationError as error:
        remedy = "see docs/access.md"
        if error.verify_code == CERTIFICATE_EXPIRED:
            remedy = "renew it and restart the process"
        return [Finding(check, FAILED, f"{address}: {error.verify_message}", remedy)]
    except (OSError, ssl.SSLError, ValueError, TimeoutError) as error:
        return [
            Finding(check, FAILED, f"no TLS connection to {address}: {error}", "see docs/access.md")
        ]
    days = (ends - datetime.now(UTC)).total_seconds() / 86400
    detail = f"valid until {ends:%Y-%m-%d %H:%M} UTC, {days:.0f} days"
    if days < CERTIFICATE_DAYS:
        verdict = WARNING if days > 0 else FAILED
        return [Finding(check, verdict, detail, "renew it and restart the process")]
    return [Finding(check, OK, detail)]


async def _certificate_end(address: str, tls: TlsSettings) -> datetime:
    host, _, port = address.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # Whose name it bears is the clients' affair; here only its end counts.
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.set_alpn_protocols(["h2", "http/1.1"])
    trusted: list[Path] = [path for path in (tls.ca, tls.certificate) if path is not None]
    for path in trusted:
        context.load_verify_locations(path)
    if not trusted:
        context.load_default_certs()
    if tls.certificate is not None and tls.key is not None:
        context.load_cert_chain(tls.certificate, tls.key)
    async with asyncio.timeout(HANDSHAKE_SECONDS):
        _, writer = await asyncio.open_connection(host.strip("[]"), int(port), ssl=context)
    try:
        found: dict[str, Any] = writer.get_extra_info("peercert") or {}
        return datetime.fromtimestamp(ssl.cert_time_to_seconds(str(found["notAfter"])), UTC)
    finally:
        writer.close()
