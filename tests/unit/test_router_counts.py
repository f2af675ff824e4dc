"""What a router shows when workers are late, fail or leave."""

from __future__ import annotations

from specinfer.messages import StepCost
from specinfer_router.opening import SeatLimits
from specinfer_router.router import RouterLimits
from tests.kit.fake_drafter import FakeDrafter
from tests.kit.fake_workers import FakeVerifier, continuation, info_of
from tests.kit.router import PROMPT, Bench, request_of, running_router
from tests.kit.waiting import until


def value(bench: Bench, name: str, **labels: str) -> float:
    found = bench.registry.get_sample_value(f"specinfer_{name}", {"model_name": "table", **labels})
    return found or 0.0


async def test_late_trees_and_their_tokens() -> None:
    limits = RouterLimits(max_tree_nodes=32, seats=SeatLimits(propose_seconds=0.1))
    async with running_router(limits=limits) as bench:
        drafter = bench.drafters[0]
        drafter.gate.clear()
        await bench.generate(request_of(max_tokens=10))
        worker = bench.cluster.drafters.links[0].address
        assert value(bench, "late_trees_total", worker=worker) == 1
        assert value(bench, "root_only_rounds_total", reason="deadline") == 9
        assert value(bench, "draft_round_trip_seconds_count") == 0
        assert value(bench, "wasted_draft_tokens_total", reason="late") == 0
        drafter.gate.set()
        await until(
            lambda: value(bench, "wasted_draft_tokens_total", reason="late") > 0, "the tree comes"
        )


async def test_breakers_open_for_a_drafter_that_fails() -> None:
    async with running_router(drafters=[FakeDrafter(info_of("draft"), fail=True)]) as bench:
        await bench.generate(request_of(max_tokens=60))
        labels = {"tier": "draft", "worker": bench.cluster.drafters.links[0].address}
        assert value(bench, "breaker_state", **labels) == 2
        assert value(bench, "breaker_openings_total", **labels) == 1
        assert value(bench, "migrations_total", tier="draft", reason="not_found") == 3
        other = {"tier": "verify", "worker": bench.cluster.verifiers.links[0].address}
        assert value(bench, "breaker_state", **other) == 0


async def test_sessions_that_move_and_workers_that_are_down() -> None:
    verifiers = [FakeVerifier(info_of("a"), break_steps=frozenset({3})), FakeVerifier(info_of("b"))]
    async with running_router(verifiers=verifiers) as bench:
        result = await bench.generate(request_of())
        assert result.token_ids == continuation(PROMPT, 40, seed=3)
        assert value(bench, "migrations_total", tier="verify", reason="unavailable") == 1
        assert value(bench, "num_workers", tier="verify", state="down") == 1
        assert value(bench, "num_workers", tier="verify", state="ready") == 1
        assert value(bench, "num_workers", tier="draft", state="ready") == 1


async def test_the_time_of_a_plain_round_is_shown() -> None:
    info = info_of("verify", step_costs=(StepCost(1, 8, 0.25),))
    async with running_router(verifiers=[FakeVerifier(info)]) as bench:
        assert value(bench, "plain_round_seconds") == 0.25
