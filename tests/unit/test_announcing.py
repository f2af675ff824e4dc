"""A worker's heartbeat, and the address that it tells."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from specinfer import announcing
from specinfer.announcing import Announcer, advertised_address
from specinfer.errors import InvalidRequest
from specinfer.messages import WorkerLoad
from specinfer.prefixes import PrefixChanges, PrefixPublisher, hash_chain
from specinfer.registry import RegisteredWorker
from tests.conftest import free_port
from tests.kit.fake_registry import FakeRegistry
from tests.kit.waiting import until
from tests.unit.test_prefixes import MemoryDirectory

WORKER = RegisteredWorker("verify", "w", "127.0.0.1:1")
REDIS = "redis://127.0.0.1:6379/0"


@pytest.fixture(autouse=True)
def fast_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announcing, "HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr(announcing, "MAX_PAUSE_SECONDS", 0.05)


async def test_a_worker_is_listed_with_its_load_until_it_ends() -> None:
    registry, load = FakeRegistry(), [WorkerLoad(1)]
    announcer = Announcer(registry, WORKER, lambda: load[0])
    announcer.start()
    await until(lambda: "w" in registry.listed, "it is listed")
    load[0] = WorkerLoad(7)
    await until(lambda: registry.listed["w"].load.num_sessions == 7, "its load is told")
    await announcer.drain()
    assert registry.listed["w"].load == WorkerLoad(7, draining=True)
    await announcer.close()
    assert registry.listed == {}


async def test_a_registry_that_is_away_or_loses_all_gets_the_worker_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    registry = FakeRegistry()
    registry.away = True
    asked: list[None] = []

    def load() -> WorkerLoad:
        asked.append(None)
        return WorkerLoad()

    announcer = Announcer(registry, WORKER, load)
    announcer.start()
    await until(lambda: len(asked) > 3, "it goes on trying")
    assert caplog.text.count("go on trying") == 1
    registry.away = False
    await until(lambda: "w" in registry.listed, "it is listed")
    registry.listed.clear()
    await until(lambda: "w" in registry.listed, "it is listed again")
    registry.away = True
    await announcer.drain()
    await announcer.close()
    assert "the entry expires" in caplog.text or "w" in registry.listed


async def test_every_beat_tells_a_piece_of_what_the_pool_holds() -> None:
    registry, directory, changes = FakeRegistry(), MemoryDirectory(), PrefixChanges()
    announcer = Announcer(registry, WORKER, WorkerLoad, PrefixPublisher(directory, "w", changes))
    chain = hash_chain(range(64), 16, b"key")
    for block_hash in chain:
        changes.add(block_hash)
    announcer.start()
    await until(lambda: directory.blocks == set(chain), "the blocks are published")
    changes.remove(chain[-1])
    await until(lambda: directory.blocks == set(chain[:-1]), "and what was evicted")
    await announcer.close()
    assert directory.blocks == set()


@pytest.mark.parametrize(
    ("advertise", "address", "told"),
    [
        ("", "127.0.0.1:0", "127.0.0.1:50071"),
        ("", "localhost:0", "localhost:50071"),
        ("", "[::1]:0", "[::1]:50071"),
        ("", "10.0.0.7:0", "10.0.0.7:50071"),
        ("verify-0.verify", "0.0.0.0:0", "verify-0.verify:50071"),
        ("verify-0.verify:443", "0.0.0.0:0", "verify-0.verify:443"),
        ("[fd00::1]", "[::]:0", "[fd00::1]:50071"),
        ("[fd00::1]:7", "[::]:0", "[fd00::1]:7"),
    ],
)
async def test_the_address_told_is_the_one_bound_or_said(
    advertise: str, address: str, told: str
) -> None:
    assert await advertised_address(advertise, address, 50071, REDIS) == told


async def test_a_wide_bind_tells_the_address_towards_redis() -> None:
    # Redis is on this machine alone, and so is whoever reads its list.
    assert await advertised_address("", "0.0.0.0:0", 5, REDIS) == "127.0.0.1:5"


def without_routes(monkeypatch: pytest.MonkeyPatch, own_address: str = "") -> None:
    """Names are not resolved but this host's own, which is that of the loopback."""
    own = socket.gethostname()
    resolve: Any = socket.getaddrinfo

    def lookup(host: str, port: int, *rest: Any, **more: Any) -> Any:
        if host == own and own_address:
            return resolve(own_address, port, *rest, **more)
        raise socket.gaierror(f"{host} is not known")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)


@pytest.mark.parametrize("own_address", ["", "127.0.0.1"])
async def test_an_address_that_cannot_be_known_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, own_address: str
) -> None:
    without_routes(monkeypatch, own_address)
    for address in ("0.0.0.0:0", "[::]:0", "unix:/tmp/socket"):
        with pytest.raises(InvalidRequest, match="--advertise HOST:PORT") as refused:
            await advertised_address("", address, free_port(), "redis://nowhere.invalid:6379/0")
        assert refused.value.field == "advertise"


async def test_an_address_said_has_to_be_one() -> None:
    for advertise in ("unix:/tmp/socket", "a b", "host:port", "fd00::1"):
        with pytest.raises(InvalidRequest):
            await advertised_address(advertise, "0.0.0.0:0", 5, REDIS)
