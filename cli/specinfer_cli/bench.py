"""`specinfer bench`: speculation on against off; the work is done by `specinfer_bench`."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from specinfer.errors import InvalidRequest
from specinfer_bench.machine import machine_facts
from specinfer_bench.options import GROWN_PRESETS, BenchOptions
from specinfer_bench.prompts import read_prompts
from specinfer_bench.report import IN_PROCESS, BenchReport
from specinfer_bench.run import RunArm, run_bench
from specinfer_cli import arguments
from specinfer_cli.cluster import ClusterSettings, running_cluster
from specinfer_cli.console import (
    friendly,
    import_extra,
    indented_json,
    messages,
    output,
    print_json,
)
from specinfer_cli.models import choose_models, prompt_file

_Grow = Annotated[
    str | None,
    typer.Option(
        "--grow",
        metavar="|".join(GROWN_PRESETS),
        help="Grow the local cluster's target to this size first; its outputs stay the same.",
    ),
]
_DraftFolder = Annotated[
    Path | None,
    typer.Option(
        "--draft",
        metavar="FOLDER",
        help="Drafter's folder; default: the demo pair's, to be given beside another --model.",
    ),
]
_Prompts = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        metavar="FILE",
        help='JSON lines with a "prompt" or "turns" each; default: the demo questions.',
    ),
]
_NumPrompts = Annotated[int, typer.Option("--num-prompts", min=1, help="How many prompts to run.")]
_MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Most tokens for a prompt.")]
_Repeats = Annotated[
    int,
    typer.Option("--repeats", min=1, help="Runs of every prompt in every arm, interleaved."),
]
_Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of the first prompt.")]
_InProcess = Annotated[
    bool,
    typer.Option(
        "--in-process", metavar="", help="Also run the same loop in one process, without gRPC."
    ),
]
_Output = Annotated[
    Path | None,
    typer.Option("--output", metavar="FILE", help="Also write the report to this file, as JSON."),
]


@friendly
def bench(
    router: arguments.AnyRouter = None,
    grow: _Grow = None,
    dtype: arguments.Dtype = BenchOptions.dtype,
    model: arguments.Model = None,
    draft: _DraftFolder = None,
    prompts: _Prompts = None,
    num_prompts: _NumPrompts = BenchOptions.num_prompts,
    max_tokens: _MaxTokens = BenchOptions.max_tokens,
    temperature: arguments.Temperature = BenchOptions.temperature,
    repeats: _Repeats = BenchOptions.repeats,
    seed: _Seed = BenchOptions.seed,
    in_process: _InProcess = False,
    output_file: _Output = None,
    json: arguments.Json = False,
) -> None:
    """Time prompts with speculation on and off, interleaved, and compare their outputs.

    Exits 1 when an output differs.
    """
    options = BenchOptions(
        router=router,
        grow=grow,
        dtype=dtype,
        model=model,
        draft=draft,
        prompts=prompts,
        num_prompts=num_prompts,
        max_tokens=max_tokens,
        temperature=temperature,
        repeats=repeats,
        seed=seed,
        in_process=in_process,
    )
    if output_file is not None:
        _make_folder_of(output_file)
    report = _run(options)
    if output_file is not None:
        output_file.write_text(indented_json(report.as_dict()), encoding="utf-8")
    if json:
        print_json(report.as_dict())
    else:
        _print(output(), report, grow)
    if not report.identical:
        raise typer.Exit(1)


def _run(options: BenchOptions) -> BenchReport:
    """Prepare the models, start what is needed, and time the prompts."""
    texts = read_prompts(prompt_file(options.prompts), options.num_prompts)
    with ExitStack() as stack:
        address = options.router
        arms: dict[str, RunArm] = {}
        if address is None:
            name, target, drafter = _models(options)
            settings = ClusterSettings(name=name, model=target, draft=drafter, dtype=options.dtype)
            address = stack.enter_context(running_cluster(settings)).router
            if options.in_process:
                local = import_extra("specinfer_bench.local")
                router = stack.enter_context(local.local_router(target, drafter, options.dtype))
                arms[IN_PROCESS] = partial(local.run_local, router, options=options)
        console = messages()
        with console.status("timing prompts") if console.is_terminal else nullcontext():
            return asyncio.run(
                run_bench(options, address, texts, setup=_setup(options), more_arms=arms)
            )


def _models(options: BenchOptions) -> tuple[str, Path, Path]:
    """The served name, and the folders of the target, grown if so asked, and of the drafter."""
    chosen = str(options.draft) if options.draft is not None else None
    choice = choose_models(options.model, chosen)
    name, target, drafter = choice.name, choice.target, choice.draft
    if drafter is None:
        raise InvalidRequest("a benchmark of speculation needs --draft FOLDER", field="draft")
    if options.grow is not None:
        grown = import_extra("specinfer_bench.grown")
        name = f"{name}-{options.grow}"
        target = grown.grown_target(target, options.grow, options.dtype)
    return name, target, drafter


def _setup(options: BenchOptions) -> dict[str, object]:
    """The command, the options and the machine, for the report; paths by their names alone."""
    given = {
        key: value.name if isinstance(value, Path) else value
        for key, value in dataclasses.asdict(options).items()
    }
    return {"command": _command(sys.argv[1:]), "options": given, "machine": machine_facts()}


def _command(given: Sequence[str]) -> list[str]:
    """The command as others would write it: where its files were on this machine is left out."""
    words = ["specinfer"]
    for word in given:
        flag, equals, value = word.rpartition("=")
        words.append(f"{flag}{equals}{Path(value).name if '/' in value else value}")
    return words


def _make_folder_of(file: Path) -> None:
    """Make the folder of a file before the work whose result goes there."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidRequest(f"--output: {error}", field="output") from error
    if file.is_dir():
        raise InvalidRequest(f"--output: {file} is a folder", field="output")


def _print(console: Console, report: BenchReport, grow: str | None) -> None:
    if grow is not None:
        console.print(
            f"The target was grown to {grow} parameters: it costs what such a model costs and says "
            "what the small one says.",
            soft_wrap=True,
        )
    table = Table("", "tokens/s", "first token, ms", "tokens a round")
    for name, arm in report.arms.items():
        table.add_row(
            name.replace("_", " "),
            f"{arm.tokens_per_second:.1f}",
            f"{arm.first_token_ms:.1f}",
            f"{arm.tokens_per_round:.2f}",
        )
    console.print(table)
    for name, arm in report.arms.items():
        places = "  ".join(f"{place} {value:.2f}" for place, value in arm.round_ms.items())
        console.print(f"round, ms, {name.replace('_', ' ')}: {places}", soft_wrap=True)
    depths = "  ".join(f"{share:.0%}" for share in report.accepted_by_depth)
    lines = [
        f"{report.num_prompts} prompts, {report.num_tokens} tokens",
        f"speculation on against off: {report.speedup:.2f} "
        f"({report.speedup_min:.2f} to {report.speedup_max:.2f})",
        f"confirmed by depth: {depths or 'no guesses'}",
        f"outputs identical: {'yes' if report.identical else 'NO'}",
    ]
    if report.cluster_overhead is not None:
        lines.append(f"cluster against one process: {report.cluster_overhead:+.1%} time")
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
