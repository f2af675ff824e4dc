"""`specinfer router | draft | verify`: the services themselves, one process, for hand use."""

from __future__ import annotations

import sys
from typing import Any

import typer

from specinfer_cli.console import friendly, import_extra

PASS_ON: dict[str, Any] = {
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
    "add_help_option": False,
}


@friendly
def router(context: typer.Context) -> None:
    """Run a router; its own flags follow, see `specinfer router --help`."""
    _run("specinfer_router", context.args)


@friendly
def draft(context: typer.Context) -> None:
    """Run a draft worker; its own flags follow, see `specinfer draft --help`."""
    _run("specinfer_draft", context.args)


@friendly
def verify(context: typer.Context) -> None:
    """Run a verify worker; its own flags follow, see `specinfer verify --help`."""
    _run("specinfer_verify", context.args)


def _run(package: str, arguments: list[str]) -> None:
    service = import_extra(f"{package}.__main__")
    # The process is the service from here on, and the service reads its own flags.
    sys.argv = [package, *arguments]
    raise typer.Exit(service.main())
