"""The benchmark of the router's cost runs a real router and counts its rounds."""

from __future__ import annotations

from pathlib import Path

from specinfer_bench.router_cost import Load, Window, loop_rate, measure
from specinfer_bench.simulated_workers import Simulation


async def test_a_router_is_measured_by_its_rounds(tmp_path: Path) -> None:
    load = Load(2, tokens=32, windows=1, window_seconds=0.5, warm_seconds=0.2)
    (window,) = await measure(load, sockets=tmp_path)
    assert window.rounds > 0
    assert 0 < window.router_seconds < 2 * window.seconds


async def test_the_loop_takes_its_waits_and_nothing_else() -> None:
    simulation = Simulation(draft_seconds=0.01, verify_seconds=0.04)
    load = Load(4, windows=1, window_seconds=0.5, warm_seconds=0.2, simulation=simulation)
    assert 0 < await loop_rate(load) <= 1.3 * 4 / 0.05


def test_cost_is_of_a_round() -> None:
    assert Window(rounds=200, router_seconds=0.1, seconds=3.0).milliseconds == 0.5
