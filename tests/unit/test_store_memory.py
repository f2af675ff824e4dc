"""How full Redis is: of its limit, or of the machine without one; kept while it is away."""

from __future__ import annotations

from pathlib import Path

import pytest
from redis.asyncio import Redis

from specinfer.errors import Unavailable
from specinfer.redis_connection import RedisSettings
from specinfer_router.store.redis_memory import RedisMemory
from tests.conftest import redis_binary, start_redis, stop
from tests.kit.waiting import until


async def test_the_share_is_of_the_limit_or_else_of_the_machine(tmp_path: Path) -> None:
    process, port = start_redis(redis_binary(), tmp_path)
    client = Redis(port=port)
    memory = RedisMemory(RedisSettings(f"redis://127.0.0.1:{port}/0"), pause_seconds=0.01)
    try:
        facts = await client.info("memory")
        await memory.look()
        machine = facts["used_memory"] / facts["total_system_memory"]
        assert memory.share == pytest.approx(machine, rel=0.5)
        assert 0 < memory.share < 0.1

        await client.config_set("maxmemory", str(4 * facts["used_memory"]))
        memory.start()
        await until(lambda: memory.share > 0.1, "the limit is seen")
        assert memory.share == pytest.approx(0.25, abs=0.1)
        await memory.close()
    finally:
        await client.aclose()
        stop(process)
    away = RedisMemory(
        RedisSettings(f"redis://127.0.0.1:{port}/0", timeout_seconds=0.1, num_retries=0)
    )
    away.share = 0.5
    with pytest.raises(Unavailable):
        await away.look()
    assert away.share == 0.5
    await away.close()
