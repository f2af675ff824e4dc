"""`specinfer generate`: one prompt in, text out as it is made."""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import Annotated, Any

import typer

from specinfer import Client, Completion
from specinfer.errors import InvalidRequest
from specinfer.options import GenerateOptions
from specinfer_cli import arguments
from specinfer_cli.console import friendly, messages, print_json, write
from specinfer_cli.statistics import Statistics

_Prompt = Annotated[str, typer.Argument(help="What to ask or to continue; - reads it from stdin.")]
_Raw = Annotated[
    bool,
    typer.Option(
        "--raw",
        metavar="",
        help="Continue the text as it stands. Without it the model's chat template is used, "
        "if the model has one.",
    ),
]
_System = Annotated[str | None, typer.Option("--system", help="System message to put first.")]
_Stop = Annotated[
    list[str] | None, typer.Option("--stop", help="Text that ends the answer; may be repeated.")
]
_Stats = Annotated[
    bool, typer.Option("--stats", metavar="", help="Tell on stderr how the tokens came about.")
]


@friendly
def generate(
    prompt: _Prompt,
    router: arguments.Router = arguments.DEFAULT_ADDRESS,
    api_key: arguments.ApiKey = None,
    tls_ca: arguments.TlsCa = None,
    tls_certificate: arguments.TlsCertificate = None,
    tls_key: arguments.TlsKey = None,
    raw: _Raw = False,
    system: _System = None,
    max_tokens: arguments.MaxTokens = None,
    temperature: arguments.Temperature = 0.0,
    top_k: arguments.TopK = 0,
    top_p: arguments.TopP = 1.0,
    min_p: arguments.MinP = 0.0,
    seed: arguments.Seed = None,
    stop: _Stop = None,
    no_speculation: arguments.NoSpeculation = False,
    max_nodes: arguments.MaxNodes = None,
    max_depth: arguments.MaxDepth = None,
    timeout: arguments.Timeout = None,
    stats: _Stats = False,
    json: arguments.Json = False,
) -> None:
    """Send one prompt to a running cluster and print the answer as it is made."""
    text = sys.stdin.read() if prompt == "-" else prompt
    options: GenerateOptions = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
        "stop": stop or [],
        "speculation": arguments.speculation_options(no_speculation, max_nodes, max_depth),
    }
    tls = arguments.connection([router], api_key, tls_ca, tls_certificate, tls_key)
    with Client(router, timeout=timeout, tls=tls, api_key=api_key) as client:
        raw_prompt = choose_input(client, text, options, raw=raw, system=system)
        began = time.perf_counter()
        completion = _run(client, raw_prompt, options, show=not json)
        seconds = time.perf_counter() - began
    _report(completion, seconds, stats=stats, json=json)


def choose_input(
    client: Client, text: str, options: GenerateOptions, *, raw: bool, system: str | None
) -> str | None:
    """Put `text` into `options` as a conversation where the model has a chat template.

    Returns the text itself when it is to be continued as it stands. Raises InvalidRequest for a
    system message without a template.
    """
    if not text:
        raise InvalidRequest("the prompt is empty", field="prompt")
    if not raw and client.capabilities().chat:
        turns = [{"role": "system", "content": system}] if system is not None else []
        options["messages"] = [*turns, {"role": "user", "content": text}]
        return None
    if system is not None:
        raise InvalidRequest("--system needs a model with a chat template, and no --raw")
    return text


def _run(client: Client, prompt: str | None, options: GenerateOptions, *, show: bool) -> Completion:
    with client.stream(prompt, **options) as stream:
        for event in stream:
            if show:
                write(event.text)
        return stream.completion


def _report(completion: Completion, seconds: float, *, stats: bool, json: bool) -> None:
    statistics = Statistics().add(completion, seconds)
    if json:
        print_json(completion_dict(completion) | {"statistics": statistics.as_dict()})
    elif not completion.text.endswith("\n"):
        write("\n")
    if stats:
        console = messages()
        for line in statistics.lines():
            console.print(line, style="dim", markup=False, soft_wrap=True)
        usage = completion.usage
        console.print(
            f"prompt {usage.num_prompt_tokens} tokens ({usage.num_cached_tokens} cached), "
            f"finished by {completion.finish_reason}, seed {completion.seed}, "
            f"request {completion.request_id}",
            style="dim",
            markup=False,
            soft_wrap=True,
        )


def completion_dict(completion: Completion) -> dict[str, Any]:
    """A completion for programs; rounds are left to the statistics."""
    return {
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "stop_match": completion.stop_match,
        "seed": completion.seed,
        "model": completion.model,
        "request_id": completion.request_id,
        "usage": dataclasses.asdict(completion.usage),
    }
