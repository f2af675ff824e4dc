"""What only a real Redis can show: expiry, lost scripts, a killed server, a silent one."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.crc import key_slot

from specinfer.errors import InvalidRequest, NotFound, Unavailable
from specinfer.redis_connection import RedisSettings
from specinfer_router.store import RedisStore
from specinfer_router.store.encoding import session_keys
from tests.conftest import free_port, redis_binary, stop
from tests.unit.test_store import record_of


class Server:
    """A Redis of this test alone, which keeps its data on disk and may be killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.process = self.start()

    def start(self) -> subprocess.Popen[str]:
        command = [redis_binary(), "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        command += ["--dir", str(self.folder), "--appendonly", "yes", "--appendfsync", "always"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if "Ready to accept connections" in line:
                return process
        pytest.fail("redis-server did not start")

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=20)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    started = Server(tmp_path)
    yield started
    stop(started.process)


@pytest.fixture
async def redis(redis_server: str) -> AsyncIterator[Redis]:
    client = Redis.from_url(redis_server)
    yield client
    await client.aclose()


async def test_every_key_expires_and_commits_renew_it(redis_server: str, redis: Redis) -> None:
    store = RedisStore(RedisSettings(redis_server), ttl_seconds=100)
    record = record_of()
    await store.create(record)
    keys = sorted([key async for key in redis.scan_iter(f"*{record.session_id}*")])
    assert [key.decode() for key in keys] == sorted(session_keys(record.session_id))
    for step in (
        lambda: store.commit(record.session_id, 0, [1]),
        lambda: store.finish(record.session_id, "stop"),
    ):
        for key in keys:
            assert 0 < await redis.pttl(key) <= 100_000
            await redis.pexpire(key, 5_000)
        await step()
        assert [await redis.pttl(key) > 50_000 for key in keys] == [True, True]
    await store.close()


async def test_an_expired_session_is_gone(redis_server: str, redis: Redis) -> None:
    store = RedisStore(RedisSettings(redis_server))
    record = record_of()
    await store.create(record)
    await redis.pexpire(session_keys(record.session_id)[1], 0)
    with pytest.raises(NotFound):
        await store.commit(record.session_id, 0, [1])
    with pytest.raises(NotFound):
        await store.load(record.session_id)
    await store.close()


def test_all_keys_of_a_session_share_a_slot() -> None:
    first, second = session_keys("abc")
    assert key_slot(first.encode()) == key_slot(second.encode())
    with pytest.raises(InvalidRequest):
        session_keys("a}b{c")


async def test_lost_scripts_are_loaded_again(redis_server: str, redis: Redis) -> None:
    store = RedisStore(RedisSettings(redis_server))
    record = record_of()
    await store.create(record)
    await redis.script_flush()
    assert await store.commit(record.session_id, 0, [1]) == 1
    await redis.script_flush()
    await store.finish(record.session_id, "stop")
    await store.close()


async def test_a_killed_server_comes_back_with_its_sessions(server: Server) -> None:
    store = RedisStore(RedisSettings(server.url, timeout_seconds=1.0))
    record = record_of()
    await store.create(record)
    assert await store.commit(record.session_id, 0, [1]) == 1
    server.kill()
    with pytest.raises(Unavailable):
        await store.commit(record.session_id, 1, [2])
    server.process = server.start()
    assert await store.commit(record.session_id, 0, [1]) == 1, "repeated after the crash"
    assert await store.commit(record.session_id, 1, [2]) == 2
    assert (await store.load(record.session_id)).token_ids == (0, 1, 2, 1, 2)
    await store.close()


async def test_of_two_stores_on_one_redis_one_commits(redis_server: str) -> None:
    stores = [RedisStore(RedisSettings(redis_server)), RedisStore(RedisSettings(redis_server))]
    record = record_of()
    await stores[0].create(record)
    outcomes = await asyncio.gather(
        *(store.commit(record.session_id, 0, [9 + n]) for n, store in enumerate(stores)),
        return_exceptions=True,
    )
    assert outcomes.count(1) == 1
    for store in stores:
        await store.close()


async def test_an_unreachable_redis_says_what_to_do_and_hides_the_password() -> None:
    store = RedisStore(RedisSettings(f"redis://user:hunter2@127.0.0.1:{free_port()}/0"))
    with pytest.raises(Unavailable) as unreachable:
        await store.check()
    assert "--redis" in unreachable.value.message
    assert "hunter2" not in unreachable.value.message
    await store.close()


async def test_a_redis_that_never_answers_is_given_up() -> None:
    async def silence(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    deaf = await asyncio.start_server(silence, "127.0.0.1", 0)
    port = deaf.sockets[0].getsockname()[1]
    store = RedisStore(
        RedisSettings(f"redis://127.0.0.1:{port}/0", timeout_seconds=0.1, num_retries=1)
    )
    async with asyncio.timeout(5):
        with pytest.raises(Unavailable):
            await store.check()
    await store.close()
    deaf.close()


@pytest.mark.parametrize("url", ["127.0.0.1:6379", "http://127.0.0.1/0", "redis://["])
def test_what_is_no_redis_url_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest, match="redis://"):
        RedisStore(RedisSettings(url))
