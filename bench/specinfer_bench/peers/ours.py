"""Specinfer as users run it, a cluster over gRPC, and the same loop in one process.

The cluster is started by its public command, `specinfer up`, and called through the SDK. A verify
worker keeps the KV of prompts it has seen, in whole blocks of 16 tokens; nobody else here does,
and the demo questions with their template are hardly longer than one block.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from specinfer import Client
from specinfer.messages import GenerateRequest, SpeculationOptions
from specinfer.sampling import SamplingParams, StopConditions
from specinfer_bench.load.cluster import started_cluster
from specinfer_bench.measure import Sample
from specinfer_bench.peers.peer import Answer, Arm, Pair, Task

if TYPE_CHECKING:
    from specinfer_router.router import Router

PLAIN, SPECULATIVE = "specinfer, plain", "specinfer"


class Cluster:
    """Router, verify worker and draft worker in processes of their own, over gRPC."""

    name = "specinfer"

    def missing(self) -> str | None:
        """Always there."""
        return None

    @contextmanager
    def load(self, pair: Pair) -> Iterator[Mapping[str, Arm]]:
        """The arms PLAIN and SPECULATIVE; raises Unavailable when the cluster does not start."""
        models = ("--model", str(pair.target), "--draft", str(pair.draft), "--dtype", pair.dtype)
        with started_cluster(models) as cluster, Client(cluster["router"]) as client:
            yield {
                PLAIN: Arm(lambda task: _run_cluster(client, task, False), plain=True, seeded=True),
                SPECULATIVE: Arm(lambda task: _run_cluster(client, task, True), seeded=True),
            }


class OneProcess:
    """The router's loop over engines in this process."""

    name = "specinfer in one process"

    def missing(self) -> str | None:
        """Always there."""
        return None

    @contextmanager
    def load(self, pair: Pair) -> Iterator[Mapping[str, Arm]]:
        """Without guesses and with them; raises InvalidCheckpoint."""
        # Here and not above: an engine takes seconds to import, also for who runs it apart.
        from specinfer_bench.local import local_router

        plain = SpeculationOptions(enabled=False)
        with local_router(pair.target, pair.draft, pair.dtype) as router, asyncio.Runner() as loop:
            yield {
                f"{self.name}, plain": Arm(
                    lambda task: run_router(loop, router, task, plain), plain=True, seeded=True
                ),
                self.name: Arm(lambda task: run_router(loop, router, task), seeded=True),
            }


def run_router(
    loop: asyncio.Runner,
    router: Router,
    task: Task,
    speculation: SpeculationOptions | None = None,
) -> Answer:
    """A prompt through a router of this process; `speculation` as a request may ask for it."""
    from specinfer_bench.local import run_request

    request = GenerateRequest(
        token_ids=task.token_ids,
        sampling=SamplingParams(temperature=task.temperature, seed=task.seed),
        stop=StopConditions(max_tokens=task.max_tokens),
        speculation=speculation or SpeculationOptions(),
    )
    return _answer(loop.run(run_request(router, request)))


def _run_cluster(client: Client, task: Task, speculation: bool) -> Answer:
    begun = time.perf_counter()
    first: float | None = None
    with client.stream(
        token_ids=task.token_ids,
        max_tokens=task.max_tokens,
        temperature=task.temperature,
        seed=task.seed,
        speculation=speculation,
    ) as stream:
        for _ in stream:
            first = first or time.perf_counter()
        completion = stream.completion
    ended = time.perf_counter()
    return _answer(
        Sample(completion.token_ids, ended - begun, (first or ended) - begun, completion.rounds)
    )


def _answer(sample: Sample) -> Answer:
    return Answer(
        len(sample.token_ids), sample.seconds, sample.token_ids, sample.first_token_seconds
    )
