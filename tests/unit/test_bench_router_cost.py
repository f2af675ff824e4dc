"""The benchmark of the router's cost runs a real router and counts its rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from specinfer.outbox import Outbox
from specinfer.v1 import verify_pb2
from specinfer_bench.router_cost import LOADS, Load, Window, loop_rate, measure
from specinfer_bench.simulated_workers import SimulatedVerifier, Simulation
from specinfer_router.settings import RouterSettings


@pytest.mark.parametrize("one_client", [False, True])
async def test_a_router_is_measured_by_its_rounds(tmp_path: Path, one_client: bool) -> None:
    load = Load(
        2, tokens=32, one_client=one_client, windows=1, window_seconds=0.5, warm_seconds=0.2
    )
    (window,) = await measure(load, sockets=tmp_path)
    assert window.rounds > 0
    assert 0 < window.router_seconds < 2 * window.seconds


async def test_the_loop_takes_its_waits_and_nothing_else() -> None:
    simulation = Simulation(draft_seconds=0.01, verify_seconds=0.04)
    load = Load(4, windows=1, window_seconds=0.5, warm_seconds=0.2, simulation=simulation)
    assert 0 < await loop_rate(load) <= 1.3 * 4 / 0.05


def test_what_is_measured_is_the_policy_that_routers_have() -> None:
    assert {load.policy for load in LOADS.values()} == {RouterSettings.policy, "static"}
    assert Load().policy == RouterSettings.policy


async def test_a_session_is_told_of_the_whole_pass_that_it_shared() -> None:
    verifier, outbox = SimulatedVerifier(Simulation()), Outbox[Any](max_unanswered=2, max_batch=2)
    for item, tokens in ((1, (5, 6, 7)), (2, (5,))):
        await outbox.expect_one()
        step = verify_pb2.VerifyItem(item_id=item)
        step.step.tree.token_ids.extend(tokens)
        verifier._handle(step, outbox)
    told: list[Any] = []
    async for results in outbox.batches():
        told.extend(results)
        if len(told) == 2:
            break
    assert [(result.num_rows, result.compute_seconds) for result in told] == [(4, 0.05)] * 2


def test_cost_is_of_a_round() -> None:
    assert Window(rounds=200, router_seconds=0.1, seconds=3.0).milliseconds == 0.5
