"""Runs one prompt once and takes the times a user would see. Needs the SDK and nothing else."""

from __future__ import annotations

import time
from dataclasses import dataclass

from specinfer import AsyncClient, RoundFacts
from specinfer.options import GenerateOptions
from specinfer_bench.options import BenchOptions


@dataclass(frozen=True)
class Sample:
    """One run of one prompt.

    Attributes:
        token_ids: tokens generated.
        seconds: from the call to its last event.
        first_token_seconds: from the call to its first tokens.
        rounds: facts of each round.
    """

    token_ids: tuple[int, ...]
    seconds: float
    first_token_seconds: float
    rounds: tuple[RoundFacts, ...]


async def run_prompt(
    client: AsyncClient,
    prompt: str,
    *,
    chat: bool,
    speculation: bool,
    seed: int,
    options: BenchOptions,
) -> Sample:
    """Stream one prompt to its end; raises what the SDK raises."""
    arguments: GenerateOptions = {
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "seed": seed,
        "speculation": speculation,
    }
    if chat:
        arguments["messages"] = [{"role": "user", "content": prompt}]
    begun = time.perf_counter()
    first: float | None = None
    async with client.stream(None if chat else prompt, **arguments) as stream:
        async for _ in stream:
            first = first or time.perf_counter()
        completion = stream.completion
    ended = time.perf_counter()
    return Sample(completion.token_ids, ended - begun, (first or ended) - begun, completion.rounds)
