"""API keys: made, kept in a file or in Redis, recognised, expired, revoked while serving."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis

from specinfer.errors import InvalidRequest, NotFound, Unauthenticated, Unavailable
from specinfer.redis_connection import RedisSettings
from specinfer_router.access import ANYBODY, KeyLimits
from specinfer_router.keys.control import AccessControl, KeySource, bearer_token
from specinfer_router.keys.file import KeyFile
from specinfer_router.keys.record import (
    KeyRecord,
    format_record,
    new_key,
    parse_record,
    parse_records,
    parse_time,
)
from specinfer_router.keys.redis_keys import RedisKeys

NOW = datetime(2030, 1, 1, tzinfo=UTC)


def made(name: str = "team", **limits: int) -> tuple[str, KeyRecord]:
    return new_key(name, limits=KeyLimits(**limits), now=NOW)


class Fixed:
    """Keys that a test changes; `trouble` is raised when they are asked for."""

    def __init__(self, *records: KeyRecord) -> None:
        self.records = {record.key_id: record for record in records}
        self.trouble: Exception | None = None
        self.num_loads = 0
        self.asked = asyncio.Event()

    async def version(self) -> str:
        self.asked.set()
        if self.trouble is not None:
            raise self.trouble
        return repr(sorted(self.records))

    async def load(self) -> dict[str, KeyRecord]:
        self.num_loads += 1
        return dict(self.records)

    async def close(self) -> None:
        self.asked.set()


async def access_to(source: KeySource, now: datetime = NOW) -> AccessControl:
    access = AccessControl(source, clock=lambda: now)
    await access.refresh()
    return access


def test_a_key_is_random_and_only_its_hash_is_kept() -> None:
    keys = {made()[0] for _ in range(100)}
    assert len(keys) == 100
    key, record = made(max_streams=3)
    prefix, key_id, secret = key.split("-")
    assert (prefix, key_id, len(bytes.fromhex(secret))) == ("sk", record.key_id, 32)
    line = format_record(record)
    assert secret not in line
    assert hashlib.sha256(key.encode()).hexdigest() == record.sha256
    assert parse_record(line) == record


@given(
    name=st.text(min_size=1, max_size=100).filter(str.isprintable),
    numbers=st.lists(st.none() | st.integers(1, 2**31 - 1), min_size=3, max_size=3),
    priority=st.integers(-(2**31), 2**31 - 1),
    life=st.none() | st.timedeltas(timedelta(seconds=1), timedelta(days=9000)),
)
def test_a_record_survives_its_line(
    name: str, numbers: list[int | None], priority: int, life: timedelta | None
) -> None:
    expires = None if life is None else (NOW + life).replace(microsecond=0) + timedelta(seconds=1)
    limits = KeyLimits(numbers[0], numbers[1], numbers[2], priority)
    _, record = new_key(name, limits=limits, now=NOW, expires=expires)
    assert (record.name, record.expires, record.limits) == (name, expires, limits)
    assert parse_record(format_record(record)) == record


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"id": "xyz"}, "id"),
        ({"name": ""}, "name"),
        ({"name": "two\nlines"}, "name"),
        ({"sha256": "12"}, "sha256"),
        ({"max_streams": 0}, "max_streams"),
        ({"max_streams": True}, "max_streams"),
        ({"tokens_per_minute": 1.5}, "tokens_per_minute"),
        ({"expires": "soon"}, "expires"),
        ({"expires": 5}, "expires"),
        ({"secret": "x"}, "secret"),
    ],
    ids=str,
)
def test_a_wrong_line_is_named_by_its_field(change: dict[str, object], field: str) -> None:
    line = json.loads(format_record(made()[1]))
    with pytest.raises(InvalidRequest) as caught:
        parse_record(json.dumps(line | change))
    assert caught.value.field == field
    assert line["sha256"] not in caught.value.message


@pytest.mark.parametrize("line", ["", "[]", "nonsense", "[" * 100_000], ids=range(4))
def test_what_is_no_line_is_refused(line: str) -> None:
    with pytest.raises(InvalidRequest, match="JSON object"):
        parse_record(line)


def test_a_key_that_is_there_twice_is_refused() -> None:
    line = format_record(made()[1])
    with pytest.raises(InvalidRequest, match=r"line 2: key .* twice"):
        parse_records({"line 1": line, "line 2": line})


def test_times_without_a_zone_are_utc() -> None:
    assert parse_time("2030-01-01", "expires") == NOW
    assert parse_time("2030-01-01T02:00:00+02:00", "expires") == NOW
    with pytest.raises(InvalidRequest, match="in the future"):
        new_key("late", limits=KeyLimits(), now=NOW, expires=NOW)


async def test_without_keys_everybody_is_let_in() -> None:
    access = AccessControl()
    await access.start()
    assert access.authenticate(None) is ANYBODY
    assert access.authenticate("anything") is ANYBODY
    await access.close()


async def test_a_key_tells_who_calls_and_what_they_may_use() -> None:
    key, record = made(max_streams=3)
    access = await access_to(Fixed(record, made("other")[1]))
    caller = access.authenticate(key)
    assert (caller.key_id, caller.limits.max_streams) == (record.key_id, 3)


async def test_everything_but_a_known_key_is_refused() -> None:
    key, record = made()
    access = await access_to(Fixed(record))
    wrong_secret = key[:-1] + ("0" if key[-1] != "0" else "1")
    stranger, _ = made()
    for token in (
        None,
        "",
        "sk-",
        wrong_secret,
        stranger,
        key + " ",
        key.upper(),
        "é\ud800",
        key * 9,
    ):
        with pytest.raises(Unauthenticated) as caught:
            access.authenticate(token)
        assert caught.value.field == "api_key"
        assert not token or token not in caught.value.message


async def test_digests_are_compared_in_constant_time_for_unknown_ids_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared: list[tuple[str, str]] = []

    def compare(given: str, expected: str) -> bool:
        compared.append((given, expected))
        return given == expected

    monkeypatch.setattr("hmac.compare_digest", compare)
    key, record = made()
    access = await access_to(Fixed(record))
    access.authenticate(key)
    for token in (made()[0], "nonsense"):
        with pytest.raises(Unauthenticated):
            access.authenticate(token)
    assert len(compared) == 3
    assert {len(text) for pair in compared for text in pair} == {64}


async def test_an_unknown_id_with_the_hash_of_nothing_is_refused() -> None:
    access = await access_to(Fixed())
    with pytest.raises(Unauthenticated):
        access.authenticate("")


async def test_a_key_expires() -> None:
    key, record = made()
    record = replace(record, expires=NOW + timedelta(hours=1))
    assert (await access_to(Fixed(record))).authenticate(key).key_id == record.key_id
    late = await access_to(Fixed(record), NOW + timedelta(hours=1))
    with pytest.raises(Unauthenticated):
        late.authenticate(key)


async def test_changes_are_followed_and_trouble_keeps_the_last_keys(
    caplog: pytest.LogCaptureFixture,
) -> None:
    key, record = made()
    source = Fixed(record)
    access = AccessControl(source, refresh_seconds=0.001, clock=lambda: NOW)
    await access.start()
    assert access.authenticate(key).key_id == record.key_id
    source.trouble = Unavailable("gone for now")
    for _ in range(5):
        source.asked.clear()
        await source.asked.wait()
    assert access.authenticate(key).key_id == record.key_id
    assert [line.message for line in caplog.records].count(
        "keys cannot be read; those last read stay"
    ) == 1
    assert source.num_loads == 1
    source.trouble = None
    source.records = {}
    for _ in range(3):
        source.asked.clear()
        await source.asked.wait()
    with pytest.raises(Unauthenticated):
        access.authenticate(key)
    assert source.num_loads == 2
    await access.close()
    assert key not in caplog.text


async def test_changes_are_followed_after_an_error_of_any_kind(
    caplog: pytest.LogCaptureFixture,
) -> None:
    key, record = made()
    source = Fixed(record)
    access = AccessControl(source, refresh_seconds=0.001, clock=lambda: NOW)
    await access.start()
    source.trouble = RuntimeError("nobody thought of this")
    for _ in range(3):
        source.asked.clear()
        await asyncio.wait_for(source.asked.wait(), 20)
    assert access.authenticate(key).key_id == record.key_id
    assert "nobody thought of this" in caplog.text
    source.trouble = None
    source.records = {}
    for _ in range(3):
        source.asked.clear()
        await asyncio.wait_for(source.asked.wait(), 20)
    with pytest.raises(Unauthenticated):
        access.authenticate(key)
    await access.close()


async def test_keys_that_cannot_be_read_stop_the_start(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    with pytest.raises(InvalidRequest, match="No such file"):
        await AccessControl(KeyFile(path)).start()
    path.write_text(format_record(made()[1]) + "\n\nnonsense\n")
    with pytest.raises(InvalidRequest, match="keys, line 3: "):
        await AccessControl(KeyFile(path)).start()
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidRequest, match="no text"):
        await AccessControl(KeyFile(path)).start()


async def test_a_file_is_changed_as_a_whole_and_seen_again(tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys")
    pairs = [made(f"k{number}") for number in range(8)]
    await asyncio.gather(*(keys.add(record) for _, record in pairs))
    assert await keys.load() == {record.key_id: record for _, record in pairs}
    assert os.stat(tmp_path / "keys").st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["keys"]
    access = await access_to(keys)
    key, record = pairs[0]
    assert access.authenticate(key).key_id == record.key_id
    await keys.remove(record.key_id)
    await access.refresh()
    with pytest.raises(Unauthenticated):
        access.authenticate(key)
    with pytest.raises(NotFound):
        await keys.remove(record.key_id)


async def test_keys_in_redis(redis_server: str) -> None:
    keys = RedisKeys(RedisSettings(redis_server))
    key, record = made("in redis", requests_per_minute=7)
    access = await access_to(keys)
    with pytest.raises(Unauthenticated):
        access.authenticate(key)
    await keys.add(record)
    await access.refresh()
    assert access.authenticate(key).limits.requests_per_minute == 7
    client = Redis.from_url(redis_server)
    kept = await client.hgetall("specinfer:keys")
    assert key.rpartition("-")[2] not in repr(kept)
    await keys.remove(record.key_id)
    await access.refresh()
    with pytest.raises(Unauthenticated):
        access.authenticate(key)
    with pytest.raises(NotFound):
        await keys.remove(record.key_id)
    await client.delete("specinfer:keys")
    await client.aclose()
    await keys.close()


async def test_what_is_no_text_in_redis_is_a_typed_error(redis_server: str) -> None:
    keys = RedisKeys(RedisSettings(redis_server))
    _, record = made("in redis")
    await keys.add(record)
    client = Redis.from_url(redis_server)
    await client.hset("specinfer:keys", "junk", b"\xff")
    with pytest.raises(InvalidRequest, match="no text"):
        await keys.load()
    await client.hdel("specinfer:keys", "junk")
    assert list(await keys.load()) == [record.key_id], "the connection is still of use"
    await client.delete("specinfer:keys")
    await client.aclose()
    await keys.close()


async def test_a_redis_that_is_not_there_is_said_without_its_password() -> None:
    keys = RedisKeys(RedisSettings("redis://:hunter2@127.0.0.1:1/0"))
    with pytest.raises(Unavailable) as caught:
        await keys.load()
    assert "hunter2" not in caught.value.message
    await keys.close()
    with pytest.raises(InvalidRequest, match="no Redis URL"):
        RedisKeys(RedisSettings("http://127.0.0.1:1/0"))


@pytest.mark.parametrize(
    ("header", "token"),
    [
        (None, None),
        ("", None),
        ("Bearer", None),
        ("Bearer ", None),
        ("Basic abc", None),
        ("Bearer abc", "abc"),
        ("bearer  abc ", "abc"),
    ],
)
def test_bearer_tokens(header: str | None, token: str | None) -> None:
    assert bearer_token(header) == token
