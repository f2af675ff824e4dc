"""The benchmark of commits runs both stores and adds up."""

from __future__ import annotations

from specinfer.redis_connection import RedisSettings
from specinfer_bench.commit_cost import Load, RoundTimes, cost, measure


async def test_both_arms_run_the_same_rounds(redis_server: str) -> None:
    load = Load(sessions=6, rounds=3, draft_seconds=0.001, verify_seconds=0.002, max_rows=27)
    report = await measure(RedisSettings(redis_server), load, 2)
    assert report["rounds_of_an_arm"] == 36
    arms = report["arms_ms"]
    assert isinstance(arms, dict)
    for arm in ("memory", "redis"):
        assert 0 < arms[arm]["commit_p50"] <= arms[arm]["commit_p99"]
        assert arms[arm]["propose_p50"] >= 1.0
        assert arms[arm]["verify_p50"] >= 2.0
    assert arms["memory"]["commit_p50"] < arms["redis"]["commit_p50"]


def test_percentiles_are_in_milliseconds() -> None:
    times = [RoundTimes(0.001, 0.002, 0.001 * at) for at in range(101)]
    assert cost(times).commit_p50 == 50.0
    assert cost(times).commit_p99 == 99.0
    assert cost(times).round_p50 == 53.0
