"""What a router costs: its CPU seconds for each round of a session, and what the wire adds to one.

    python -m specinfer_bench.router_cost --output router-cost.json
    python -m specinfer_bench.router_cost --load "64 sessions, answers at once" --profile r.prof

The router is the real process; its workers are `simulated_workers`, in a process of their own, and
its readers do as little as they can, in this one. The loop that it is compared with does
the same waits in one process, on the same kind of event loop and in turn. This module knows nothing
of models.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pstats
import shlex
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from specinfer.errors import SpecinferError
from specinfer.server import fastest_loop
from specinfer_bench.cluster_report import write_report
from specinfer_bench.machine import machine_facts
from specinfer_bench.readers import Readers
from specinfer_bench.simulated_workers import Passes, Simulation
from specinfer_bench.spread import spread
from specinfer_router.settings import RouterSettings

MODULE = "specinfer_bench.router_cost"
GOAL_MS = 0.2
GOAL_LOSS = 0.05
START_SECONDS = 60.0
SHOWN_LINES = 25


@dataclass(frozen=True)
class Load:
    """What runs.

    Attributes:
        sessions: sessions at once.
        tokens: tokens of a session; a next one follows.
        one_client: whether they are one client's, whose events come in frames; else each is read on
            a connection of its own.
        windows: how many are measured.
        window_seconds: length of each.
        warm_seconds: what passes before the first.
        policy: of the router, which chooses the trees.
        simulation: how the workers behave.
    """

    sessions: int = 64
    tokens: int = 256
    one_client: bool = False
    windows: int = 5
    window_seconds: float = 3.0
    warm_seconds: float = 2.0
    policy: str = RouterSettings.policy
    simulation: Simulation = field(default_factory=Simulation)


_STEPS = Simulation(draft_seconds=0.005, verify_seconds=0.05)
LOADS = {
    "64 sessions, answers at once": Load(),
    # Opening and closing a session takes about as much as a dozen rounds.
    "64 long sessions, answers at once": Load(tokens=4096),
    "64 sessions of one client, answers at once": Load(one_client=True),
    "64 long sessions of one client, answers at once": Load(tokens=4096, one_client=True),
    "64 sessions, answers at once, one shape": Load(policy="static"),
    "64 sessions, steps of 50 ms": Load(simulation=_STEPS),
    "4 sessions, steps of 50 ms": Load(4, simulation=_STEPS),
    "1 session, steps of 50 ms": Load(1, simulation=_STEPS),
    "1 session on a shared call, steps of 50 ms": Load(1, one_client=True, simulation=_STEPS),
}


@dataclass(frozen=True)
class Window:
    """What one window saw.

    Attributes:
        rounds: events with tokens that readers got.
        router_seconds: CPU time of the router's process, all threads.
        seconds: wall time, from one round's end to another's.
        alone: rounds a second of the loop without a router just after, or 0 where there is none.
    """

    rounds: int
    router_seconds: float
    seconds: float
    alone: float = 0.0

    @property
    def milliseconds(self) -> float:
        """CPU milliseconds of a round."""
        return 1e3 * self.router_seconds / self.rounds

    @property
    def rate(self) -> float:
        """Rounds a second."""
        return self.rounds / self.seconds


@asynccontextmanager
async def started(command: Sequence[str], stream: str) -> AsyncIterator[tuple[int, dict[str, str]]]:
    """A process of ours: its id, and the first object with a port or an address that it writes.

    Args:
        command: arguments of Python.
        stream: "stdout" or "stderr", where it writes lines of JSON.
    """
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *command,
        stdout=pipe if stream == "stdout" else None,
        stderr=pipe if stream == "stderr" else None,
    )
    lines = process.stdout if stream == "stdout" else process.stderr
    assert lines is not None
    try:
        async with asyncio.timeout(START_SECONDS):
            ready = await _ready(lines)
        rest = asyncio.create_task(lines.read())
        yield process.pid, ready
        process.terminate()
        await asyncio.gather(rest, process.wait())
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _ready(lines: asyncio.StreamReader) -> dict[str, str]:
    async for line in lines:
        found = json.loads(line)
        if "verify" in found or found.get("event") == "serving":
            return {str(name): str(value) for name, value in found.items()}
    raise SpecinferError("a process of the benchmark ended before it served; see what it printed")


@asynccontextmanager
async def cluster(
    load: Load, sockets: Path | None, profile: Path | None
) -> AsyncIterator[tuple[int, str]]:
    """A router with simulated workers: its process id and its address.

    Args:
        load: how the workers behave, and how the router chooses.
        sockets: a folder for unix sockets, or None for TCP.
        profile: where the router leaves its profile, or None.
    """
    simulation, names = load.simulation, ("draft", "verify", "router")
    at = {name: f"unix:{sockets / name}" if sockets else "127.0.0.1:0" for name in names}
    waits = ["--draft-seconds", str(simulation.draft_seconds)]
    waits += ["--verify-seconds", str(simulation.verify_seconds)]
    workers = ["-m", "specinfer_bench.simulated_workers", *waits]
    workers += ["--draft", at["draft"], "--verify", at["verify"]]
    workers += ["--accepted", str(simulation.accepted)]
    profiled = ["-m", "cProfile", "-o", str(profile)] if profile else []
    async with AsyncExitStack() as stack:
        _, found = await stack.enter_async_context(started(workers, "stdout"))
        router = [*profiled, "-m", "specinfer_router", "--grpc", at["router"]]
        router += ["--gateway", "127.0.0.1:0", "--policy", load.policy]
        router += ["--draft", found["draft"], "--verify", found["verify"]]
        pid, ready = await stack.enter_async_context(started(router, "stderr"))
        yield pid, at["router"] if sockets else f"127.0.0.1:{ready['grpc_port']}"


async def measure(
    load: Load, *, sockets: Path | None = None, profile: Path | None = None
) -> list[Window]:
    """Windows of a router under load, and of the loop alone in turn where passes take time."""
    async with cluster(load, sockets, profile) as (pid, address):
        readers = Readers(address, load.sessions, load.tokens, one_client=load.one_client)
        if not load.simulation.verify_seconds:
            async with readers.running():
                await asyncio.sleep(load.warm_seconds)
                return [await _window(load, readers, pid) for _ in range(load.windows)]
        windows = []
        for _ in range(load.windows):
            async with readers.running():
                await asyncio.sleep(load.warm_seconds)
                seen = await _window(load, readers, pid)
            windows.append(replace(seen, alone=await loop_rate(load)))
        return windows


async def _window(load: Load, readers: Readers, pid: int) -> Window:
    rounds, cpu, begun = readers.num_rounds, cpu_seconds(pid), readers.heard
    await asyncio.sleep(load.window_seconds)
    spent = cpu_seconds(pid) - cpu, readers.heard - begun
    return Window(readers.num_rounds - rounds, *spent)


def cpu_seconds(pid: int) -> float:
    """CPU time that a process and its threads have had, by the kernel."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def loop_rate(load: Load) -> float:
    """Rounds per second of the same waits in one process, without a router or a wire.

    Sessions begin one after the other within a round, as those of a cluster do: begun together
    they would share every pass for ever.
    """
    simulation, rounds, heard, stopped = load.simulation, 0, 0.0, asyncio.Event()
    drafters, verifiers = Passes(simulation.draft_seconds), Passes(simulation.verify_seconds)
    round_seconds = simulation.draft_seconds + simulation.verify_seconds

    async def session(at: int) -> None:
        nonlocal rounds, heard
        await asyncio.sleep(at * round_seconds / load.sessions)
        while not stopped.is_set():
            await _answered(drafters)
            await _answered(verifiers)
            rounds += 1
            heard = time.perf_counter()

    tasks = [asyncio.create_task(session(at)) for at in range(load.sessions)]
    await asyncio.sleep(load.warm_seconds)
    begun, before = heard, rounds
    await asyncio.sleep(load.window_seconds)
    rate = (rounds - before) / (heard - begun)
    stopped.set()
    await asyncio.gather(*tasks)
    return rate


