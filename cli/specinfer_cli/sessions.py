"""`specinfer sessions`: list, show and cancel what the cluster keeps, whosever it is.

This module knows nothing of stores, and never sees a session's text.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer
from rich.table import Table

from specinfer.messages.admin import SessionStatus
from specinfer_cli import arguments
from specinfer_cli.console import friendly, messages, output, print_json
from specinfer_cli.operators import DEFAULT_ADMIN_ADDRESS, Admin, ask

app = typer.Typer(help="List, show and cancel sessions, for operators.", no_args_is_help=True)

_SessionId = Annotated[str, typer.Argument(metavar="SESSION_ID", help="Id of the session.")]
_Limit = Annotated[int, typer.Option("--limit", min=1, max=1000, help="Most sessions to show.")]
_KeyId = Annotated[str, typer.Option("--key", metavar="ID", help="Only sessions of this API key.")]
_Running = Annotated[
    bool, typer.Option("--running", metavar="", help="Only those that have not ended for good.")
]


@app.command("list")
@friendly
def list_sessions(
    admin: Admin = DEFAULT_ADMIN_ADDRESS,
    api_key: arguments.ApiKey = None,
    tls_ca: arguments.TlsCa = None,
    limit: _Limit = 50,
    key: _KeyId = "",
    running: _Running = False,
    json: arguments.Json = False,
) -> None:
    """Show sessions that the store keeps."""
    found = ask(
        lambda client: client.sessions(limit=limit, key_id=key, running_only=running),
        admin,
        api_key,
        tls_ca,
    )
    if json:
        print_json([dataclasses.asdict(session) for session in found])
        return
    table = Table(
        *("session", "key", "state", "tokens", "epoch", "owner", "router", "kept for"),
        box=None,
        pad_edge=False,
    )
    for session in sorted(found, key=lambda session: session.ttl_seconds, reverse=True):
        table.add_row(
            session.session_id,
            session.key_id or "-",
            state(session),
            f"{session.num_prompt_tokens} + {session.num_output_tokens}",
            str(session.epoch),
            str(session.owner),
            session.holder or "-",
            f"{session.ttl_seconds:.0f} s",
        )
    console = output()
    if not console.is_terminal:
        console.width = max(console.width, 160)
    console.print(table)
    if len(found) == limit:
        messages().print(f"at most {limit} are shown; --limit shows more", style="dim")


@app.command()
@friendly
def show(
    session_id: _SessionId,
    admin: Admin = DEFAULT_ADMIN_ADDRESS,
    api_key: arguments.ApiKey = None,
    tls_ca: arguments.TlsCa = None,
    json: arguments.Json = False,
) -> None:
    """Show one session, without its text."""
    found = ask(lambda client: client.session(session_id), admin, api_key, tls_ca)
    facts = dataclasses.asdict(found)
    if json:
        print_json(facts)
        return
    console = output()
    for name, value in ({"state": state(found)} | facts).items():
        text = f"{value:.1f}" if isinstance(value, float) else str(value)
        console.print(f"{name.replace('_', ' '):<18} {text or '-'}", markup=False, soft_wrap=True)


@app.command()
@friendly
def cancel(
    session_id: _SessionId,
    admin: Admin = DEFAULT_ADMIN_ADDRESS,
    api_key: arguments.ApiKey = None,
    tls_ca: arguments.TlsCa = None,
) -> None:
    """End a session for good; its reader sees it end within a round."""
    ask(lambda client: client.cancel(session_id), admin, api_key, tls_ca)
    messages().print(f"session {session_id} is cancelled", markup=False)


def state(session: SessionStatus) -> str:
    """How a session stands, in a word or two."""
    if session.finish_reason:
        return session.finish_reason
    if session.lease_seconds > 0:
        return "running"
    return "waits for a router" if session.unattended else "without a router"
