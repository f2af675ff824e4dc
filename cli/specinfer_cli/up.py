"""`specinfer up`: a whole cluster on this machine until Ctrl-C."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.panel import Panel

from specinfer import Capabilities, Client
from specinfer.cores import MAX_THREADS, usable_cores, whole_cores
from specinfer.errors import Unauthenticated
from specinfer_cli import arguments
from specinfer_cli.cluster import ClusterSettings, RunningCluster, running_cluster, stop_signals
from specinfer_cli.console import friendly, import_extra, messages, output, print_json
from specinfer_cli.models import choose_models
from specinfer_cli.operators import DEFAULT_ADMIN_ADDRESS
from specinfer_cli.processes import Child

CAPABILITY_TIMEOUT_SECONDS = 20.0

_Drafts = Annotated[int, typer.Option("--drafts", min=1, max=64, help="Draft workers.")]
_Verifiers = Annotated[int, typer.Option("--verifiers", min=1, max=64, help="Verify workers.")]
_Redis = Annotated[
    str | None,
    typer.Option(
        "--redis",
        metavar="URL",
        help="Keep sessions in Redis and find workers there, also those that are started elsewhere "
        "later; default: sessions in memory and these workers alone.",
    ),
]
_Group = Annotated[
    str,
    typer.Option("--group", metavar="NAME", help="Workers and routers that find each other."),
]
_Grpc = Annotated[
    str,
    typer.Option("--grpc", metavar="ADDR", help="Where the router listens; port 0 is any."),
]
_Gateway = Annotated[
    str, typer.Option("--gateway", metavar="ADDR", help="Where health and metrics are over HTTP.")
]
_Admin = Annotated[
    str,
    typer.Option(
        "--admin", metavar="ADDR", help="Where the router answers operators; '' for nowhere."
    ),
]
_Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        max=MAX_THREADS,
        help="Compute threads of each worker; default: 1 for each draft worker and the other cores "
        "that this process may use for the verify workers. Workers whose threads take all of these "
        "cores get their own; others run wherever cores are idle.",
    ),
]
_Keys = Annotated[
    str,
    typer.Option(
        "--keys", metavar="FILE", help="Ask for API keys: those of this file, or 'redis'."
    ),
]
_InsecureBind = Annotated[
    bool,
    typer.Option(
        "--insecure-bind",
        metavar="",
        help="Let the router listen beyond this machine, without TLS.",
    ),
]
_Logs = Annotated[
    Path | None,
    typer.Option("--logs", metavar="FOLDER", help="Keep the processes' logs in this folder."),
]


@friendly
def up(
    model: arguments.Model = None,
    draft: arguments.Draft = None,
    drafts: _Drafts = 1,
    verifiers: _Verifiers = 1,
    redis: _Redis = None,
    group: _Group = "default",
    grpc: _Grpc = arguments.DEFAULT_ADDRESS,
    gateway: _Gateway = "127.0.0.1:8000",
    admin: _Admin = DEFAULT_ADMIN_ADDRESS,
    keys: _Keys = "",
    insecure_bind: _InsecureBind = False,
    dtype: arguments.Dtype = "float32",
    kv_dtype: arguments.KvDtype = "auto",
    threads: _Threads = None,
    logs: _Logs = None,
    json: arguments.Json = False,
) -> None:
    """Start verify workers, draft workers and a router here; Ctrl-C ends them all.

    Prints the endpoints once every process is healthy.
    """
    for service in ("verify", "draft", "router"):
        import_extra(f"specinfer_{service}")
    choice = choose_models(model, draft)
    settings = ClusterSettings(
        name=choice.name,
        model=choice.target,
        draft=choice.draft,
        num_drafters=drafts,
        num_verifiers=verifiers,
        redis=redis,
        group=group,
        grpc_address=grpc,
        gateway_address=gateway,
        admin_address=admin,
        keys=keys,
        insecure_bind=insecure_bind,
        dtype=dtype,
        num_threads=threads,
        logs=logs,
        verify_flags=("--kv-dtype", kv_dtype),
        draft_flags=("--kv-dtype", kv_dtype),
    )
    console = messages()
    with stop_signals() as stopped:
        console.print(f"starting {choice.name}, {dtype} ...", style="dim", markup=False)
        _tell_of_sharing(settings, console)
        with running_cluster(settings, stopped.is_set) as cluster:
            _announce(cluster, json=json)
            cluster.watch(stopped.is_set, _report_death)
            console.print("stopping ...", style="dim")


def _tell_of_sharing(settings: ClusterSettings, console: Console) -> None:
    """Say so where compute threads will take turns on the cores."""
    shares, cores = settings.core_shares, len(whole_cores(usable_cores()))
    if not shares.apart and shares.num_threads > cores:
        console.print(
            f"{shares.num_threads} compute threads share {cores} cores and take turns",
            style="dim",
            markup=False,
        )


def _announce(cluster: RunningCluster, *, json: bool) -> None:
    capabilities = _capabilities(cluster)
    if json:
        print_json(_facts(cluster, capabilities))
        return
    workers = f"{len(cluster.verifiers)} verify, {len(cluster.drafters)} draft"
    rows = [
        f"chat      http://{cluster.gateway}/",
        f"OpenAI    http://{cluster.gateway}/v1",
        f"gRPC      {cluster.router}",
        f"health    http://{cluster.gateway}/health/ready",
        f"metrics   http://{cluster.gateway}/metrics",
        *([f"operators {cluster.admin}"] if cluster.admin else []),
        f"model     {_model_text(capabilities)}",
        f"workers   {workers}",
        "",
        f'try       specinfer generate "What does textwrap.dedent do?" --router {cluster.router}',
        "stop      Ctrl-C",
    ]
    output().print(Panel("\n".join(rows), title="specinfer is up", expand=False))


def _capabilities(cluster: RunningCluster) -> Capabilities | None:
    """What the cluster says of itself, or None when it asks for a key first."""
    with Client(cluster.router, timeout=CAPABILITY_TIMEOUT_SECONDS) as client:
        try:
            return client.capabilities()
        except Unauthenticated:
            return None


def _model_text(capabilities: Capabilities | None) -> str:
    if capabilities is None:
        return "told to those with an API key"
    return f"{capabilities.model}, {capabilities.dtype}, {capabilities.max_model_len} tokens"


def _facts(cluster: RunningCluster, capabilities: Capabilities | None) -> dict[str, Any]:
    return {
        "router": cluster.router,
        "gateway": cluster.gateway,
        "admin": cluster.admin,
        "verifiers": list(cluster.verifiers),
        "drafters": list(cluster.drafters),
        "model": capabilities.model if capabilities else None,
        "model_hash": capabilities.model_hash if capabilities else None,
        "dtype": capabilities.dtype if capabilities else None,
        "launcher_pid": os.getpid(),
        "pids": {child.name: child.process.pid for child in cluster.children},
    }


def _report_death(child: Child) -> None:
    messages().print(child.obituary(), style="red", markup=False, soft_wrap=True)
