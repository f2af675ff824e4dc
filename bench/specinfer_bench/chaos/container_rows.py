"""The matrix for containers: what the engine can do to them and to their network.

This module knows nothing of how actions work.
"""

from __future__ import annotations

from specinfer_bench.chaos.containers import (
    ContainerCluster,
    connect,
    disconnect,
    docker,
    drop,
    drop_no_more,
    narrow,
    narrow_no_more,
    restart_each,
    scale,
)
from specinfer_bench.chaos.row import Row, hold

ContainerRow = Row[ContainerCluster]
LOSS = 0.2


def _worker_rows(tier: str) -> tuple[ContainerRow, ...]:
    """The same faults for a worker of either tier."""
    other = f"the other {tier} worker"
    return (
        ContainerRow(
            f"container-{tier}-killed",
            f"a {tier} worker's container is killed and started again after 3 s",
            (docker("kill", tier), hold(3), docker("start", tier)),
            other,
        ),
        ContainerRow(
            f"container-{tier}-paused",
            f"a {tier} worker's container is paused for 5 s",
            (docker("pause", tier), hold(5), docker("unpause", tier)),
            other,
        ),
        ContainerRow(
            f"container-{tier}-disconnected",
            f"a {tier} worker's container is out of its networks for 5 s",
            (disconnect(tier), hold(5), connect(tier)),
            other,
        ),
        ContainerRow(
            f"container-{tier}-dropped",
            f"every packet to a {tier} worker is dropped for 5 s",
            (drop(tier), hold(5), drop_no_more(tier)),
            other,
        ),
        ContainerRow(
            f"container-{tier}-lossy",
            f"one packet in five to a {tier} worker is dropped for 5 s",
            (drop(tier, share=LOSS), hold(5), drop_no_more(tier, share=LOSS)),
            "all, slowly",
        ),
        ContainerRow(
            f"container-{tier}-narrow",
            f"a {tier} worker's container sends 20 kB/s at most for 5 s",
            (narrow(tier), hold(5), narrow_no_more(tier)),
            "all, slowly",
        ),
        ContainerRow(
            f"container-{tier}-scaled",
            f"a third {tier} worker is added; the router has it within 2 s after it is healthy",
            (scale(tier, 3),),
            "all",
        ),
        ContainerRow(
            f"container-{tier}-scaled-back",
            f"a third {tier} worker is added and taken away again",
            (scale(tier, 3), hold(2), scale(tier, 2)),
            "two of them",
        ),
    )


CONTAINER_ROWS = (
    ContainerRow("container-as-usual", "nothing", (hold(5),), "all"),
    *_worker_rows("draft"),
    *_worker_rows("verify"),
    ContainerRow(
        "container-redis-paused",
        "the container of Redis is paused for 5 s",
        (docker("pause", "redis"), hold(5), docker("unpause", "redis")),
        "no Redis for 5 s",
    ),
    ContainerRow(
        "container-redis-restarted",
        "the container of Redis is restarted",
        (docker("restart", "redis"),),
        "no Redis for a moment",
    ),
    ContainerRow(
        "container-redis-disconnected",
        "the container of Redis is out of its networks for 5 s",
        (disconnect("redis"), hold(5), connect("redis")),
        "no Redis for 5 s",
    ),
    ContainerRow(
        "container-redis-killed",
        "the container of Redis is killed and started again after 2 s",
        (docker("kill", "redis"), hold(2), docker("start", "redis")),
        "no Redis for 2 s, then one without its last second",
    ),
    ContainerRow(
        "container-router-killed",
        "the container of the only router is killed and started again at once",
        (docker("kill", "router"), docker("start", "router"), hold(5)),
        "no router for as long as it takes to start",
    ),
    ContainerRow(
        "container-router-restarted",
        "the container of the only router is asked to end and started again",
        (docker("restart", "router"), hold(5)),
        "no router for as long as it takes to end and to start",
    ),
    ContainerRow(
        "container-rolling-restart",
        "every container is restarted, one after the other, the router and Redis too",
        (restart_each("draft", "verify", "router", "redis"),),
        "all but one; no router while it restarts",
    ),
)
