"""What a soak looks at: growth, gauges and keys. A leak that is planted has to be found."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
import redis

from specinfer_bench.chaos.leftovers import (
    GROWTH_BYTES,
    Usage,
    gauges_left,
    growth,
    immortal_keys,
    left_of,
    session_keys,
    usage_of,
)

MIB = 2**20


def test_a_process_that_grows_is_found_and_one_that_warms_up_is_not() -> None:
    steady = [Usage(100 * MIB, 20)] * 40
    warm = [Usage((50 + min(index, 8) * 10) * MIB, 20) for index in range(40)]
    leaking = [Usage((100 + 4 * index) * MIB, 20) for index in range(40)]
    opening = [Usage(100 * MIB, 20 + index) for index in range(40)]
    assert growth({"steady": steady, "warm": warm}) == []
    assert [line.split(":")[0] for line in growth({"leaking": leaking, "opening": opening})] == [
        "leaking",
        "opening",
    ]
    assert growth({"short": [Usage(0, 0), Usage(2 * GROWTH_BYTES, 0)]})


def test_usage_is_that_of_a_process() -> None:
    before = usage_of(os.getpid())
    assert before.memory_bytes > MIB
    with socket.socket():
        assert usage_of(os.getpid()).num_files == before.num_files + 1


def test_a_router_with_a_request_left_is_found() -> None:
    text = (
        "# TYPE specinfer_num_requests_running gauge\n"
        'specinfer_num_requests_running{model_name="m"} 0.0\n'
    )
    assert left_of("router 1", text) == []
    assert left_of("router 1", text.replace("0.0", "1.0")) == [
        "router 1: specinfer_num_requests_running is 1"
    ]


def test_blocks_that_only_hold_a_cached_prefix_are_not_left() -> None:
    text = (
        "# TYPE specinfer_kv_blocks gauge\n"
        'specinfer_kv_blocks{state="cached"} 7.0\n'
        'specinfer_kv_blocks{state="used"} 0.0\n'
    )
    assert left_of("verify 1", text) == []
    assert left_of("verify 1", text.replace("0.0", "2.0")) == ["verify 1: specinfer_kv_blocks is 2"]


def test_metrics_without_the_gauges_prove_nothing() -> None:
    assert left_of("draft 1", "# TYPE other gauge\nother 0.0\n")


async def test_metrics_that_cannot_be_read_prove_nothing() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert (await gauges_left({"draft 1": address}))[0].startswith("draft 1: no metrics")


@pytest.fixture
def server(redis_server: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_server) as client:
        yield client
        names = ("planted", "{planted}:session", "{workers:planted}:verify")
        client.delete(*(f"specinfer:{name}" for name in names))


async def test_a_planted_key_is_found(redis_server: str, server: redis.Redis) -> None:
    port = urlsplit(redis_server).port
    assert port is not None
    server.set("specinfer:planted", "1", ex=60)
    server.set("specinfer:{planted}:session", "1")
    server.set("specinfer:{workers:planted}:verify", "1", ex=60)
    assert "specinfer:{planted}:session" in await session_keys(port)
    assert "specinfer:{planted}:session" in await immortal_keys(port)
    assert "specinfer:planted" not in await immortal_keys(port)
    assert "specinfer:{workers:planted}:verify" not in await session_keys(port)
