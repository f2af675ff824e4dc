"""The workers' registry: entries, the Redis that keeps them, and what a hostile one may hold."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio

from specinfer import redis_registry
from specinfer.errors import InternalError, InvalidRequest, ResourceExhausted, Unavailable
from specinfer.messages import WorkerLoad
from specinfer.redis_connection import RedisSettings
from specinfer.redis_registry import RedisPrefixes, RedisRegistry
from specinfer.registry import (
    MAX_DOCUMENT_BYTES,
    RegisteredWorker,
    worker_from_json,
    worker_to_json,
)
from tests.conftest import free_port
from tests.kit.redis_servers import RedisServer, acl_file, documented_acl_line, start_cluster
from tests.kit.waiting import until

SESSIONS = Path(__file__).parents[2] / "docs" / "sessions.md"

WORKER = RegisteredWorker(
    "draft", "draft-1", "10.1.2.3:50061", "abc", "0.1", WorkerLoad(3, 2, 1, draining=True)
)


@asynccontextmanager
async def registry_at(url: str, group: str = "") -> AsyncIterator[RedisRegistry]:
    """A registry in a group of its own."""
    registry = RedisRegistry(RedisSettings(url), group or uuid.uuid4().hex)
    try:
        yield registry
    finally:
        await registry.close()


@asynccontextmanager
async def client_of(url: str) -> AsyncIterator[Any]:
    client = redis.asyncio.from_url(url)
    try:
        yield client
    finally:
        await client.aclose()


def test_an_entry_is_read_as_it_was_written() -> None:
    assert worker_from_json("draft", worker_to_json(WORKER)) == WORKER


@pytest.mark.parametrize(
    "changes",
    [
        {"worker_id": ""},
        {"worker_id": "x" * 129},
        {"worker_id": "a\nb"},
        {"worker_id": 7},
        {"address": "unix:/tmp/socket"},
        {"address": "dns:///elsewhere:1"},
        {"address": "host:0"},
        {"address": "host:65536"},
        {"address": "host"},
        {"address": "ho st:1"},
        {"address": "h" * 254 + ":1"},
        {"model_hash": "\x1b[31m"},
        {"version": ["0.1"]},
        {"load": None},
        {"load": {"num_sessions": -1}},
        {"load": {"num_sessions": 1.5}},
        {"load": {"num_sessions": True}},
        {"load": {"num_waiting": 2**31}},
    ],
    ids=lambda changes: json.dumps(changes)[:24],
)
def test_an_entry_that_is_none_is_refused(changes: dict[str, Any]) -> None:
    facts = json.loads(worker_to_json(WORKER)) | changes
    with pytest.raises(InvalidRequest):
        worker_from_json("draft", json.dumps(facts).encode())


@pytest.mark.parametrize(
    "document", [b"", b"\xff", b"[]", b"7", b"{}", b"[" * 2000, b" " * (MAX_DOCUMENT_BYTES + 1)]
)
def test_a_document_that_is_none_is_refused(document: bytes) -> None:
    with pytest.raises(InvalidRequest):
        worker_from_json("draft", document)


@pytest.mark.parametrize("address", ["[::1]:50061", "draft-0.draft:50061", "10.0.0.1:1"])
def test_addresses_that_others_can_reach(address: str) -> None:
    assert replace(WORKER, address=address).address == address


def test_the_largest_entry_fits() -> None:
    largest = RegisteredWorker(
        "verify",
        "w" * 128,
        "h" * 253 + ":65535",
        '"' * 128,
        '"' * 128,
        WorkerLoad(2**31 - 1, 2**31 - 1, 2**31 - 1),
    )
    document = worker_to_json(largest)
    assert len(document) <= MAX_DOCUMENT_BYTES
    assert worker_from_json("verify", document) == largest


async def test_announced_workers_are_listed_until_they_withdraw(redis_server: str) -> None:
    async with registry_at(redis_server) as registry:
        other = RegisteredWorker("verify", "verify-1", "host:50071")
        await registry.announce(WORKER)
        await registry.announce(other)
        await registry.announce(WORKER)
        assert sorted(await registry.workers(), key=lambda worker: worker.tier) == [WORKER, other]
        await registry.withdraw(WORKER)
        await registry.withdraw(WORKER)
        assert await registry.workers() == [other]


async def test_groups_do_not_see_each_other(redis_server: str) -> None:
    async with registry_at(redis_server) as one, registry_at(redis_server) as two:
        await one.announce(WORKER)
        assert await two.workers() == []


async def test_entries_expire_by_the_server_s_clock(
    redis_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_registry, "EXPIRY_SECONDS", 0.3)
    async with registry_at(redis_server) as registry:
        await registry.announce(WORKER)
        # A second one keeps both keys alive, so that the entry goes and not the whole list.
        other = replace(WORKER, worker_id="draft-2")

        async def only_the_other() -> bool:
            await registry.announce(other)
            return await registry.workers() == [other]

        await until(only_the_other, "the silent one is gone")


async def test_every_key_expires(redis_server: str) -> None:
    group = uuid.uuid4().hex
    async with registry_at(redis_server, group) as registry, client_of(redis_server) as client:
        await registry.announce(WORKER)
        keys = await client.keys(f"specinfer:{{workers:{group}}}:*")
        assert len(keys) == 2
        for key in keys:
            assert 0 < await client.pttl(key) <= 3000


async def test_an_entry_from_before_the_clock_was_set_back_is_no_entry(redis_server: str) -> None:
    group = uuid.uuid4().hex
    async with registry_at(redis_server, group) as registry, client_of(redis_server) as client:
        await registry.announce(WORKER)
        expiries = f"specinfer:{{workers:{group}}}:draft:expiries"
        await client.zincrby(expiries, 3_600_000, WORKER.worker_id)
        assert await registry.workers() == []
        other = replace(WORKER, worker_id="draft-2")
        await registry.announce(other)
        assert await client.zcard(expiries) == 1
        await registry.announce(WORKER)
        assert len(await registry.workers()) == 2


async def test_a_full_list_takes_nobody_new(
    redis_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_registry, "MAX_WORKERS", 2)
    async with registry_at(redis_server) as registry:
        first, second, third = (replace(WORKER, worker_id=name) for name in "abc")
        await registry.announce(first)
        await registry.announce(second)
        with pytest.raises(ResourceExhausted, match="2 draft workers"):
            await registry.announce(third)
        await registry.announce(first)
        await registry.withdraw(second)
        await registry.announce(third)
        assert {worker.worker_id for worker in await registry.workers()} == {"a", "c"}


async def test_hostile_entries_are_left_out(
    redis_server: str, caplog: pytest.LogCaptureFixture
) -> None:
    group = uuid.uuid4().hex
    async with registry_at(redis_server, group) as registry, client_of(redis_server) as client:
        await registry.announce(WORKER)
        prefix = f"specinfer:{{workers:{group}}}:draft"
        score = await client.zscore(f"{prefix}:expiries", WORKER.worker_id)
        documents = {
            "huge": b" " * (MAX_DOCUMENT_BYTES + 1),
            "shell": b'{"worker_id": "x", "address": "unix:/run/docker.sock", "load": {}}',
            "binary": b"\x80\x04\x95",
        }
        for name, document in documents.items():
            await client.hset(f"{prefix}:documents", name, document)
            await client.zadd(f"{prefix}:expiries", {name: score})
        await client.zadd(f"{prefix}:expiries", {"nobody": score})
        assert await registry.workers() == [WORKER]
        assert await registry.workers() == [WORKER]
        assert caplog.text.count("is left out") == 3, "each is said once"
        await client.set(f"{prefix}:expiries", "no sorted set")
        with pytest.raises(InternalError):
            await registry.workers()
        with pytest.raises(InternalError):
            await registry.announce(WORKER)


async def test_a_redis_that_is_away_is_unavailable() -> None:
    async with registry_at(f"redis://127.0.0.1:{free_port()}/0") as registry:
        with pytest.raises(Unavailable, match="cannot be reached"):
            await registry.workers()
        with pytest.raises(Unavailable):
            await registry.announce(WORKER)


async def use_everything(connection: RedisSettings) -> None:
    """Every command that the registry and the directory have."""
    registry, directory = RedisRegistry(connection, "g"), RedisPrefixes(connection, "g")
    other = RegisteredWorker("verify", "verify-1", "host:50071")
    await registry.announce(WORKER)
    await registry.announce(other)
    assert len(await registry.workers()) == 2
    await registry.withdraw(other)
    chain = [bytes([number]) * 16 for number in range(8)]
    assert await directory.publish("verify-1", 0, chain, [])
    assert await directory.publish("verify-1", 1, [], chain[5:])
    found = await directory.find(["verify-1", "nobody"], chain)
    assert [held.num_blocks for held in found] == [5, 0]
    await directory.forget("verify-1")
    assert await registry.workers() == [WORKER]
    await directory.close()
    await registry.close()


async def test_the_documented_rights_suffice(tmp_path: Path) -> None:
    acl = acl_file(tmp_path / "users.acl", documented_acl_line(SESSIONS), "hunter2")
    server = RedisServer(tmp_path / "redis", "--aclfile", str(acl))
    try:
        await use_everything(RedisSettings(f"redis://specinfer:hunter2@127.0.0.1:{server.port}/0"))
    finally:
        server.stop()


async def test_a_redis_cluster_keeps_a_group_together(tmp_path: Path) -> None:
    nodes = start_cluster(tmp_path)
    try:
        await use_everything(RedisSettings(nodes[0].url, cluster=True))
    finally:
        for node in nodes:
            node.stop()


def test_a_group_is_a_plain_name() -> None:
    with pytest.raises(InvalidRequest) as refused:
        RedisRegistry(RedisSettings("redis://127.0.0.1:1/0"), "a}b")
    assert refused.value.field == "group"
