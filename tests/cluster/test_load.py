"""The load generator on a real cluster: its numbers are those that the router shows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from specinfer_bench.load.runs import OpenRun, open_report, sweep_report
from specinfer_bench.load.summary import Objective
from specinfer_bench.load.sweep import SweepOptions
from specinfer_cli.cluster import ClusterSettings, running_cluster

# A cluster of processes takes a while on a busy machine.
pytestmark = pytest.mark.timeout(300)

PROMPTS = ("What is a list?", "How long is a day?", "Where does the river end?")


async def test_clients_and_prometheus_agree_and_no_arm_changes_a_token(
    tiny_settings: ClusterSettings, tmp_path: Path
) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(
        "".join(
            f'{{"offset": {index / 50}, "prompt_tokens": {8 + index}, "output_tokens": 24}}\n'
            for index in range(24)
        )
    )
    with running_cluster(replace(tiny_settings, name="tiny")) as running:
        cluster = {"router": running.router, "gateway": running.gateway}
        objective = Objective(first_token_seconds=60.0, token_seconds=60.0)
        run = OpenRun(objective, "by_cost", trace=trace, sessions=4, temperature=0.8)
        report = await open_report(cluster, PROMPTS, run)
        options = SweepOptions(sessions=(1, 4), max_tokens=12, repeats=1)
        sweep = await sweep_report(cluster, PROMPTS, options, temperature=0.8)
    found, prometheus = report["summary"], report["prometheus"]
    assert isinstance(found, dict)
    assert isinstance(prometheus, dict)
    assert (found["done"], found["tokens"]) == (24, 24 * 24)
    assert found["goodput"]["met"] == 24
    for name in ("requests", "prompt_tokens", "generation_tokens", "first_tokens"):
        assert prometheus[name]["client"] == prometheus[name]["router"] > 0, name
    assert report["trusted"], prometheus
    assert isinstance(report["empty_call_ms"], float)
    assert 0 < report["empty_call_ms"] < 1e3
    for name in ("first_token_seconds", "request_seconds"):
        # What clients are told is what the router counts, less the end of the stream; their own
        # clocks have the way on top: 3 ms a request on a quiet machine, more on this one.
        numbers = prometheus[name]
        exact = 0.002 if name == "first_token_seconds" else 0.3
        assert numbers["told"] == pytest.approx(numbers["router"], rel=exact)
        way = 0.05 * prometheus["requests"]["client"]
        assert 0.98 * numbers["router"] <= numbers["client"] <= numbers["router"] + way, name
    assert sweep["identical"]