async def _answered(passes: Passes) -> None:
    """One pass, in this process."""
    loop = asyncio.get_running_loop()
    answer = loop.create_future()

    class Here:
        def put(self, result: None) -> None:
            loop.call_soon_threadsafe(answer.set_result, result)

    passes.add(Here(), None)
    await answer


def split(profile: Path) -> dict[str, float]:
    """Share of each module in a profile's own time, largest first."""
    seconds: dict[str, float] = defaultdict(float)
    stats: dict[tuple[str, int, str], tuple[int, int, float, float, object]]
    stats = pstats.Stats(str(profile)).stats  # type: ignore[attr-defined]
    for (path, _, function), (_, _, own, _, _) in stats.items():
        # A built-in function has no file; its own name says more.
        name = "/".join(Path(path).parts[-2:]) if path.endswith(".py") else function
        seconds[name] += own
    whole = sum(seconds.values())
    largest = sorted(seconds.items(), key=lambda item: -item[1])[:SHOWN_LINES]
    return {name: round(own / whole, 4) for name, own in largest}


async def report(
    name: str, load: Load, sockets: Path | None, profile: Path | None
) -> dict[str, object]:
    """One load: the router's time for a round, and how much slower rounds are than the loop's."""
    windows = await measure(load, sockets=sockets, profile=profile)
    found: dict[str, object] = {
        "load": asdict(load),
        "router_ms_of_a_round": asdict(spread([one.milliseconds for one in windows])),
        "rounds_per_second": round(statistics.median(one.rate for one in windows), 1),
    }
    if load.simulation.verify_seconds:
        alone = statistics.median(one.alone for one in windows)
        found["loop_rounds_per_second"] = round(alone, 1)
        found["loss"] = asdict(spread([1 - one.rate / one.alone for one in windows]))
    if profile:
        found["split"] = split(profile)
    print(f"{name}: {found['router_ms_of_a_round']}", file=sys.stderr)
    return found


def router_cost_parser() -> argparse.ArgumentParser:
    """Arguments of this benchmark."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--load", choices=LOADS, action="append", help="one of them; default: all")
    parser.add_argument("--windows", type=int, default=5, help="windows of three seconds")
    parser.add_argument("--sockets", type=Path, help="folder for unix sockets instead of TCP")
    parser.add_argument("--profile", type=Path, help="profile the router into this file")
    parser.add_argument("--output", type=Path, help="also write the report to this file")
    return parser


def main() -> None:
    """Measure and print the report."""
    arguments = router_cost_parser().parse_args()
    before = os.getloadavg()[0]
    found = {}
    for name in arguments.load or LOADS:
        load = replace(LOADS[name], windows=arguments.windows)
        with asyncio.Runner(loop_factory=fastest_loop()) as runner:
            reported = report(name, load, arguments.sockets, arguments.profile)
            found[name] = runner.run(reported)
    setup = {
        "command": f"python -m {MODULE} " + shlex.join(sys.argv[1:]),
        "machine": machine_facts(),
        "load_average": before,
    }
    goals = {"goal_ms": GOAL_MS, "goal_loss": GOAL_LOSS}
    write_report({**goals, "loads": found, "setup": setup}, arguments.output)


if __name__ == "__main__":
    main()
