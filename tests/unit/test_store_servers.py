"""Redis as operators run it: behind TLS, with a user of few rights, as a cluster, badly set up."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import NoPermissionError

from specinfer.errors import InternalError, InvalidRequest, NotFound, Unavailable
from specinfer.redis_connection import RedisSettings, close
from specinfer_router.access import KeyLimits
from specinfer_router.keys.record import new_key
from specinfer_router.keys.redis_keys import RedisKeys
from specinfer_router.store import ABANDONED, DurableStore, RedisStore
from specinfer_router.store.redis_check import check_server
from tests.conftest import free_port
from tests.kit.certificates import Certificates
from tests.kit.redis_servers import (
    RedisServer,
    acl_file,
    documented_acl_line,
    redis_cli,
    start_cluster,
)
from tests.unit.test_store_lease import unattended_record

DOCUMENT = Path(__file__).parents[2] / "docs" / "sessions.md"


async def use_everything(connection: RedisSettings) -> None:
    """Every command that the store and the keys have."""
    store = RedisStore(connection, holder="a", lease_seconds=0.05)
    await store.check()
    await store.ping()
    records = [unattended_record() for _ in range(5)]
    for record in records:
        await store.create(record)
        assert await store.commit(record.session_id, 0, [1]) == 1
    await store.renew([(record.session_id, 0) for record in records])
    record = records[0]
    assert (await store.load(record.session_id)).output_ids == (1,)
    assert await store.tail(record.session_id, 3) == ((1,), 1, "")
    assert (await store.claim(record.session_id)).owner == 1
    await store.restore(record._replace(owner=1, epoch=2, token_ids=(*record.token_ids, 1, 2)))
    await store.finish(record.session_id, ABANDONED, owner=1)
    assert record.session_id in await store.orphans(10)
    assert (await store.claim(record.session_id, orphaned_only=True)).output_ids == (1, 2)
    assert await store.commit(record.session_id, 2, [3], "stop", owner=2) == 3
    assert {each.session_id for each in await store.sessions(10)} == {
        each.session_id for each in records
    }
    await store.put_document("response:1", "text")
    assert await store.get_document("response:1") == "text"
    await store.delete_document("response:1")
    await store.close()
    keys = RedisKeys(connection)
    _, key = new_key("k", limits=KeyLimits(), now=datetime.now(UTC))
    await keys.add(key)
    assert await keys.version()
    assert list(await keys.load()) == [key.key_id]
    await keys.remove(key.key_id)
    with pytest.raises(NotFound):
        await keys.remove(key.key_id)
    await keys.close()


@pytest.fixture
def secured(tmp_path: Path, certificates: Certificates) -> Iterator[tuple[RedisServer, int, Path]]:
    """A server with a TLS port that asks for certificates, and the documented user alone."""
    acl = acl_file(tmp_path / "users.acl", documented_acl_line(DOCUMENT), "hunter2")
    password = tmp_path / "password"
    password.write_text("hunter2\n", encoding="utf-8")
    port = free_port()
    files = certificates.server
    server = RedisServer(
        tmp_path / "redis",
        *("--tls-port", str(port), "--tls-ca-cert-file", str(certificates.ca)),
        *("--tls-cert-file", str(files.certificate), "--tls-key-file", str(files.key)),
        *("--aclfile", str(acl)),
    )
    yield server, port, password
    server.stop()


async def test_tls_and_the_documented_rights_suffice(
    secured: tuple[RedisServer, int, Path], certificates: Certificates
) -> None:
    _, port, password = secured
    connection = RedisSettings(
        f"rediss://specinfer@127.0.0.1:{port}/0",
        password_file=password,
        ca=certificates.ca,
        certificate=certificates.client.certificate,
        key=certificates.client.key,
    )
    await use_everything(connection)
    stranger = replace(connection, ca=certificates.stranger.certificate)
    store = RedisStore(stranger)
    with pytest.raises(Unavailable):
        await store.check()
    await store.close()


async def test_the_documented_rights_reach_no_further(
    secured: tuple[RedisServer, int, Path],
) -> None:
    server, _, _ = secured
    client: Any = Redis.from_url(f"redis://specinfer:hunter2@127.0.0.1:{server.port}/0")
    for command in (
        ("GET", "other"),
        ("SET", "other", "1"),
        ("EVAL", "return redis.call('GET', KEYS[1])", "1", "other"),
        ("KEYS", "*"),
        ("FLUSHALL",),
        ("CONFIG", "GET", "*"),
        ("SCRIPT", "FLUSH"),
        ("ACL", "LIST"),
    ):
        with pytest.raises(NoPermissionError):
            await client.execute_command(*command)
    await client.aclose()


@pytest.mark.parametrize("wrong", ["password", "rights"])
async def test_a_redis_that_refuses_us_says_what_to_mend(
    secured: tuple[RedisServer, int, Path], tmp_path: Path, wrong: str
) -> None:
    server, _, password = secured
    if wrong == "password":
        password.write_text("guess", encoding="utf-8")
    else:
        acl_file(tmp_path / "users.acl", "user specinfer on >PASSWORD ~* -@all +ping", "hunter2")
        server.kill()
        server.restart()
    url = f"redis://specinfer@127.0.0.1:{server.port}/0"
    store = RedisStore(RedisSettings(url, password_file=password))
    with pytest.raises(InvalidRequest, match=r"ACL \(docs/sessions.md") as refused:
        await store.check()
    assert refused.value.field == "redis"
    assert "guess" not in refused.value.message
    await store.close()


async def test_wrong_rights_after_a_restart_are_an_outage(
    secured: tuple[RedisServer, int, Path], tmp_path: Path
) -> None:
    server, _, password = secured
    url = f"redis://specinfer@127.0.0.1:{server.port}/0"
    store = DurableStore(RedisStore(RedisSettings(url, password_file=password)))
    record = unattended_record()
    await store.create(record)
    acl_file(tmp_path / "users.acl", "user specinfer on >PASSWORD ~* -@all +ping", "hunter2")
    server.kill()
    server.restart()
    assert await store.commit(record.session_id, 0, [1]) == 1
    assert await store.commit(record.session_id, 1, [2]) == 2
    assert store.away_seconds > 0
    await store.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RedisServer]]:
    nodes = start_cluster(tmp_path_factory.mktemp("cluster"))
    yield nodes
    for node in nodes:
        node.stop()


@pytest.fixture
def clustered(cluster: list[RedisServer]) -> RedisSettings:
    """As the documented user."""
    rights = documented_acl_line(DOCUMENT).replace("PASSWORD", "hunter2").split()[1:]
    for node in cluster:
        redis_cli(node.port, "acl", "setuser", *rights)
    url = f"redis://specinfer:hunter2@127.0.0.1:{cluster[0].port}/0"
    return RedisSettings(url, cluster=True)


async def test_everything_works_on_a_cluster(
    cluster: list[RedisServer], clustered: RedisSettings
) -> None:
    await use_everything(clustered)
    sizes = [int(redis_cli(node.port, "dbsize")) for node in cluster]
    assert sum(size > 0 for size in sizes) > 1, "sessions lie on several nodes"
    for node in cluster:
        redis_cli(node.port, "flushall")


async def test_a_turn_s_commits_reach_all_nodes_of_a_cluster(
    cluster: list[RedisServer], clustered: RedisSettings
) -> None:
    store = DurableStore(RedisStore(clustered))
    records = [unattended_record() for _ in range(64)]
    for record in records:
        await store.create(record)
    for epoch in range(3):
        reached = await asyncio.gather(
            *(store.commit(record.session_id, epoch, [epoch]) for record in records)
        )
        assert reached == [epoch + 1] * 64
        for node in cluster:
            redis_cli(node.port, "script", "flush")
    for record in records:
        assert (await store.load(record.session_id)).output_ids == (0, 1, 2)
    await store.close()


async def test_a_redis_that_may_evict_is_refused(tmp_path: Path) -> None:
    server = RedisServer(tmp_path, "--maxmemory-policy", "allkeys-lru")
    store = RedisStore(RedisSettings(server.url))
    try:
        with pytest.raises(InvalidRequest, match="noeviction"):
            await store.check()
        redis_cli(server.port, "config", "set", "maxmemory-policy", "noeviction")
        await store.check()
    finally:
        await store.close()
        server.stop()


class OldRedis:
    """Answers INFO as another version would."""

    def __init__(self, version: str) -> None:
        self.version = version

    async def execute_command(self, *_: str) -> dict[str, str]:
        return {"redis_version": self.version, "maxmemory_policy": "noeviction"}


@pytest.mark.parametrize(
    ("version", "fits"), [("6.0.16", False), ("6.2.14", False), ("7.0.0", True), ("8.4", True)]
)
async def test_an_old_redis_is_refused(version: str, fits: bool) -> None:
    old, settings = OldRedis(version), RedisSettings("redis://127.0.0.1:1/0")
    if fits:
        await check_server(old, settings)  # type: ignore[arg-type]
        return
    with pytest.raises(InvalidRequest, match=r"7\.0"):
        await check_server(old, settings)  # type: ignore[arg-type]


async def test_a_command_that_redis_does_not_know_is_our_fault(redis_server: str) -> None:
    settings = RedisSettings(redis_server)
    client: Any = settings.connect()
    with pytest.raises(InternalError):
        await settings.answer(client.execute_command("NONSENSE"))
    await close(client)
