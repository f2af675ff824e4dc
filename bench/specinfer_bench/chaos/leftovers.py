"""What a cluster must not gather: memory, descriptors, and things of sessions that are over.

Processes are looked at from outside, through /proc, their metrics and Redis. This module knows
nothing of load.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from specinfer_bench.chaos import redis as servers

TIMEOUT_SECONDS = 5.0
PREFIX = "specinfer_"
WORKERS = "specinfer:{workers:"
# What has to be 0 when nobody asks for anything, and the label value that is meant, if any.
GAUGES = (
    ("num_requests_running", None),
    ("num_requests_waiting", None),
    ("num_sessions_running", None),
    ("num_streams_running", None),
    ("num_sessions", None),
    ("kv_blocks", ("state", "used")),
)
GROWTH_SHARE = 0.05
GROWTH_BYTES = 16 * 2**20
GROWTH_FILES = 8
WARM_UP_SHARE = 0.25


@dataclass(frozen=True)
class Usage:
    """What a process has of the machine at one moment."""

    memory_bytes: int
    num_files: int


def usage_of(pid: int) -> Usage:
    """Resident memory and open file descriptors of a process on this machine."""
    folder = Path(f"/proc/{pid}")
    for line in (folder / "status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return Usage(int(line.split()[1]) * 1024, len(list((folder / "fd").iterdir())))
    return Usage(0, 0)


def growth(samples: Mapping[str, Sequence[Usage]]) -> list[str]:
    """The processes that grew, each with what grew.

    The first quarter of the time is left out, in which caches and pools fill; then the median of
    the next quarter is held against that of the last one.
    """
    found = []
    for name, usages in samples.items():
        rest = usages[int(len(usages) * WARM_UP_SHARE) :]
        part = max(1, len(rest) // 3)
        early, late = rest[:part], rest[-part:]
        for what, allowed in (("memory_bytes", None), ("num_files", GROWTH_FILES)):
            before = statistics.median(getattr(one, what) for one in early)
            after = statistics.median(getattr(one, what) for one in late)
            bound = GROWTH_BYTES + GROWTH_SHARE * before if allowed is None else allowed
            if after - before > bound:
                found.append(f"{name}: {what} grew from {before:.0f} to {after:.0f}")
    return found


async def gauges_left(metrics: Mapping[str, str]) -> list[str]:
    """The gauges of processes, by the addresses of their metrics, that say something is left.

    A process whose metrics cannot be read, or lack all of these gauges, is among what is returned.
    """
    found = []
    async with httpx.AsyncClient(timeout=TIMEOUT_SECONDS, trust_env=False) as http:
        for name, address in metrics.items():
            try:
                answer = await http.get(f"http://{address}/metrics")
                found += left_of(name, answer.raise_for_status().text)
            except httpx.HTTPError as error:
                found.append(f"{name}: no metrics: {error}")
    return found


def left_of(name: str, text: str) -> list[str]:
    """What the metrics of one process, as text, say is left."""
    wanted = {PREFIX + gauge: label for gauge, label in GAUGES}
    found = []
    num_seen = 0
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name not in wanted:
                continue
            label = wanted[sample.name]
            if label is not None and sample.labels.get(label[0]) != label[1]:
                continue
            num_seen += 1
            if sample.value:
                found.append(f"{name}: {sample.name} is {sample.value:g}")
    return found if num_seen else [f"{name}: shows none of {', '.join(sorted(wanted))}"]


async def immortal_keys(port: int) -> list[str]:
    """The keys of a Redis that would stay for ever."""
    async with servers.client(port) as redis:
        return [key.decode() async for key in redis.scan_iter() if await redis.ttl(key) == -1]


async def session_keys(port: int) -> list[str]:
    """The keys of a Redis that belong to sessions, requests or what is kept of them."""
    async with servers.client(port) as redis:
        keys = [key.decode() async for key in redis.scan_iter(match="specinfer:*")]
    # The list of workers lasts as long as there are any.
    return [key for key in keys if not key.startswith(WORKERS)]
