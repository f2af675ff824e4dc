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
from specinfer_cli.console import friendly, messages, output, plain, print_json, visible
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
    tls_certificate: arguments.TlsCertificate = None,
    tls_key: arguments.TlsKey = None,
    limit: _Limit = 50,
    key: _KeyId = "",
    running: _Running = False,
    json: arguments.Json = False,
) -> None:
    """Show sessions that the store keeps."""
    tls = arguments.connection([admin], api_key, tls_ca, tls_certificate, tls_key)
    found = ask(
        lambda client: client.sessions(limit=limit, key_id=key, running_only=running),
        admin,
        api_key,
        tls,
    )
    if json:
        print_json({**dataclasses.asdict(found), "partial": found.partial})
        return
    table = Table(
        *("session", "key", "state", "tokens", "epoch", "owner", "router", "kept for"),
        box=None,
        pad_edge=False,
    )
    for session in sorted(found.sessions, key=lambda session: session.ttl_seconds, reverse=True):
        table.add_row(
            plain(session.session_id),
            plain(session.key_id or "-"),
            plain(state(session)),
            f"{session.num_prompt_tokens} + {session.num_output_tokens}",
            str(session.epoch),
            str(session.owner),
            plain(session.holder or "-"),
            f"{session.ttl_seconds:.0f} s",
        )
    console = output()
    if not console.is_terminal:
        console.width = max(console.width, 160)
    console.print(table)
    if found.partial:
        messages().print(
            f"not all sessions: {visible(found.partial_reason)}", style="yellow", markup=False
        )


@app.command()
@friendly
def show(
    session_id: _SessionId,
    admin: Admin = DEFAULT_ADMIN_ADDRESS,
    api_key: arguments.ApiKey = None,
    tls_ca: arguments.TlsCa = None,
    tls_certificate: arguments.TlsCertificate = None,
    tls_key: arguments.TlsKey = None,
    json: arguments.Json = False,
) -> None:
    """Show one session, without its text."""
    tls = arguments.connection([admin], api_key, tls_ca, tls_certificate, tls_key)
    found = ask(lambda client: client.session(session_id), admin, api_key, tls)
    facts = dataclasses.asdict(found)
    if json:
        print_json(facts)
        return
    console = output()
    for name, value in ({"state": state(found)} | facts).items():
        text = f"{value:.1f}" if isinstance(value, float) else str(value)
        line = f"{name.replace('_', ' '):<18} {visible(text) or '-'}"
        console.print(line, markup=False, soft_wrap=True)


@app.command()
@friendly
def cancel(
    session_id: _SessionId,
    admin: Admin = DEFAULT_ADMIN_ADDRESS,
    api_key: arguments.ApiKey = None,
    tls_ca: arguments.TlsCa = None,
    tls_certificate: arguments.TlsCertificate = None,
    tls_key: arguments.TlsKey = None,
) -> None:
    """End a session for good; its reader sees it end within a round."""
    tls = arguments.connection([admin], api_key, tls_ca, tls_certificate, tls_key)
    outcome = ask(lambda client: client.cancel(session_id), admin, api_key, tls)
    stands = f"had already ended ({outcome.finish_reason})" if outcome.had_ended else "is cancelled"
    messages().print(visible(f"session {session_id} {stands}"), markup=False)


def state(session: SessionStatus) -> str:
    """How a session stands, in a word or two."""
    if session.finish_reason:
        return session.finish_reason
    if session.lease_seconds > 0:
        return "running"
    return "waits for a router" if session.unattended else "without a router"
