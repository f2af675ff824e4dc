"""Tiers of one machine over unix sockets: who may connect, what is taken away and what never is."""

from __future__ import annotations

import asyncio
import socket
import stat
from pathlib import Path

import pytest

from specinfer.announcing import advertised_address
from specinfer.client import AsyncClient
from specinfer.credentials import is_loopback
from specinfer.errors import InvalidRequest
from specinfer.probe import main as probe
from specinfer.rpc import open_channel
from specinfer.server import READINESS, build_server
from specinfer.unix_sockets import MAX_PATH_BYTES, socket_path
from specinfer_router.servicer import SERVICE, add_generation
from specinfer_router.tracing import _place
from tests.kit.router import PROMPT, request_of, running_router


def test_a_path_is_absolute_and_fits() -> None:
    assert socket_path("127.0.0.1:50051") is None
    assert socket_path("dns:///unix:1") is None
    assert socket_path("unix:/run/a.sock") == socket_path("unix:///run/a.sock")
    longest = "/" + "x" * (MAX_PATH_BYTES - 1)
    assert socket_path(f"unix:{longest}") == Path(longest)
    for wrong in ("unix:", "unix:a.sock", "unix://host/a", "unix:////a", f"unix:{longest}x"):
        with pytest.raises(InvalidRequest, match="socket"):
            socket_path(wrong)


def test_a_socket_stays_on_this_machine() -> None:
    assert is_loopback("unix:/run/a.sock")
    assert _place("unix:/run/a.sock") == {"server.address": "/run/a.sock"}


async def test_only_its_owner_may_connect(tmp_path: Path) -> None:
    path = tmp_path / "made" / "a.sock"
    server = build_server(f"unix:{path}", ["a"])
    await server.start()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert server.port == 0
    await server.drain(0)
    (tmp_path / "later").touch()
    assert stat.S_IMODE((tmp_path / "later").stat().st_mode) != 0o600


async def test_what_a_dead_process_left_is_taken_away(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert path.exists()
    server = build_server(f"unix:{path}", ["a"])
    await server.start()
    async with open_channel(f"unix:{path}") as channel:
        await channel.channel_ready()
    await server.drain(0)


async def test_what_lives_or_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    server = build_server(f"unix:{path}", ["a"])
    await server.start()
    with pytest.raises(InvalidRequest, match="listened on already"):
        build_server(f"unix:{path}", ["a"])
    async with open_channel(f"unix:{path}") as channel:
        await channel.channel_ready()
    await server.drain(0)
    precious = tmp_path / "precious"
    precious.write_text("kept", encoding="utf-8")
    for wrong in (precious, precious / "below"):
        with pytest.raises(InvalidRequest, match="precious"):
            build_server(f"unix:{wrong}", ["a"])
    assert precious.read_text(encoding="utf-8") == "kept"


async def test_a_router_is_used_over_a_socket(tmp_path: Path) -> None:
    address = f"unix:{tmp_path / 'router.sock'}"
    async with running_router() as bench:
        server = build_server(address, [SERVICE])
        add_generation(server, bench.router)
        await server.start()
        request = request_of()
        expected = await bench.generate(request)
        async with AsyncClient(address, api_key="a-key-is-safe-there") as client:
            done = await client.generate(token_ids=PROMPT, max_tokens=40, temperature=1.0, seed=3)
        assert done.token_ids == expected.token_ids
        await server.drain(0)


async def test_it_is_asked_for_its_health(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address = f"unix:{tmp_path / 'a.sock'}"
    server = build_server(address, ["a"])
    await server.start()
    assert await asyncio.to_thread(probe, [address, "--service", READINESS]) == 0
    await server.drain(0)
    assert await asyncio.to_thread(probe, [address]) == 1
    assert "unix:" in capsys.readouterr().err


async def test_a_socket_is_announced_to_nobody() -> None:
    redis = "redis://127.0.0.1:6379/0"
    for advertise in ("", "unix:/run/a.sock"):
        with pytest.raises(InvalidRequest) as caught:
            await advertised_address(advertise, "unix:/run/a.sock", 0, redis)
        assert caught.value.field == "advertise"
    told = await advertised_address("host:50071", "unix:/run/a.sock", 0, redis)
    assert told == "host:50071"
