"""The cluster of docker-compose.yml and what can be done to its containers.

It speaks to the engine through the `docker` and `docker-compose` commands. This module knows
nothing of load or of what should come of a fault.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from specinfer import AsyncClient
from specinfer.errors import SpecinferError, Unavailable
from specinfer_bench.chaos.row import Action

HEAL_SECONDS = 180.0
COMMAND_SECONDS = 300.0
POLL_SECONDS = 0.5
NUM_WORKERS = 2
TIERS = ("draft", "verify")
WORKER_PORTS = {"draft": 50061, "verify": 50071}
JOIN_SECONDS = 2.0
GRPC_PORT = 50051
HTTP_PORT = 8000


async def run(*command: str) -> str:
    """What a command prints; raises SpecinferError with its errors when it fails."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(COMMAND_SECONDS):
            output, errors = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise Unavailable(f"{' '.join(command)} does not end") from None
    if process.returncode:
        raise SpecinferError(f"{' '.join(command)}: {errors.decode().strip()[-500:]}")
    return output.decode()


@dataclass
class ContainerCluster:
    """A compose cluster that can be broken.

    Attributes:
        project: name of the compose project.
        routers, gateways: published addresses; known once it was started.
        model_name: what clients call the model; known once it was started.
    """

    project: str
    routers: Sequence[str] = ()
    gateways: Sequence[str] = ()
    model_name: str = ""
    _cut_off: dict[str, list[str]] = field(default_factory=dict)
    _undo: set[tuple[str, tuple[str, ...]]] = field(default_factory=set)

    async def start(self) -> None:
        """Bring it up with two workers of each kind, if it is not; raises SpecinferError."""
        await self.scale(draft=NUM_WORKERS, verify=NUM_WORKERS)
        self.routers = [await self.published(GRPC_PORT)]
        self.gateways = [await self.published(HTTP_PORT)]
        await self.heal()
        async with AsyncClient(self.routers) as client:
            self.model_name = (await client.capabilities()).model

    async def scale(self, **numbers: int) -> None:
        """Run so many containers of each service."""
        flags = [
            part for name, number in numbers.items() for part in ("--scale", f"{name}={number}")
        ]
        up = ("up", "--detach", "--no-build", "--no-recreate", *flags)
        await run("docker-compose", "--project-name", self.project, *up, "redis", *TIERS, "router")

    async def containers(self, service: str, *, running: bool = True) -> list[str]:
        """Ids of a service's containers, the first one first."""
        filters = [f"label=com.docker.compose.project={self.project}"]
        filters.append(f"label=com.docker.compose.service={service}")
        flags = [part for one in filters for part in ("--filter", one)]
        ids = (
            await run("docker", "ps", "--quiet", *([] if running else ["--all"]), *flags)
        ).split()
        if not ids:
            return []
        found = json.loads(await run("docker", "inspect", *ids))
        label = "com.docker.compose.container-number"
        found.sort(key=lambda one: int(one["Config"]["Labels"][label]))
        return [one["Id"] for one in found]

    async def first(self, service: str) -> str:
        """Id of a service's first container; raises Unavailable when there is none."""
        found = await self.containers(service, running=False)
        if not found:
            raise Unavailable(f"no container of {service}")
        return found[0]

    async def published(self, port: int) -> str:
        """Where a port of the router can be reached from here."""
        return (await run("docker", "port", await self.first("router"), str(port))).split()[0]

    async def networks(self, container: str) -> list[str]:
        """Names of the networks that a container is in."""
        facts = json.loads(await run("docker", "inspect", container))[0]
        return sorted(facts["NetworkSettings"]["Networks"])

    async def cut_off(self, service: str) -> None:
        """Take a service's first container out of its networks."""
        container = await self.first(service)
        self._cut_off[container] = await self.networks(container)
        for network in self._cut_off[container]:
            await run("docker", "network", "disconnect", network, container)

    async def connect(self, service: str) -> None:
        """Put it back, under the name of its service."""
        container = await self.first(service)
        for network in self._cut_off.pop(container, []):
            await run("docker", "network", "connect", "--alias", service, network, container)

    async def in_network(self, service: str, command: Sequence[str], undo: Sequence[str]) -> None:
        """Run a command in the network of a service's first container; needs root.

        Args:
            service: whose container.
            command: what is run.
            undo: what takes it back, at the latest when the cluster is healed.
        """
        container = await self.first(service)
        await self._enter(container, command)
        self._undo.add((container, tuple(undo)))

    async def mend_network(self, service: str, undo: Sequence[str]) -> None:
        """Take back what was done to the network of a service's first container."""
        container = await self.first(service)
        self._undo.discard((container, tuple(undo)))
        await self._enter(container, undo)

    async def _enter(self, container: str, command: Sequence[str]) -> None:
        facts = json.loads(await run("docker", "inspect", container))[0]
        await run("nsenter", "--target", str(facts["State"]["Pid"]), "--net", *command)

    async def heal(self) -> None:
        """Unpause, connect and start everything; wait until the router sees every worker."""
        for service in ("redis", *TIERS, "router"):
            for container in await self.containers(service, running=False):
                facts = json.loads(await run("docker", "inspect", container))[0]["State"]
                if facts["Paused"]:
                    await run("docker", "unpause", container)
                if not facts["Running"]:
                    await run("docker", "start", container)
            if self._cut_off:
                await self.connect(service)
        while self._undo:
            container, undo = self._undo.pop()
            await self._enter(container, undo)
        await self.scale(draft=NUM_WORKERS, verify=NUM_WORKERS)
        await self.until(draft=NUM_WORKERS, verify=NUM_WORKERS, seconds=HEAL_SECONDS)

    async def until(self, *, draft: int, verify: int, seconds: float) -> float:
        """Wait until the router has so many workers; the seconds it took.

        Raises:
            Unavailable: it has not, in time.
        """
        begun = time.monotonic()
        found = (-1, -1)
        while found != (draft, verify):
            if time.monotonic() - begun > seconds:
                raise Unavailable(f"the router has {found} draft and verify workers")
            try:
                async with AsyncClient(self.routers, timeout=5.0) as client:
                    told = await client.capabilities()
                found = (told.num_drafters, told.num_verifiers)
            except SpecinferError:
                await asyncio.sleep(POLL_SECONDS)
            await asyncio.sleep(POLL_SECONDS / 5)
        return time.monotonic() - begun


