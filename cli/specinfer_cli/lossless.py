"""`specinfer lossless`: show on a running cluster that speculation changes no token."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from specinfer import AsyncClient, Capabilities
from specinfer.errors import InvalidRequest
from specinfer_bench.prompts import read_prompts
from specinfer_bench.shapes import SHAPES
from specinfer_cli import arguments
from specinfer_cli.cluster import ClusterSettings, running_cluster
from specinfer_cli.console import friendly, messages, output, print_json
from specinfer_cli.lossless_cases import (
    GREEDY_SETTINGS,
    SAMPLED_SETTINGS,
    all_cases,
    num_cases,
)
from specinfer_cli.lossless_check import Checker, Divergence, Tally
from specinfer_cli.lossless_paths import ALL_PATHS, CheckedPaths, apart, check_paths
from specinfer_cli.models import choose_models, prompt_file

_Prompts = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        metavar="FILE",
        help='JSON lines with a "prompt" or "turns" each; default: the demo questions.',
    ),
]
_Samples = Annotated[
    int,
    typer.Option("--samples", min=1, metavar="K", help="Seeds for each sampled setting."),
]
_NumPrompts = Annotated[
    int | None, typer.Option("--num-prompts", min=1, help="Take the first N prompts only.")
]
_MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Most tokens for each run.")]
_Concurrency = Annotated[
    int, typer.Option("--concurrency", min=1, max=256, help="Cases under way at a time.")
]
_Raw = Annotated[
    bool,
    typer.Option(
        "--raw", metavar="", help="Send prompts as they stand, without the chat template."
    ),
]
_AllPaths = Annotated[
    bool,
    typer.Option(
        "--all-paths",
        metavar="",
        help="Check several local clusters in turn: drafting ahead, unix sockets, shapes by cost, "
        "int8 weights, fp8 keys and values, and without our own kernels.",
    ),
]


@friendly
def lossless(
    prompts: _Prompts = None,
    samples: _Samples = 2,
    num_prompts: _NumPrompts = None,
    max_tokens: _MaxTokens = 64,
    concurrency: _Concurrency = 16,
    raw: _Raw = False,
    all_paths: _AllPaths = False,
    router: arguments.AnyRouter = None,
    model: arguments.Model = None,
    draft: arguments.Draft = None,
    dtype: arguments.Dtype = "float32",
    json: arguments.Json = False,
) -> None:
    """Compare the tokens of every prompt with speculation on and off; exit 1 on any difference.

    Every prompt runs greedily and sampled (temperatures, top-p, top-k, min-p, penalties), with
    several tree shapes, many at a time. It also fails when no guess was ever confirmed, for then
    nothing was put to the test.
    """
    texts = read_prompts(prompt_file(prompts), num_prompts)
    if all_paths and router is not None:
        raise InvalidRequest(
            "--all-paths starts its own clusters, without --router", field="router"
        )

    def check(address: str) -> tuple[Capabilities, Tally]:
        return asyncio.run(_check(address, texts, samples, max_tokens, concurrency, raw))

    if all_paths:
        found = check_paths(ALL_PATHS, _cluster(model, draft, dtype), check)
        passed = _tell_paths(found, texts, samples, json=json)
    else:
        began = time.perf_counter()
        with ExitStack() as stack:
            if router is None:
                router = stack.enter_context(running_cluster(_cluster(model, draft, dtype))).router
            capabilities, tally = check(router)
        passed, seconds = tally.lossless, time.perf_counter() - began
        if json:
            print_json(_report(capabilities, tally, len(texts), samples, seconds))
        else:
            _print(capabilities, tally, len(texts), seconds)
    if not passed:
        raise typer.Exit(1)


def _cluster(model: Path | None, draft: str | None, dtype: str) -> ClusterSettings:
    choice = choose_models(model, draft)
    return ClusterSettings(name=choice.name, model=choice.target, draft=choice.draft, dtype=dtype)


async def _check(
    router: str, texts: list[str], samples: int, max_tokens: int, concurrency: int, raw: bool
) -> tuple[Capabilities, Tally]:
    console = messages()
    columns = (TextColumn("cases"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    async with AsyncClient(router) as client:
        capabilities = await client.capabilities()
        checker = Checker(client, chat=capabilities.chat and not raw, concurrency=concurrency)
        with Progress(
            *columns, console=console, disable=not console.is_terminal, transient=True
        ) as progress:
            task = progress.add_task("cases", total=num_cases(len(texts), samples))
            tally = await checker.run(
                all_cases(texts, samples, max_tokens),
                lambda tally: progress.update(task, completed=tally.num_cases),
            )
    return capabilities, tally


def _tell_paths(
    found: Sequence[CheckedPaths], texts: Sequence[str], samples: int, *, json: bool
) -> bool:
    """Say what was found on every way; whether all of it is as it should be."""
    others = apart(found)
    passed = all(each.lossless for each in found) and not others
    if json:
        ways = [_paths_report(each, len(texts), samples) for each in found]
        print_json({"lossless": passed, "other_tokens": others, "paths": ways})
        return passed
    console = output()
    for each in found:
        console.print(f"{each.paths.name}: {each.paths.switches}", style="bold", markup=False)
        _print(each.capabilities, each.tally, len(texts), each.seconds)
        console.print(f"{each.ahead_begun} trees begun ahead, {each.ahead_hits} used")
        console.print(f"kernels of the workers: {', '.join(each.kernels)}\n", markup=False)
    for name in others:
        console.print(f"{name}: other tokens than the first of its target", style="bold red")
    if passed:
        console.print("lossless on all paths; one target, the same tokens", style="green")
    return passed


def _paths_report(each: CheckedPaths, num_prompts: int, samples: int) -> dict[str, Any]:
    return {
        "name": each.paths.name,
        "target": each.paths.target,
        "switches": each.paths.switches,
        "ahead_begun": each.ahead_begun,
        "ahead_hits": each.ahead_hits,
        "kernels": list(each.kernels),
        "outputs": f"{each.tally.digest:064x}",
        **_report(each.capabilities, each.tally, num_prompts, samples, each.seconds),
    }


def _print(capabilities: Capabilities, tally: Tally, num_prompts: int, seconds: float) -> None:
    console = output()
    for divergence in tally.divergences:
        _print_divergence(console, divergence)
    for error in tally.errors:
        console.print(f"failed: {error}", style="red", markup=False, soft_wrap=True)
    per_round = tally.num_tokens / tally.num_rounds if tally.num_rounds else 0.0
    lines = (
        f"{capabilities.model}, {capabilities.dtype}: {num_prompts} prompts, "
        f"{len(GREEDY_SETTINGS) + len(SAMPLED_SETTINGS)} settings, {len(SHAPES)} tree shapes",
        f"{tally.num_cases} cases, {tally.num_comparisons} comparisons, {tally.num_tokens} tokens "
        f"in {seconds:.1f} s",
        f"{tally.num_accepted_tokens} of {tally.num_draft_tokens} guesses confirmed, "
        f"{per_round:.2f} tokens a round",
        f"{tally.num_divergences} divergences, {tally.num_errors} failed calls",
    )
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
    if tally.lossless:
        console.print("lossless: the same tokens with speculation on and off", style="green")
    elif not tally.num_accepted_tokens and not tally.num_errors:
        console.print("nothing was tested: no guess was ever confirmed", style="red")
    else:
        console.print("NOT lossless", style="bold red")


def _print_divergence(console: Console, divergence: Divergence) -> None:
    case = divergence.case
    rows = (
        f"prompt {case.index}, {case.setting}, seed {case.seed}, {divergence.shape}: "
        f"differs at token {divergence.position}"
        + ("" if divergence.reproduced else " (not when asked again with logprobs)"),
        f"  off: token {divergence.plain_token}; logprobs of the two there "
        f"{_pair(divergence.plain_logprobs)}",
        f"  on:  token {divergence.speculated_token}; logprobs of the two there "
        f"{_pair(divergence.speculated_logprobs)}",
    )
    for row in rows:
        console.print(row, style="red", markup=False, soft_wrap=True)


def _pair(values: tuple[float | None, float | None]) -> str:
    return ", ".join("unknown" if value is None else f"{value:.6f}" for value in values)


def _report(
    capabilities: Capabilities, tally: Tally, num_prompts: int, samples: int, seconds: float
) -> dict[str, Any]:
    return {
        "lossless": tally.lossless,
        "model": capabilities.model,
        "model_hash": capabilities.model_hash,
        "dtype": capabilities.dtype,
        "num_prompts": num_prompts,
        "num_samples": samples,
        "settings": [*GREEDY_SETTINGS, *SAMPLED_SETTINGS],
        "shapes": list(SHAPES),
        "num_cases": tally.num_cases,
        "num_comparisons": tally.num_comparisons,
        "num_tokens": tally.num_tokens,
        "num_rounds": tally.num_rounds,
        "num_draft_tokens": tally.num_draft_tokens,
        "num_accepted_tokens": tally.num_accepted_tokens,
        "num_divergences": tally.num_divergences,
        "divergences": [_divergence_dict(divergence) for divergence in tally.divergences],
        "num_errors": tally.num_errors,
        "errors": tally.errors,
        "seconds": seconds,
    }


def _divergence_dict(divergence: Divergence) -> dict[str, Any]:
    return {
        "prompt": divergence.case.index,
        "setting": divergence.case.setting,
        "seed": divergence.case.seed,
        "shape": divergence.shape,
        "position": divergence.position,
        "token_ids": [divergence.plain_token, divergence.speculated_token],
        "reproduced": divergence.reproduced,
        "plain_logprobs": list(divergence.plain_logprobs),
        "speculated_logprobs": list(divergence.speculated_logprobs),
    }
