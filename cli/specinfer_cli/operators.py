"""What the operators' commands share: how the admin port is reached, and how to wait for it.

This module knows nothing of what is asked there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Annotated, TypeVar

import typer

from specinfer.admin import DEFAULT_ADMIN_ADDRESS, AdminClient
from specinfer.rpc import TlsSettings

_Answer = TypeVar("_Answer")

Admin = Annotated[
    str,
    typer.Option(
        "--admin",
        metavar="ADDR",
        envvar="SPECINFER_ADMIN",
        help="Address of a router's admin port.",
    ),
]

__all__ = ["DEFAULT_ADMIN_ADDRESS", "Admin", "ask"]


def ask(
    use: Callable[[AdminClient], Awaitable[_Answer]],
    address: str,
    api_key: str | None,
    tls: TlsSettings | None,
) -> _Answer:
    """What one use of the admin port brings; raises SpecinferError."""

    async def asked() -> _Answer:
        async with AdminClient(address, tls=tls, api_key=api_key) as client:
            return await use(client)

    return asyncio.run(asked())