ContainerAction = Action[ContainerCluster]


def docker(verb: str, service: str) -> ContainerAction:
    """`docker VERB` for a service's first container: pause, unpause, kill, start, restart."""

    async def do(cluster: ContainerCluster) -> None:
        await run("docker", verb, await cluster.first(service))

    return Action(f"docker {verb} {service}", do)


def disconnect(service: str) -> ContainerAction:
    """Take a container out of its networks."""
    return Action(f"disconnect {service}", lambda cluster: cluster.cut_off(service))


def connect(service: str) -> ContainerAction:
    """Put it back."""
    return Action(f"connect {service}", lambda cluster: cluster.connect(service))


def drop(service: str, *, share: float = 1.0) -> ContainerAction:
    """Drop a share of the packets that reach a worker's port."""
    command, undo = _filter(service, share)
    return Action(f"drop for {service}", lambda cluster: cluster.in_network(service, command, undo))


def drop_no_more(service: str, *, share: float = 1.0) -> ContainerAction:
    """Drop none of them."""
    _, undo = _filter(service, share)
    return Action(f"pass for {service}", lambda cluster: cluster.mend_network(service, undo))


def _filter(service: str, share: float) -> tuple[list[str], list[str]]:
    """The commands that begin and end to drop packets."""
    match = ["-p", "tcp", "--dport", str(WORKER_PORTS[service])]
    if share < 1.0:
        match += ["-m", "statistic", "--mode", "random", "--probability", str(share)]
    rule = ["INPUT", *match, "-j", "DROP"]
    return ["iptables", "-A", *rule], ["iptables", "-D", *rule]


# A container that was taken out of a network and put back has eth1 in place of eth0.
_DEVICE = "$(ip -o link show type veth | sed 's/^[0-9]*: //; s/@.*//')"
_WIDE = ("sh", "-c", f'tc qdisc del dev "{_DEVICE}" root')
# A burst holds one packet; what would wait longer than the latency is dropped.
_NARROW = (
    "sh",
    "-c",
    f'tc qdisc add dev "{_DEVICE}" root tbf rate 160kbit burst 1600 latency 400ms',
)


def narrow(service: str) -> ContainerAction:
    """Let a container send no more than 20 kB/s."""
    return Action(f"narrow {service}", lambda cluster: cluster.in_network(service, _NARROW, _WIDE))


def narrow_no_more(service: str) -> ContainerAction:
    """Let it send as much as it can."""
    return Action(f"wide {service}", lambda cluster: cluster.mend_network(service, _WIDE))


def scale(service: str, number: int) -> ContainerAction:
    """Have so many containers; the router has those that are new within seconds of their health."""

    async def do(cluster: ContainerCluster) -> None:
        numbers = dict.fromkeys(TIERS, NUM_WORKERS) | {service: number}
        await cluster.scale(**numbers)
        await _healthy(cluster, service, number)
        await cluster.until(draft=numbers["draft"], verify=numbers["verify"], seconds=JOIN_SECONDS)

    return Action(f"--scale {service}={number}", do)


def restart_each(*services: str) -> ContainerAction:
    """Restart one container after the other, each once the router has all workers again."""

    async def do(cluster: ContainerCluster) -> None:
        for service in services:
            found = await cluster.containers(service)
            for container in found:
                await run("docker", "restart", container)
                await _healthy(cluster, service, len(found))
                await cluster.until(draft=NUM_WORKERS, verify=NUM_WORKERS, seconds=HEAL_SECONDS)

    return Action(f"restart each of {', '.join(services)}", do)


async def _healthy(cluster: ContainerCluster, service: str, number: int) -> None:
    deadline = time.monotonic() + HEAL_SECONDS
    while time.monotonic() < deadline:
        found = await cluster.containers(service)
        facts = json.loads(await run("docker", "inspect", *found))
        states = [one["State"].get("Health", {}).get("Status") for one in facts]
        if states.count("healthy") == number:
            return
        await asyncio.sleep(POLL_SECONDS)
    raise Unavailable(f"{service} does not become healthy")
