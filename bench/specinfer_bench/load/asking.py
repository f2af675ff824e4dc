"""Asks a router through the SDK and notes when each event came. Knows nothing of schedules."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from statistics import median

from specinfer import AsyncClient, RetryPolicy
from specinfer.messages import SpeculationOptions
from specinfer.options import GenerateOptions
from specinfer_bench.load.arrivals import Arrival
from specinfer_bench.load.observation import Observation
from specinfer_bench.load.open_loop import Ask, Clock

# A try that the SDK repeats would be one request here and two at the router.
NO_RETRY = RetryPolicy(max_attempts=1)
OFF, STATIC, BY_COST = "off", "static", "by_cost"
STATIC_WIDTHS = (1,) * 8
EMPTY_CALLS = 16
REST_SECONDS = 0.1
SPECULATION: Mapping[str, SpeculationOptions] = {
    OFF: SpeculationOptions(enabled=False),
    # A request's own widths are taken as they are, whatever the load.
    STATIC: SpeculationOptions(widths=STATIC_WIDTHS),
    BY_COST: SpeculationOptions(),
}


def asking(
    client: AsyncClient, *, chat: bool, temperature: float, speculation: SpeculationOptions
) -> Ask:
    """A way to ask; the length of an answer is what the request says, to the token."""

    async def ask(arrival: Arrival, seen: Observation, clock: Clock) -> None:
        options: GenerateOptions = {
            "max_tokens": arrival.max_tokens,
            "temperature": temperature,
            "seed": arrival.seed,
            "ignore_eos": True,
            "speculation": speculation,
        }
        if chat:
            options["messages"] = [{"role": "user", "content": arrival.prompt}]
        async with client.stream(None if chat else arrival.prompt, **options) as stream:
            async for event in stream:
                seen.events.append((clock(), len(event.token_ids)))
                seen.token_ids.extend(event.token_ids)
            done = stream.completion
            seen.num_prompt_tokens = done.usage.num_prompt_tokens
            seen.told_first_token_seconds = done.timings.first_token_seconds
            seen.told_seconds = done.timings.total_seconds

    return ask


async def characters_a_token(client: AsyncClient, text: str) -> float:
    """How many characters of a text the cluster's tokenizer takes for a token, on average.

    Raises what the SDK raises.
    """
    done = await client.generate(text, max_tokens=1, temperature=0.0)
    return len(text) / max(1, done.usage.num_prompt_tokens)


async def empty_call_seconds(client: AsyncClient) -> float:
    """What a call that generates nothing takes: the way to the router and back.

    The median of some, with a rest before each, as there is between requests: who rested is slower.
    Raises what the SDK raises.
    """
    took: list[float] = []
    for _ in range(EMPTY_CALLS):
        await asyncio.sleep(REST_SECONDS)
        begun = time.perf_counter()
        await client.capabilities()
        took.append(time.perf_counter() - begun)
    return median(took)
