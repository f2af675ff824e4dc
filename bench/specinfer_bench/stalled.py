"""What a client that stops reading costs the others: 16 streams with and without one beside them.

    specinfer up --grpc 127.0.0.1:0 --gateway 127.0.0.1:0 --json > cluster.json &
    python -m specinfer_bench.stalled --cluster cluster.json --output stalled.json

Both arms run in turn, the first one alternating. The stalled client asks for a long answer, reads
its first event and then nothing more; the others begin once its session stands still, which is
what a server sees of such a client until it cuts it off. This module starts nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass

from specinfer import AsyncClient
from specinfer.errors import SpecinferError
from specinfer.options import GenerateOptions
from specinfer_bench.cluster_report import cluster_parser, setup_facts, write_report
from specinfer_bench.spread import Spread, spread
from specinfer_bench.wire import HttpWire

MODULE = "specinfer_bench.stalled"
GOAL_LOSS = 0.05
PROMPT = "What does textwrap.dedent do?"
LONG_TOKENS = 1500
STILL_SECONDS = 0.5
WAIT_SECONDS = 60.0
KINDS = ("none", "grpc", "gateway")


@dataclass(frozen=True)
class Loss:
    """How much slower the others were beside a stalled client.

    Attributes:
        rounds: times that each arm ran.
        tokens_per_second: median over the rounds, of all streams together, without it and with it.
        ratio: the speed with it over the speed without it, round by round.
        ratio_min, ratio_max: smallest and largest of them.
    """

    rounds: int
    tokens_per_second: tuple[float, float]
    ratio: Spread
    ratio_min: float
    ratio_max: float


class Bench:
    """The streams against one cluster."""

    def __init__(self, address: str, gateway: str, model: str, *, streams: int, tokens: int):
        self._address = address
        self._gateway = gateway
        self._model = model
        self._streams = streams
        self._tokens = tokens

    async def speed(self) -> float:
        """Tokens per second of all streams together, run at once over one client."""
        async with AsyncClient(self._address) as client:
            begun = time.perf_counter()
            done = await asyncio.gather(
                *(client.generate(PROMPT, **self._options(seed)) for seed in range(self._streams))
            )
            seconds = time.perf_counter() - begun
        return sum(len(each.token_ids) for each in done) / seconds

    def _options(self, seed: int) -> GenerateOptions:
        return {
            "max_tokens": self._tokens,
            "temperature": 0.8,
            "seed": seed,
            "ignore_eos": True,
        }

    @asynccontextmanager
    async def stalled(self, kind: str) -> AsyncIterator[None]:
        """A client of a kind that has stopped reading, for the length of the block."""
        opened = {"none": self._nobody, "grpc": self._over_grpc, "gateway": self._over_http}[kind]
        async with opened():
            yield

    @asynccontextmanager
    async def _nobody(self) -> AsyncIterator[None]:
        yield

    @asynccontextmanager
    async def _over_grpc(self) -> AsyncIterator[None]:
        # Logprobs make events large, so that what lies between is full early.
        options: GenerateOptions = {
            **self._options(99),
            "max_tokens": LONG_TOKENS,
            "logprobs": 20,
            "detail": True,
        }
        async with AsyncClient(self._address) as client, client.stream(PROMPT, **options) as stream:
            await anext(stream)
            await self._standing_still(stream.request_id)
            yield

    @asynccontextmanager
    async def _over_http(self) -> AsyncIterator[None]:
        wire = HttpWire(self._gateway, receive_bytes=4096)
        body = {
            "model": self._model,
            "prompt": PROMPT,
            "max_tokens": LONG_TOKENS,
            "logprobs": 5,
            "seed": 99,
            "ignore_eos": True,
            "stream": True,
            "speculation": {"detail": True},
        }
        try:
            request_id = await wire.open("/v1/completions", body)
            await self._standing_still(request_id)
            yield
        finally:
            await wire.close()

    async def _standing_still(self, request_id: str) -> None:
        """Wait until the router has no further round of a request to tell of."""
        deadline = time.monotonic() + WAIT_SECONDS
        known, since = -1, time.monotonic()
        async with AsyncClient(self._address) as client:
            while time.monotonic() - since < STILL_SECONDS:
                report = await client.explain(request_id)
                if report.outcome != "running":
                    raise SpecinferError(f"the stalled stream ended as {report.outcome}")
                number = report.rounds[-1].offset if report.rounds else 0
                if number != known:
                    known, since = number, time.monotonic()
                if time.monotonic() > deadline:
                    raise SpecinferError("the stalled stream does not stand still")
                await asyncio.sleep(0.05)


async def measure(bench: Bench, rounds: int) -> dict[str, Loss]:
    """Run every arm `rounds` times in turn, after a warm-up.

    Raises:
        SpecinferError: when a stream fails, or the stalled one does not stand still.
    """
    await bench.speed()
    speeds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(rounds):
        start = turn % len(KINDS)
        for kind in (*KINDS[start:], *KINDS[:start]):
            async with bench.stalled(kind):
                speeds[kind].append(await bench.speed())
    alone = speeds["none"]
    return {kind: _loss(alone, speeds[kind]) for kind in KINDS if kind != "none"}


def _loss(alone: list[float], beside: list[float]) -> Loss:
    ratios = [slow / fast for fast, slow in zip(alone, beside, strict=True)]
    return Loss(
        rounds=len(ratios),
        tokens_per_second=(statistics.median(alone), statistics.median(beside)),
        ratio=spread(ratios),
        ratio_min=min(ratios),
        ratio_max=max(ratios),
    )


def _arguments() -> argparse.Namespace:
    parser = cluster_parser(MODULE, __doc__)
    parser.add_argument("--streams", type=int, default=16, help="streams that are read")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of each")
    parser.add_argument("--rounds", type=int, default=40, help="times that each arm runs")
    return parser.parse_args()


async def _report(arguments: argparse.Namespace) -> dict[str, object]:
    cluster = json.loads(arguments.cluster.read_text(encoding="utf-8"))
    bench = Bench(
        cluster["router"],
        cluster["gateway"],
        cluster["model"],
        streams=arguments.streams,
        tokens=arguments.tokens,
    )
    losses = await measure(bench, arguments.rounds)
    return {
        "goal_loss": GOAL_LOSS,
        "streams": arguments.streams,
        "stalled_reader": {kind: asdict(loss) for kind, loss in losses.items()},
        "setup": setup_facts(MODULE, cluster),
    }


def main() -> None:
    """Measure and print the report."""
    arguments = _arguments()
    write_report(asyncio.run(_report(arguments)), arguments.output)


if __name__ == "__main__":
    main()
