"""`specinfer top`: the cluster now, drawn again and again until Ctrl-C.

This module asks routers' admin ports; rates are differences between two answers. It knows nothing
of how routers count.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from specinfer.admin import AdminClient
from specinfer.errors import SpecinferError
from specinfer.messages import WorkerStatus
from specinfer.messages.admin import ClusterStatus, RouterStatus
from specinfer.rpc import TlsSettings
from specinfer.step_curve import SHOWN_ROWS, age, shown
from specinfer_cli import arguments
from specinfer_cli.console import friendly, output, plain, print_json
from specinfer_cli.operators import DEFAULT_ADMIN_ADDRESS

GOOD_OUTCOMES = frozenset({"stop", "length", "cancelled", "client_closed"})

_Admins = Annotated[
    list[str],
    typer.Option(
        "--admin",
        metavar="ADDR",
        envvar="SPECINFER_ADMIN",
        help="Address of a router's admin port; repeat it, or put commas between, for more.",
    ),
]
_Interval = Annotated[float, typer.Option("--interval", min=0.1, help="Seconds between two looks.")]
_Once = Annotated[
    bool, typer.Option("--once", metavar="", help="Look twice, print the second look and end.")
]


@dataclasses.dataclass(frozen=True)
class Look:
    """One answer of one router, and when it came.

    Attributes:
        address: of the admin port.
        at: time.monotonic() of the answer.
        status: what it said, or None.
        trouble: why there is no status, or "".
    """

    address: str
    at: float
    status: ClusterStatus | None = None
    trouble: str = ""


@dataclasses.dataclass(frozen=True)
class Rates:
    """What happened between two looks, by the second.

    Attributes:
        tokens: tokens generated.
        requests: requests ended.
        failed: those of them that failed.
        tokens_per_round: mean tokens that a round brought; None without rounds.
        acceptance: share of the guessed tokens that were confirmed; None without guesses.
        root_only: share of the rounds that had no guess; None without rounds.
    """

    tokens: float = 0.0
    requests: float = 0.0
    failed: float = 0.0
    tokens_per_round: float | None = None
    acceptance: float | None = None
    root_only: float | None = None


@friendly
def top(
    admin: _Admins = [DEFAULT_ADMIN_ADDRESS],  # noqa: B006 - typer copies it
    api_key: arguments.ApiKey = None,
    tls_ca: arguments.TlsCa = None,
    tls_certificate: arguments.TlsCertificate = None,
    tls_key: arguments.TlsKey = None,
    interval: _Interval = 1.0,
    once: _Once = False,
    json: arguments.Json = False,
) -> None:
    """Show routers, workers, speed and acceptance of a running cluster, live."""
    addresses = [each.strip() for one in admin for each in one.split(",") if each.strip()]
    tls = arguments.connection(addresses, api_key, tls_ca, tls_certificate, tls_key)
    seen = asyncio.run(_watch(addresses, api_key, tls, interval, once=once or json, json=json))
    if not any(look.status for look in seen):
        raise typer.Exit(1)


async def _watch(
    addresses: Sequence[str],
    api_key: str | None,
    tls: TlsSettings | None,
    interval: float,
    *,
    once: bool,
    json: bool,
) -> Sequence[Look]:
    """The last look."""
    clients = [AdminClient(address, tls=tls, api_key=api_key) for address in addresses]
    try:
        before = await _look(clients)
        if once:
            await asyncio.sleep(interval)
            now = await _look(clients)
            _print_once(before, now, json)
            return now
        with Live(
            picture(before, before), console=output(), screen=True, auto_refresh=False
        ) as live:
            while True:
                await asyncio.sleep(interval)
                now = await _look(clients)
                live.update(picture(before, now), refresh=True)
                before = now
    finally:
        await asyncio.gather(*(client.close() for client in clients))


async def _look(clients: Sequence[AdminClient]) -> list[Look]:
    return list(await asyncio.gather(*(_look_at(client) for client in clients)))


async def _look_at(client: AdminClient) -> Look:
    try:
        status = await client.cluster()
    except SpecinferError as error:
        return Look(client.address, time.monotonic(), trouble=error.message)
    return Look(client.address, time.monotonic(), status)


def _print_once(before: Sequence[Look], now: Sequence[Look], json: bool) -> None:
    if json:
        print_json([_facts(old, new) for old, new in zip(before, now, strict=True)])
        return
    console = output()
    if not console.is_terminal:
        console.width = max(console.width, 140)
    console.print(picture(before, now))


def _facts(before: Look, now: Look) -> dict[str, Any]:
    if now.status is None:
        return {"address": now.address, "trouble": now.trouble}
    status = dataclasses.asdict(now.status)
    return {
        "address": now.address,
        **status,
        "rates": dataclasses.asdict(rates(before, now)),
    }


def rates(before: Look, now: Look) -> Rates:
    """What happened between two looks at one router; zeros after it was started anew."""
    if before.status is None or now.status is None or now.at <= before.at:
        return Rates()
    old, new, seconds = before.status.router, now.status.router, now.at - before.at
    if new.router_id != old.router_id or new.uptime_seconds < old.uptime_seconds:
        return Rates()
    rounds = new.num_rounds - old.num_rounds
    tokens = new.num_tokens - old.num_tokens
    guesses = new.num_draft_tokens - old.num_draft_tokens
    accepted = new.num_accepted_tokens - old.num_accepted_tokens
    idle = _total(new.num_root_only_rounds) - _total(old.num_root_only_rounds)
    return Rates(
        tokens=tokens / seconds,
        requests=(_total(new.num_requests) - _total(old.num_requests)) / seconds,
        failed=(_num_failed(new) - _num_failed(old)) / seconds,
        tokens_per_round=tokens / rounds if rounds else None,
        acceptance=accepted / guesses if guesses else None,
        root_only=idle / rounds if rounds else None,
    )


def picture(before: Sequence[Look], now: Sequence[Look]) -> RenderableType:
    """The screen: a table of routers, and one of workers."""
    routers = Table(
        *("router", "model", "state", "streams", "waiting", "tokens/s", "tokens/round"),
        *("accepted", "plain rounds", "failed/s", "store", "up"),
        box=None,
        pad_edge=False,
    )
    for old, new in zip(before, now, strict=True):
        routers.add_row(*_router_row(old, new))
    workers = Table(
        *("tier", "worker", "address", "state", "sessions", "waiting", "KV free", "ours"),
        *(f"ms of {'/'.join(map(str, SHOWN_ROWS))} rows", "measured", "model"),
        box=None,
        pad_edge=False,
    )
    seen: set[tuple[str, str]] = set()
    for look in now:
        for worker in look.status.workers if look.status else ():
            if (worker.tier, worker.address) not in seen:
                seen.add((worker.tier, worker.address))
                workers.add_row(*_worker_row(worker))
    return Group(routers, Text(), workers)


def _router_row(before: Look, now: Look) -> tuple[str | Text, ...]:
    if now.status is None:
        return (plain(now.address), "", plain(now.trouble, "red"))
    router, rate = now.status.router, rates(before, now)
    ready = not router.not_ready_reason
    return (
        plain(router.router_id),
        plain(router.model_name),
        plain(router.not_ready_reason or "ready", "green" if ready else "red"),
        str(router.num_running),
        str(router.num_waiting),
        f"{rate.tokens:.0f}",
        _number(rate.tokens_per_round, ".2f"),
        _number(rate.acceptance, ".0%"),
        _number(rate.root_only, ".0%"),
        Text(f"{rate.failed:.1f}", style="red" if rate.failed else ""),
        plain(store_state(router), "" if router.store_ready else "red"),
        _duration(router.uptime_seconds),
    )


def _worker_row(worker: WorkerStatus) -> tuple[str | Text, ...]:
    word, style = worker_state(worker)
    info = worker.info
    free = worker.load.num_free_blocks / info.num_blocks if info and info.num_blocks else None
    return (
        worker.tier,
        plain(info.worker_id if info else "-"),
        plain(worker.address),
        Text(word, style=style),
        str(worker.load.num_sessions),
        str(worker.load.num_waiting),
        _number(free if worker.connected else None, ".0%"),
        str(worker.num_seats),
        shown(info.step_costs if info else ()),
        (age(info.costs_measured_at, time.time()) if info else "") or "-",
        plain(info.model_name if info else "-"),
    )


def store_state(router: RouterStatus) -> str:
    """Where sessions are kept, and whether that can be reached."""
    place = router.store or "memory"
    if router.store_ready:
        return place
    away = router.store_away_seconds
    return f"{place} away {_duration(away)}" if away else f"{place} does not answer"


def worker_state(worker: WorkerStatus) -> tuple[str, str]:
    """How a worker stands, in a word, and the style to show it in."""
    if worker.refusal:
        return "refused", "red"
    if not worker.connected:
        return "lost", "red"
    if worker.load.draining:
        return "draining", "yellow"
    if worker.breaker not in ("", "closed"):
        return worker.breaker, "yellow"
    return ("ready", "green") if worker.ready else ("not ready", "yellow")


def _num_failed(router: RouterStatus) -> int:
    return sum(
        count for outcome, count in router.num_requests.items() if outcome not in GOOD_OUTCOMES
    )


def _total(counts: Any) -> int:
    return sum(counts.values())


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if hours < 2 else f"{hours:.0f} h"
