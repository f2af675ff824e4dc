"""Runs every prompt in every arm, interleaved, so that a machine whose speed drifts is fair to all.

An arm is one way of running a prompt. The order of the arms turns with each prompt, since the one
that runs second finds warmer caches. This module knows nothing of how clusters are started.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence

from specinfer import AsyncClient
from specinfer_bench.measure import Sample, run_prompt
from specinfer_bench.options import BenchOptions
from specinfer_bench.report import OFF, ON, Arm, BenchReport, build_report

RunArm = Callable[[str, int], Awaitable[Sample]]
"""Runs a prompt with a seed."""


async def run_bench(
    options: BenchOptions,
    address: str,
    prompts: Sequence[str],
    *,
    setup: Mapping[str, object],
    more_arms: Mapping[Arm, RunArm] | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> BenchReport:
    """Time the prompts against a router and report.

    Args:
        options: what to run.
        address: the router.
        prompts: questions, sent through the chat template when the model has one.
        setup: facts of the run that the report should carry beside those that the router says of
            itself: `model`, `model_hash` and `dtype`.
        more_arms: further ways of running a prompt beside speculation off and on.
        progress: called with the number of runs done.

    Raises:
        SpecinferError: what the SDK raises; a failed run ends the benchmark.
    """
    async with AsyncClient(address) as client:
        capabilities = await client.capabilities()
        arms = _cluster_arms(client, options, chat=capabilities.chat) | dict(more_arms or {})
        for run in arms.values():  # warm-up: prefix caches, lazy set-up, pages of weights
            await run(prompts[0], options.seed)
        done = 0
        passes: list[dict[Arm, list[Sample]]] = []
        for _ in range(options.repeats):
            samples: dict[Arm, list[Sample]] = {arm: [] for arm in arms}
            for index, prompt in enumerate(prompts):
                for arm in _turned(list(arms), index):
                    samples[arm].append(await arms[arm](prompt, options.seed + index))
                    done += 1
                    progress(done)
            passes.append(samples)
    served = {
        "model": capabilities.model,
        "model_hash": capabilities.model_hash,
        "dtype": capabilities.dtype,
    }
    # What the router says of itself comes last: no option passes for what was measured.
    return build_report(passes, {**setup, **served})


def _cluster_arms(client: AsyncClient, options: BenchOptions, *, chat: bool) -> dict[Arm, RunArm]:
    async def without(prompt: str, seed: int) -> Sample:
        return await run_prompt(
            client, prompt, chat=chat, speculation=False, seed=seed, options=options
        )

    async def with_guesses(prompt: str, seed: int) -> Sample:
        return await run_prompt(
            client, prompt, chat=chat, speculation=True, seed=seed, options=options
        )

    return {OFF: without, ON: with_guesses}


def _turned(arms: list[Arm], steps: int) -> list[Arm]:
    """The arms in another order for each prompt."""
    first = steps % len(arms)
    return arms[first:] + arms[:first]
