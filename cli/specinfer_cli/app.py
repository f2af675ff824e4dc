"""The `specinfer` command: which commands there are and how they are grouped."""

from __future__ import annotations

from typing import Annotated

import typer

from specinfer import __version__
from specinfer_cli.bench import bench
from specinfer_cli.chat import chat
from specinfer_cli.doctor import doctor
from specinfer_cli.explain import explain
from specinfer_cli.generate import generate
from specinfer_cli.keys import app as keys
from specinfer_cli.lossless import lossless
from specinfer_cli.services import PASS_ON, draft, router, verify
from specinfer_cli.sessions import app as sessions
from specinfer_cli.top import top
from specinfer_cli.up import up

app = typer.Typer(
    help="Lossless speculative decoding, served as a gRPC cluster.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"specinfer {__version__}")
        raise typer.Exit


_Version = Annotated[
    bool,
    typer.Option(
        "--version", metavar="", callback=_print_version, is_eager=True, help="Print the version."
    ),
]


@app.callback()
def _options(version: _Version = False) -> None:
    """Lossless speculative decoding, served as a gRPC cluster."""


for _command in (up, generate, chat, explain, lossless, bench):
    app.command()(_command)
app.command(rich_help_panel="For operators")(top)
app.command(rich_help_panel="For operators")(doctor)
app.add_typer(sessions, name="sessions", rich_help_panel="For operators")
app.add_typer(keys, name="keys", rich_help_panel="For operators")
for _service in (router, draft, verify):
    app.command(rich_help_panel="Services, for hand use", **PASS_ON)(_service)
