"""The matrix for processes: every fault, what is done for it, and what is left meanwhile.

A new fault is a new row here. This module knows nothing of how actions work.
"""

from __future__ import annotations

from specinfer_bench.chaos.actions import (
    blackhole,
    cut,
    empty_disk,
    fail_over,
    fill_disk,
    flush,
    forget_scripts,
    kill,
    limit_memory,
    link,
    lose_last_second,
    mend,
    restart_each,
    resume,
    start,
    stop,
    terminate,
    unlimit_memory,
)
from specinfer_bench.chaos.cluster import ChaosCluster
from specinfer_bench.chaos.proxy import LinkFault
from specinfer_bench.chaos.row import Row, hold

LATE = LinkFault(delay=0.2, jitter=0.1)
LOSSY = LinkFault(delay=0.005, stall_chance=0.05, stall_seconds=0.3)
SLOW = LinkFault(bytes_per_second=20_000)
GARBLED = LinkFault(flip_chance=0.2)
FEW_BLOCKS = 40
WRONG_SECONDS = 3600.0


ProcessRow = Row[ChaosCluster]


def _link_rows(short: str, pattern: str, between: str, left: str) -> tuple[ProcessRow, ...]:
    """The same five faults of a network for the links between two tiers."""
    return (
        ProcessRow(
            f"{short}-cut",
            f"{between}: connections reset and refused for 3 s",
            (cut(pattern), hold(3), mend(pattern)),
            left,
        ),
        ProcessRow(
            f"{short}-silent",
            f"{between}: no byte arrives for 3 s, connections stay",
            (blackhole(pattern), hold(3), mend(pattern)),
            left,
        ),
        ProcessRow(
            f"{short}-late",
            f"{between}: every byte 200 to 300 ms late, each way, for 5 s",
            (link(pattern, LATE, "late"), hold(5), mend(pattern)),
            "all, slowly",
        ),
        ProcessRow(
            f"{short}-lossy",
            f"{between}: 1 chunk in 20 stands still for 300 ms, as after a lost packet, for 5 s",
            (link(pattern, LOSSY, "lossy"), hold(5), mend(pattern)),
            "all, slowly",
        ),
        ProcessRow(
            f"{short}-narrow",
            f"{between}: 20 kB/s each way for 5 s",
            (link(pattern, SLOW, "narrow"), hold(5), mend(pattern)),
            "all, slowly",
        ),
    )


USUAL = ProcessRow("as-usual", "nothing", (hold(5),), "all")

DRAFT_ROWS = (
    ProcessRow(
        "draft-killed",
        "a draft worker is killed and started again after 3 s",
        (kill("draft 1"), hold(3), start("draft 1")),
        "the other draft worker",
    ),
    ProcessRow(
        "drafts-killed",
        "all draft workers are killed and started again after 3 s",
        (kill("draft *"), hold(3), start("draft *")),
        "no draft worker",
    ),
    ProcessRow(
        "draft-stopped",
        "a draft worker hangs (SIGSTOP) for 5 s",
        (stop("draft 1"), hold(5), resume("draft 1")),
        "the other draft worker",
    ),
    ProcessRow(
        "draft-nonsense",
        "one byte in each fifth chunk from a draft worker is another, for 5 s",
        (link("draft 1", GARBLED, "garbled"), hold(5), mend("draft 1")),
        "the other draft worker",
    ),
    ProcessRow(
        "draft-terminated",
        "a draft worker is asked to end (SIGTERM) and started again after 3 s",
        (terminate("draft 1"), hold(3), start("draft 1")),
        "the other draft worker",
    ),
)

VERIFY_ROWS = (
    ProcessRow(
        "verify-killed",
        "a verify worker is killed and started again after 3 s",
        (kill("verify 1"), hold(3), start("verify 1")),
        "the other verify worker",
    ),
    ProcessRow(
        "verify-stopped",
        "a verify worker hangs (SIGSTOP) for 5 s",
        (stop("verify 1"), hold(5), resume("verify 1")),
        "the other verify worker",
    ),
    ProcessRow(
        "verify-terminated",
        "a verify worker is asked to end (SIGTERM) and started again after 3 s",
        (terminate("verify 1"), hold(3), start("verify 1")),
        "the other verify worker",
    ),
    ProcessRow(
        "verifies-killed",
        "all verify workers are killed and started again at once",
        (kill("verify *"), start("verify *")),
        "no verify worker for as long as they take to start",
    ),
    ProcessRow(
        "blocks-scarce",
        f"verify workers with {FEW_BLOCKS} KV blocks each, for all streams",
        (hold(10),),
        "all; sessions wait for blocks in turn",
        options={"kv_blocks": FEW_BLOCKS},
    ),
)

