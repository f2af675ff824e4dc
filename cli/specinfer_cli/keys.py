"""`specinfer keys`: make, list and revoke API keys, in a file or in the routers' Redis.

A key is shown once, when it is made; what is kept cannot be turned back into it. This module knows
nothing of how routers use keys.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

import typer
from rich.table import Table

from specinfer.errors import InvalidRequest
from specinfer_cli import arguments
from specinfer_cli.console import friendly, import_extra, messages, output, print_json, write
from specinfer_router.access import USER, KeyLimits
from specinfer_router.keys.file import KeyFile
from specinfer_router.keys.record import KeyRecord, new_key, parse_time

app = typer.Typer(help="Make, list and revoke API keys.", no_args_is_help=True)

_Result = TypeVar("_Result")

_File = Annotated[
    Path | None, typer.Option("--file", metavar="FILE", help="Keys are kept in this file.")
]
_Redis = Annotated[
    str | None,
    typer.Option(
        "--redis",
        metavar="URL",
        envvar="SPECINFER_ROUTER_REDIS",
        help="Keys are kept in this Redis, for all routers that use it.",
    ),
]
_Name = Annotated[str, typer.Argument(metavar="NAME", help="What people call the key.")]
_KeyId = Annotated[str, typer.Argument(metavar="ID", help="Id of the key, the part after sk-.")]
_Streams = Annotated[
    int | None, typer.Option("--max-streams", min=1, help="Requests in progress or waiting.")
]
_Requests = Annotated[
    int | None, typer.Option("--requests-per-minute", min=1, help="Requests begun.")
]
_Tokens = Annotated[
    int | None,
    typer.Option("--tokens-per-minute", min=1, help="Tokens of prompts and completions."),
]
_Priority = Annotated[
    int, typer.Option("--max-priority", help="Highest priority that requests may ask for.")
]
_Expires = Annotated[
    str | None,
    typer.Option("--expires", metavar="TIME", help="Date or time in ISO 8601, UTC by default."),
]
_Role = Annotated[
    str,
    typer.Option("--role", help="user: generate; operator: also the routers' admin port."),
]


class _Keys(Protocol):
    async def load(self) -> dict[str, KeyRecord]: ...
    async def add(self, record: KeyRecord) -> None: ...
    async def remove(self, key_id: str) -> None: ...
    async def close(self) -> None: ...


@dataclass(frozen=True)
class _Connection:
    """What `RedisSettings` is told."""

    url: str = ""
    password_file: Path | None = None
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    cluster: bool = False


def _redis_file(flag: str, help_text: str) -> Any:
    variable = f"SPECINFER_ROUTER_{flag.upper().replace('-', '_')}"
    return typer.Option(f"--{flag}", metavar="FILE", envvar=variable, help=help_text)


@app.callback()
def connection(
    context: typer.Context,
    redis_password_file: Annotated[
        Path | None, _redis_file("redis-password-file", "File that holds Redis's password.")
    ] = None,
    redis_ca: Annotated[
        Path | None, _redis_file("redis-ca", "Certificates to trust for rediss://, PEM.")
    ] = None,
    redis_certificate: Annotated[
        Path | None, _redis_file("redis-certificate", "Our certificate for Redis, PEM.")
    ] = None,
    redis_key: Annotated[Path | None, _redis_file("redis-key", "Its private key, PEM.")] = None,
    redis_cluster: Annotated[
        bool,
        typer.Option(
            "--redis-cluster",
            envvar="SPECINFER_ROUTER_REDIS_CLUSTER",
            help="The Redis is a cluster.",
        ),
    ] = False,
) -> None:
    """Make, list and revoke API keys."""
    context.obj = _Connection(
        password_file=redis_password_file,
        ca=redis_ca,
        certificate=redis_certificate,
        key=redis_key,
        cluster=redis_cluster,
    )


@app.command()
@friendly
def create(
    context: typer.Context,
    name: _Name,
    file: _File = None,
    redis: _Redis = None,
    max_streams: _Streams = None,
    requests_per_minute: _Requests = None,
    tokens_per_minute: _Tokens = None,
    max_priority: _Priority = 0,
    expires: _Expires = None,
    role: _Role = USER,
    json: arguments.Json = False,
) -> None:
    """Make a key and print it, the only time that it is shown.

    Limits that are not given are not set; every router counts them by itself.
    """
    key, record = new_key(
        name,
        limits=KeyLimits(max_streams, requests_per_minute, tokens_per_minute, max_priority),
        now=datetime.now(UTC),
        expires=None if expires is None else parse_time(expires, "expires"),
        role=role,
    )
    _with_keys(context, file, redis, lambda keys: keys.add(record))
    if json:
        print_json({"key": key, **_facts(record)})
        return
    write(key + "\n")
    messages().print("This key is shown once. What is kept is its hash.", style="dim")


@app.command("list")
@friendly
def list_keys(
    context: typer.Context,
    file: _File = None,
    redis: _Redis = None,
    json: arguments.Json = False,
) -> None:
    """Show all keys, without their secrets."""
    records = _with_keys(context, file, redis, lambda keys: keys.load()).values()
    if json:
        print_json([_facts(record) for record in records])
        return
    table = Table("id", "name", "role", "created", "expires", "limits", box=None, pad_edge=False)
    for record in sorted(records, key=lambda record: record.created):
        table.add_row(
            record.key_id,
            record.name,
            record.role,
            f"{record.created:%Y-%m-%d}",
            f"{record.expires:%Y-%m-%d %H:%M%z}" if record.expires else "never",
            _limits_text(record.limits),
        )
    output().print(table)


@app.command()
@friendly
def revoke(
    context: typer.Context, key_id: _KeyId, file: _File = None, redis: _Redis = None
) -> None:
    """Forget a key; running routers refuse it a second later."""
    _with_keys(context, file, redis, lambda keys: keys.remove(key_id))
    messages().print(f"key {key_id} is revoked", markup=False)


def _open(context: typer.Context, file: Path | None, redis: str | None) -> _Keys:
    if file is not None:
        return KeyFile(file)
    if not redis:
        raise InvalidRequest("say where keys are kept: --file FILE or --redis URL", field="file")
    told = asdict(replace(context.ensure_object(_Connection), url=redis))
    settings = import_extra("specinfer.redis_connection").RedisSettings(**told)
    keys: _Keys = import_extra("specinfer_router.keys.redis_keys").RedisKeys(settings)
    return keys


def _with_keys(
    context: typer.Context,
    file: Path | None,
    redis: str | None,
    use: Callable[[_Keys], Awaitable[_Result]],
) -> _Result:
    async def used() -> _Result:
        keys = _open(context, file, redis)
        try:
            return await use(keys)
        finally:
            await keys.close()

    return asyncio.run(used())


def _facts(record: KeyRecord) -> dict[str, Any]:
    return {
        "id": record.key_id,
        "name": record.name,
        "role": record.role,
        "created": record.created.isoformat(),
        "expires": record.expires.isoformat() if record.expires else None,
        "limits": asdict(record.limits),
    }


def _limits_text(limits: KeyLimits) -> str:
    return ", ".join(f"{name} {value}" for name, value in asdict(limits).items() if value) or "none"
