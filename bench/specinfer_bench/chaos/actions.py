"""What can be done to a cluster of processes, as values that rows are made of.

This module knows nothing of load or of what should come of it.
"""

from __future__ import annotations

import asyncio
import signal

from specinfer.errors import SpecinferError
from specinfer_bench.chaos import redis as servers
from specinfer_bench.chaos.cluster import ChaosCluster
from specinfer_bench.chaos.proxy import LinkFault
from specinfer_bench.chaos.row import Action

LOST_SECONDS = 1.0


ProcessAction = Action[ChaosCluster]


def kill(name: str) -> ProcessAction:
    """SIGKILL to all processes of a name with wildcards."""

    async def run(cluster: ChaosCluster) -> None:
        await asyncio.gather(*(process.kill() for process in cluster.matching(name)))

    return Action(f"SIGKILL {name}", run)


def terminate(name: str) -> ProcessAction:
    """SIGTERM, and wait until they have ended.

    Raises:
        SpecinferError: one ends with another status than 0.
    """

    async def run(cluster: ChaosCluster) -> None:
        found = cluster.matching(name)
        statuses = await asyncio.gather(*(process.terminate() for process in found))
        if any(statuses):
            raise SpecinferError(f"after SIGTERM {name} ended with {statuses}")

    return Action(f"SIGTERM {name}", run)


def start(name: str) -> ProcessAction:
    """Start them again, without waiting until they serve."""

    async def run(cluster: ChaosCluster) -> None:
        for process in cluster.matching(name):
            process.launch()

    return Action(f"start {name}", run)


def rejoin(name: str) -> ProcessAction:
    """Start them again and wait until every router sees every worker."""

    async def run(cluster: ChaosCluster) -> None:
        await start(name).run(cluster)
        await cluster.heal()

    return Action(f"start {name}", run)


def stop(name: str) -> ProcessAction:
    """SIGSTOP."""
    return _signal(name, signal.SIGSTOP)


def resume(name: str) -> ProcessAction:
    """SIGCONT."""
    return _signal(name, signal.SIGCONT)


def _signal(name: str, number: signal.Signals) -> ProcessAction:
    async def run(cluster: ChaosCluster) -> None:
        for process in cluster.matching(name):
            process.send(number)

    return Action(f"{number.name} {name}", run)


def link(name: str, fault: LinkFault, text: str) -> ProcessAction:
    """Do something to all links of a name with wildcards."""
    return Action(f"{name}: {text}", lambda cluster: cluster.apply(name, fault))


def mend(name: str) -> ProcessAction:
    """Let links be whole again."""
    return link(name, LinkFault(), "mended")


def cut(name: str) -> ProcessAction:
    """Reset the connections of links, and every new one."""
    return link(name, LinkFault(refuse=True), "cut")


def blackhole(name: str) -> ProcessAction:
    """Pass nothing on, without telling anybody."""
    return link(name, LinkFault(blackhole=True), "silent")


def lose_last_second() -> ProcessAction:
    """SIGKILL to Redis, whose disk then lacks what came in the last second; and start it."""

    async def run(cluster: ChaosCluster) -> None:
        kept = cluster.folder / "redis-kept"
        servers.copy_log(cluster.redis_folder, kept)
        await asyncio.sleep(LOST_SECONDS)
        await cluster.processes["redis"].kill()
        servers.put_log_back(cluster.redis_folder, kept)
        await cluster.processes["redis"].start()

    return Action("SIGKILL redis; the last second of its log is gone; start redis", run)


def flush() -> ProcessAction:
    """Delete all that Redis holds."""

    async def run(cluster: ChaosCluster) -> None:
        async with servers.client(cluster.redis_port) as redis:
            await redis.flushall()

    return Action("FLUSHALL", run)


def forget_scripts() -> ProcessAction:
    """Delete the functions and scripts that were loaded into Redis."""

    async def run(cluster: ChaosCluster) -> None:
        async with servers.client(cluster.redis_port) as redis:
            await redis.script_flush()
            await redis.function_flush()

    return Action("SCRIPT FLUSH, FUNCTION FLUSH", run)


def limit_memory() -> ProcessAction:
    """Allow Redis no more memory than it has now."""

    async def run(cluster: ChaosCluster) -> None:
        async with servers.client(cluster.redis_port) as redis:
            await redis.config_set("maxmemory", "1mb")

    return Action("CONFIG SET maxmemory 1mb", run)


def unlimit_memory() -> ProcessAction:
    """Allow it all memory again."""

    async def run(cluster: ChaosCluster) -> None:
        async with servers.client(cluster.redis_port) as redis:
            await redis.config_set("maxmemory", "0")

    return Action("CONFIG SET maxmemory 0", run)


def fill_disk() -> ProcessAction:
    """Leave no room on Redis's disk."""

    async def run(cluster: ChaosCluster) -> None:
        await asyncio.to_thread(servers.fill, cluster.redis_folder)

    return Action("fill the disk of redis", run)


def empty_disk() -> ProcessAction:
    """Make room again."""

    async def run(cluster: ChaosCluster) -> None:
        servers.empty(cluster.redis_folder)

    return Action("empty the disk of redis", run)


def fail_over() -> ProcessAction:
    """Kill the first Redis, make its replica a primary, and lead every link there."""

    async def run(cluster: ChaosCluster) -> None:
        await cluster.processes["redis"].kill()
        address = cluster.addresses["replica"]
        async with servers.client(int(address.rpartition(":")[2])) as replica:
            await replica.replicaof("NO", "ONE")
        names = [name for name in cluster.links if name.startswith("redis ")]
        await asyncio.gather(*(cluster.links[name].retarget(address) for name in names))

    return Action("SIGKILL redis; its replica becomes the primary", run)


def restart_each(*names: str) -> ProcessAction:
    """SIGTERM and start, one process after the other; each has rejoined before the next goes."""

    async def run(cluster: ChaosCluster) -> None:
        for name in names:
            for process in cluster.matching(name):
                await terminate(process.name).run(cluster)
                await rejoin(process.name).run(cluster)

    return Action(f"SIGTERM and start, one after the other: {', '.join(names)}", run)