ROUTER_ROWS = (
    ProcessRow(
        "router-killed",
        "a router is killed and started again after 3 s",
        (kill("router 1"), hold(3), start("router 1")),
        "the other router",
    ),
    ProcessRow(
        "router-stopped",
        "a router hangs (SIGSTOP) for 5 s",
        (stop("router 1"), hold(5), resume("router 1")),
        "the other router",
    ),
    ProcessRow(
        "router-terminated",
        "a router is asked to end (SIGTERM) and started again after 3 s",
        (terminate("router 1"), hold(3), start("router 1")),
        "the other router",
    ),
    ProcessRow(
        "router-killed-background",
        "the router of 8 responses in the background is killed",
        (kill("router 1"),),
        "the other router",
        background=True,
    ),
    ProcessRow(
        "clock-wrong",
        "clocks of a router and of two workers are an hour fast; that router is killed",
        (hold(2), kill("router 1"), hold(2), start("router 1")),
        "the other router",
        options={
            "skew": (
                ("router 1", WRONG_SECONDS),
                ("verify 1", WRONG_SECONDS),
                ("draft 1", WRONG_SECONDS),
            )
        },
    ),
)

REDIS_ROWS = (
    ProcessRow(
        "redis-restarted",
        "Redis is asked to end (SIGTERM) and started again after 2 s",
        (terminate("redis"), hold(2), start("redis")),
        "no Redis for 2 s",
    ),
    ProcessRow(
        "redis-second-lost",
        "Redis is killed and comes back without its last second",
        (lose_last_second(),),
        "a Redis that is a second behind",
    ),
    ProcessRow(
        "redis-stopped",
        "Redis hangs (SIGSTOP) for 5 s",
        (stop("redis"), hold(5), resume("redis")),
        "no Redis for 5 s",
    ),
    ProcessRow(
        "redis-flushed", "Redis loses all its data (FLUSHALL)", (flush(),), "an empty Redis"
    ),
    ProcessRow(
        "redis-scripts-lost",
        "Redis forgets its functions and scripts",
        (forget_scripts(),),
        "all",
    ),
    ProcessRow(
        "redis-failover",
        "Redis is killed and its replica takes over",
        (fail_over(),),
        "the replica",
        options={"replica": True},
    ),
    ProcessRow(
        "redis-disk-full",
        "the disk that Redis writes its log to is full for 5 s",
        (fill_disk(), hold(5), empty_disk()),
        "a Redis that refuses to write",
        options={"small_disk": True},
    ),
    ProcessRow(
        "redis-memory-full",
        "Redis has no memory left (maxmemory, noeviction) for 5 s",
        (limit_memory(), hold(5), unlimit_memory()),
        "a Redis that refuses to write",
    ),
)

ROLLING = ProcessRow(
    "rolling-restart",
    "every process is asked to end and started again, one after the other, Redis too",
    (restart_each("draft *", "verify *", "router *", "redis"),),
    "all but one",
)

ROWS = (
    USUAL,
    *DRAFT_ROWS,
    *VERIFY_ROWS,
    *ROUTER_ROWS,
    *REDIS_ROWS,
    *_link_rows("router-draft", "draft *", "between routers and draft workers", "no draft worker"),
    *_link_rows("router-verify", "verify 1", "between routers and a verify worker", "the other"),
    *_link_rows("router-redis", "redis *", "between all processes and Redis", "no Redis for 3 s"),
    *_link_rows("client-router", "client * 1", "between clients and a router", "the other router"),
    ROLLING,
)


def named(name: str) -> ProcessRow | None:
    """The row of a name."""
    return next((row for row in ROWS if row.name == name), None)
