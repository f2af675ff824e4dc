"""What the HTTP gateway adds to a stream over gRPC, on one router, side by side.

    specinfer up --grpc 127.0.0.1:0 --gateway 127.0.0.1:0 --json > cluster.json &
    python -m specinfer_bench.gateway --cluster cluster.json --output gateway.json

The same request goes through both doors in turn, the first one alternating, so that a machine
whose speed drifts is fair to both. Beside what a client sees, the router's own CPU time a token
event is taken, which no overlap with the workers' time can hide. This module starts nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from specinfer import (
    AsyncClient,
    ChatMessage,
    SamplingParams,
    SpeculationOptions,
    StopConditions,
)
from specinfer.messages import GenerateRequest
from specinfer_bench.cluster_report import cluster_parser, setup_facts, write_report
from specinfer_bench.spread import Spread, spread
from specinfer_bench.wire import Arrivals, GrpcWire, HttpWire

MODULE = "specinfer_bench.gateway"
GOAL_FIRST_MS = 1.0
GOAL_EVENT_MS = 0.2
# Every token of the demo pair's answer has text of its own: both doors have as many events.
PROMPT = "What does textwrap.dedent do?"


@dataclass(frozen=True)
class Comparison:
    """One way of decoding, through both doors; all times in milliseconds.

    Attributes:
        pairs: requests through each door.
        events, events_gateway: token events of one stream; what has no text has no HTTP event.
        first_grpc, first_gateway: time to the first tokens.
        first_added: the difference, pair by pair.
        event_grpc, event_gateway: time from one token event to the next.
        event_added: the difference, pair by pair.
        cpu_event_grpc, cpu_event_gateway: the router's CPU time, the whole request's, for each
            token event; None without the router's process id.
    """

    pairs: int
    events: int
    events_gateway: int
    first_grpc: Spread
    first_gateway: Spread
    first_added: Spread
    event_grpc: Spread
    event_gateway: Spread
    event_added: Spread
    cpu_event_grpc: float | None
    cpu_event_gateway: float | None


@dataclass
class _Door:
    run: Callable[[], Any]
    arrivals: list[Arrivals]
    cpu_seconds: float = 0.0


async def compare(
    address: str, gateway: str, router_pid: int | None, *, pairs: int, tokens: int, plain: bool
) -> Comparison:
    """Run one request `pairs` times through each door, after a warm-up of each.

    Raises:
        SpecinferError: when a stream fails.
    """
    async with AsyncClient(address) as client:
        served = (await client.capabilities()).model
    grpc, http = GrpcWire(address), HttpWire(gateway)
    request = _grpc_request(tokens, plain=plain)
    body = _http_body(served, tokens, plain=plain)
    doors = [
        _Door(lambda: grpc.run(request), []),
        _Door(lambda: http.run("/v1/chat/completions", body), []),
    ]
    try:
        for door in doors:
            await door.run()
        for pair in range(pairs):
            for door in doors if pair % 2 else reversed(doors):
                before = cpu_seconds(router_pid)
                door.arrivals.append(await door.run())
                door.cpu_seconds += cpu_seconds(router_pid) - before
    finally:
        await grpc.close()
        await http.close()
    return _comparison(*doors, measured_cpu=router_pid is not None)


def _grpc_request(tokens: int, *, plain: bool) -> GenerateRequest:
    return GenerateRequest(
        messages=(ChatMessage("user", PROMPT),),
        sampling=SamplingParams(temperature=0.0),
        stop=StopConditions(max_tokens=tokens),
        speculation=SpeculationOptions(enabled=not plain),
    )


def _http_body(model: str, tokens: int, *, plain: bool) -> dict[str, Any]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "speculation": {"enabled": not plain},
    }


def cpu_seconds(pid: int | None) -> float:
    """CPU time that a process has used so far; 0 without one, or where it cannot be read."""
    if pid is None:
        return 0.0
    try:
        return sum(_on_cpu(task / "schedstat") for task in Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return 0.0


def _on_cpu(path: Path) -> float:
    return int(path.read_text(encoding="ascii").split()[0]) / 1e9


def _comparison(grpc: _Door, http: _Door, *, measured_cpu: bool) -> Comparison:
    pairs = list(zip(grpc.arrivals, http.arrivals, strict=True))
    num_events = sum(len(each.seconds) for each in grpc.arrivals)
    return Comparison(
        pairs=len(pairs),
        events=len(grpc.arrivals[0].seconds),
        events_gateway=len(http.arrivals[0].seconds),
        first_grpc=spread([g.first_seconds for g, _ in pairs], 1e3),
        first_gateway=spread([h.first_seconds for _, h in pairs], 1e3),
        first_added=spread([h.first_seconds - g.first_seconds for g, h in pairs], 1e3),
        event_grpc=spread([g.event_seconds for g, _ in pairs], 1e3),
        event_gateway=spread([h.event_seconds for _, h in pairs], 1e3),
        event_added=spread([h.event_seconds - g.event_seconds for g, h in pairs], 1e3),
        cpu_event_grpc=1e3 * grpc.cpu_seconds / num_events if measured_cpu else None,
        cpu_event_gateway=1e3 * http.cpu_seconds / num_events if measured_cpu else None,
    )


def _arguments() -> argparse.Namespace:
    parser = cluster_parser(MODULE, __doc__)
    parser.add_argument("--pairs", type=int, default=100, help="requests through each door")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each")
    return parser.parse_args()


async def _report(arguments: argparse.Namespace) -> dict[str, object]:
    cluster = json.loads(arguments.cluster.read_text(encoding="utf-8"))
    found = {
        name: await compare(
            cluster["router"],
            cluster["gateway"],
            cluster["pids"].get("router"),
            pairs=arguments.pairs,
            tokens=arguments.tokens,
            plain=name == "plain",
        )
        for name in ("plain", "speculative")
    }
    return {
        "goals_ms": {"first_added": GOAL_FIRST_MS, "event_added": GOAL_EVENT_MS},
        **{name: asdict(comparison) for name, comparison in found.items()},
        "setup": setup_facts(MODULE, cluster),
    }


def main() -> None:
    """Compare and print the report."""
    arguments = _arguments()
    write_report(asyncio.run(_report(arguments)), arguments.output)


if __name__ == "__main__":
    main()
