"""`specinfer doctor`: a verdict for everything that goes wrong often, and what to do about it.

What is seen from this machine is looked at here: versions, ports, memory. The rest the router says
of itself, its workers and its Redis. This module changes nothing.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json as json_format
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from specinfer import Client, __version__
from specinfer.admin import AdminClient
from specinfer.errors import PermissionDenied, SpecinferError, Unauthenticated, Unavailable
from specinfer.messages.admin import FAILED, OK, SKIPPED, WARNING, Finding
from specinfer.rpc import TlsSettings
from specinfer_cli import arguments
from specinfer_cli.console import friendly, messages, output, plain, print_json, visible
from specinfer_cli.memory_plan import plan_memory
from specinfer_cli.operators import DEFAULT_ADMIN_ADDRESS, Admin

DEFAULT_GATEWAY = "http://127.0.0.1:8000"
SECONDS = 5.0
_STYLES = {OK: "green", WARNING: "yellow", FAILED: "bold red", SKIPPED: "dim"}

_Gateway = Annotated[
    str,
    typer.Option("--gateway", metavar="URL", help="Address of the router's HTTP API; '' for none."),
]
_Model = Annotated[
    Path | None,
    typer.Option("--model", metavar="FOLDER", help="Also plan the memory of this checkpoint."),
]


@friendly
def doctor(
    admin: Admin = DEFAULT_ADMIN_ADDRESS,
    router: arguments.Router = arguments.DEFAULT_ADDRESS,
    gateway: _Gateway = DEFAULT_GATEWAY,
    api_key: arguments.ApiKey = None,
    tls_ca: arguments.TlsCa = None,
    tls_certificate: arguments.TlsCertificate = None,
    tls_key: arguments.TlsKey = None,
    model: _Model = None,
    dtype: arguments.Dtype = "bfloat16",
    kv_dtype: arguments.KvDtype = "auto",
    json: arguments.Json = False,
) -> None:
    """Examine a running cluster: a verdict and a remedy for each line; status 1 if one failed."""
    tls = arguments.connection([router, admin], api_key, tls_ca, tls_certificate, tls_key)
    findings = [_router_port(router, api_key, tls)]
    if gateway:
        findings.append(_gateway_port(gateway, tls))
    findings += asyncio.run(_from_router(admin, api_key, tls))
    if model is not None:
        findings.append(_memory(model, dtype, kv_dtype))
    if json:
        print_json([dataclasses.asdict(finding) for finding in findings])
    else:
        _show(findings)
    if any(finding.verdict == FAILED for finding in findings):
        raise typer.Exit(1)


def _router_port(address: str, api_key: str | None, tls: TlsSettings | None) -> Finding:
    check = f"router {address}"
    try:
        with Client(address, tls=tls, api_key=api_key, timeout=SECONDS) as client:
            found = client.capabilities()
    except SpecinferError as error:
        return Finding(check, FAILED, error.message, "is it running, and is --router right?")
    if found.version != __version__:
        return Finding(
            check,
            WARNING,
            f"runs {found.version}, this command is {__version__}",
            "install the same version here",
        )
    return Finding(check, OK, f"serves {found.model}, version {found.version}")


def _gateway_port(url: str, tls: TlsSettings | None) -> Finding:
    """One deadline for all of it: an answer that trickles in is none."""
    found: list[Finding] = []
    # A thread of its own: one that is still reading at the end holds nobody up.
    thread = threading.Thread(target=lambda: found.append(_ask_gateway(url, tls)), daemon=True)
    thread.start()
    thread.join(SECONDS)
    if found:
        return found[0]
    detail = f"has not answered within {SECONDS:g} s"
    return Finding(f"gateway {url}", FAILED, detail, "is that the gateway, and is it overloaded?")


def _gateway_context(tls: TlsSettings | None) -> ssl.SSLContext | None:
    if tls is None:
        return None
    context = ssl.create_default_context(cafile=None if tls.ca is None else str(tls.ca))
    if tls.certificate is not None:
        context.load_cert_chain(tls.certificate, tls.key)
    return context


def _ask_gateway(url: str, tls: TlsSettings | None) -> Finding:
    check = f"gateway {url}"
    if not url.startswith(("http://", "https://")):
        return Finding(check, FAILED, "no http address", "give --gateway http://HOST:PORT")
    try:
        context = _gateway_context(tls)
        with urllib.request.urlopen(
            f"{url.rstrip('/')}/health/ready", timeout=SECONDS, context=context
        ):
            return Finding(check, OK, "ready")
    except urllib.error.HTTPError as error:
        return Finding(check, FAILED, f"not ready: {_reason(error)}", "see the lines below")
    except (OSError, ValueError) as error:
        return Finding(
            check, FAILED, f"cannot be reached: {error}", "is it running, and is --gateway right?"
        )


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        return str(json_format.loads(error.read(4096))["reason"])
    except (ValueError, KeyError, TypeError, OSError):
        return f"status {error.code}"


async def _from_router(
    address: str, api_key: str | None, tls: TlsSettings | None
) -> Sequence[Finding]:
    check = f"admin port {address}"
    try:
        async with AdminClient(address, tls=tls, api_key=api_key, timeout=4 * SECONDS) as client:
            return (Finding(check, OK, "answers"), *await client.diagnose())
    except SpecinferError as error:
        return (Finding(check, FAILED, error.message, _admin_remedy(error)),)


def _admin_remedy(error: SpecinferError) -> str:
    if isinstance(error, PermissionDenied | Unauthenticated):
        return "give --api-key one that `specinfer keys create --role operator` made"
    if isinstance(error, Unavailable):
        return "give the router --admin, and run this where that address can be reached"
    return "see the log of the router"


def _memory(folder: Path, dtype: str, kv_dtype: str) -> Finding:
    check = f"memory for {folder}"
    try:
        plan = plan_memory(folder, dtype, kv_dtype)
    except SpecinferError as error:
        return Finding(check, FAILED, error.message, "give the folder of a checkpoint")
    left = plan.free_bytes - plan.weight_bytes
    detail = (
        f"{plan.num_parameters / 1e6:.0f} M parameters: {_size(plan.weight_bytes)} of weights, "
        f"{_size(plan.session_bytes)} of keys and values for the longest session "
        f"({plan.max_model_len} tokens); {_size(plan.free_bytes)} free here"
    )
    if left < 0:
        return Finding(check, FAILED, detail, "take a machine with more memory or a smaller dtype")
    if left < plan.session_bytes:
        return Finding(check, WARNING, detail, "there is no room for one of the longest sessions")
    return Finding(
        check, OK, f"{detail}; room for {plan.tokens_in(left)} tokens beside the weights"
    )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


def _show(findings: Sequence[Finding]) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        text = Text(visible(finding.detail))
        if finding.remedy and finding.verdict != OK:
            text.append(f"\n-> {visible(finding.remedy)}", style="bold")
        table.add_row(
            Text(finding.verdict, style=_STYLES[finding.verdict]), plain(finding.check), text
        )
    console = output()
    if not console.is_terminal:
        console.width = max(console.width, 140)
    console.print(table)
    counts = {verdict: 0 for verdict in (FAILED, WARNING)}
    for finding in findings:
        if finding.verdict in counts:
            counts[finding.verdict] += 1
    messages().print(f"{counts[FAILED]} failed, {counts[WARNING]} warnings", style="dim")
