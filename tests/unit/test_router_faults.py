"""Breakers, deadlines, hedges, drains and lost leases, through a router on fake workers."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from dataclasses import replace
from functools import partial

import pytest

import specinfer_router.verify_seat
from specinfer.errors import LeaseLost, ResourceExhausted
from specinfer.messages import StepCost, TokensEvent
from specinfer_router.breaker import BreakerLimits
from specinfer_router.deadlines import StepDeadline
from specinfer_router.links import LinkLimits
from specinfer_router.opening import SeatLimits
from specinfer_router.router import RouterLimits
from tests.kit.fake_drafter import FakeDrafter
from tests.kit.fake_workers import FakeVerifier, continuation, info_of
from tests.kit.router import FAST_LINKS, PROMPT, Bench, request_of, running_router
from tests.kit.waiting import until

COSTLY = (StepCost(1, 0, 0.2), StepCost(8, 0, 0.2))


def limits_of(**seats: float) -> RouterLimits:
    return RouterLimits(max_tree_nodes=32, seats=SeatLimits(**{"propose_seconds": 2.0, **seats}))


def shorten_deadlines(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let a verify worker have no more than this beside what its passes cost."""
    short = partial(StepDeadline, floor_seconds=seconds)
    monkeypatch.setattr(specinfer_router.verify_seat, "StepDeadline", short)


async def generate_all(bench: Bench, number: int, max_tokens: int = 40) -> list[list[str]]:
    """Run requests at once, check each one's tokens, and return why rounds had no guess."""
    seeds = range(number)
    results = await asyncio.gather(
        *(bench.generate(request_of(seed=seed, max_tokens=max_tokens)) for seed in seeds)
    )
    for seed, result in zip(seeds, results, strict=True):
        assert result.token_ids == continuation(PROMPT, max_tokens, seed=seed)
    return [result.reasons for result in results]


async def test_many_sessions_stop_asking_a_hung_drafter_after_one_deadline() -> None:
    async with running_router(limits=limits_of(propose_seconds=0.2)) as bench:
        drafter, link = bench.drafters[0], bench.cluster.drafters.links[0]
        drafter.gate.clear()
        await generate_all(bench, 8)
        assert link.breaker.state == "open"
        start = time.perf_counter()
        reasons = await generate_all(bench, 8)
        assert time.perf_counter() - start < 1.5
        assert {reason for each in reasons for reason in each} == {"circuit_open", "budget"}
        assert drafter.actions()["propose"] <= 8


async def test_a_drafter_that_recovers_is_probed_once_and_used_by_all() -> None:
    links = replace(FAST_LINKS, breaker=BreakerLimits(min_rest=0.01, max_rest=0.01))
    limits = limits_of(propose_seconds=0.1)
    async with running_router(limits=limits, links=links) as bench:
        drafter, link = bench.drafters[0], bench.cluster.drafters.links[0]
        drafter.gate.clear()
        await generate_all(bench, 4)
        assert link.breaker.state in ("open", "half-open")
        asked = drafter.actions()["propose"]
        # While the probe is on its way, nobody else asks.
        await generate_all(bench, 1, max_tokens=10)
        assert drafter.actions()["propose"] <= asked + 10
        drafter.gate.set()
        async with asyncio.timeout(10):
            while link.breaker.state != "closed":
                await generate_all(bench, 4)
        reasons = await generate_all(bench, 4)
        assert {reason for each in reasons for reason in each} <= {"", "budget", "no_guess"}


async def test_a_session_whose_drafter_rests_goes_to_another() -> None:
    drafters = [FakeDrafter(info_of("a"), fail=True), FakeDrafter(info_of("b"))]
    async with running_router(drafters=drafters) as bench:
        await generate_all(bench, 6, max_tokens=80)
        reasons = await generate_all(bench, 6, max_tokens=80)
        assert drafters[0].num_proposes < 20
        assert not {"circuit_open", "draft_error"} & {one for each in reasons for one in each}


@pytest.mark.parametrize("seed", range(6))
async def test_a_drafter_that_answers_nonsense_costs_no_token(seed: int) -> None:
    drafter = FakeDrafter(info_of("draft"), hostile=True)
    drafter.random.seed(seed)
    links = replace(FAST_LINKS, breaker=BreakerLimits(min_rest=0.001, max_rest=0.001))
    async with running_router(drafters=[drafter], links=links) as bench:
        await generate_all(bench, 4, max_tokens=80)
        assert drafter.num_proposes > 10


async def test_a_frame_too_large_from_a_drafter_costs_no_token() -> None:
    class Shouting(FakeDrafter):
        """Answers with more than a message may hold."""

        async def answer(self, item):  # type: ignore[no-untyped-def]
            result = await super().answer(item)
            if item.WhichOneof("action") == "propose":
                result.tree.scores.extend([0.5] * 5_000_000)
            return result

    async with running_router(drafters=[Shouting(info_of("draft"))]) as bench:
        await generate_all(bench, 1, max_tokens=60)


async def test_a_session_too_long_for_the_drafter_does_not_stop_others() -> None:
    links = replace(FAST_LINKS, max_frame_bytes=600)
    short = tuple(range(1, 20))
    async with running_router(links=links) as bench:
        link = bench.cluster.drafters.links[0]
        for _ in range(4):
            with pytest.raises(Exception, match="frame"):
                await bench.generate(request_of(token_ids=tuple(range(150, 350)) * 2))
        assert link.breaker.state == "closed"
        result = await bench.generate(request_of(token_ids=short))
        assert result.token_ids == continuation(short, 40, seed=3)


async def test_a_second_drafter_is_asked_when_the_first_is_slower_than_usual() -> None:
    drafters = [FakeDrafter(info_of(name)) for name in "ab"]
    async with running_router(drafters=drafters) as bench:
        for link in bench.cluster.drafters.links:
            for _ in range(32):
                link.answer_seconds.observe(0.01)
        tokens: list[int] = []
        first = drafters[0]
        async with aclosing(bench.router.generate(request_of(max_tokens=200))) as events:
            async for event in events:
                if isinstance(event, TokensEvent):
                    tokens += event.token_ids
                    if len(tokens) > 50:
                        first = next(one for one in drafters if one.num_proposes > 3)
                        first.gate.clear()
        assert tuple(tokens) == continuation(PROMPT, 200, seed=3)
        other = drafters[1 - drafters.index(first)]
        assert other.num_proposes > 3, "the session follows the one that was faster"
        assert [link.num_seats for link in bench.cluster.drafters.links] == [0, 0]
        first.gate.set()
        for drafter in drafters:
            await drafter.wait_for("close", 1)
            assert not drafter.sessions


async def test_hedges_stay_within_their_budget() -> None:
    drafters = [
        FakeDrafter(info_of(name), slow_actions=frozenset({"propose"}), slow_seconds=0.02)
        for name in "ab"
    ]
    async with running_router(drafters=drafters) as bench:
        for link in bench.cluster.drafters.links:
            for _ in range(128):
                link.answer_seconds.observe(0.001)
        result = await bench.generate(request_of(max_tokens=60))
        assert result.token_ids == continuation(PROMPT, 60, seed=3)
        asked = sum(drafter.num_proposes for drafter in drafters)
        assert asked <= len(result.rounds) + 4 + 0.1 * len(result.rounds) + 1
        assert asked > len(result.rounds) - 1


async def test_a_session_leaves_a_draining_verifier_for_another_between_two_rounds() -> None:
    workers = [FakeVerifier(info_of(name)) for name in "ab"]
    async with running_router(verifiers=workers, drafters=[]) as bench:
        tokens: list[int] = []
        left = workers[0]
        async with aclosing(bench.router.generate(request_of())) as events:
            async for event in events:
                if isinstance(event, TokensEvent):
                    tokens += event.token_ids
                    if len(tokens) == 10:
                        left = next(worker for worker in workers if worker.sessions)
                        left.draining = True
        assert tuple(tokens) == continuation(PROMPT, 40, seed=3)
        other = workers[1 - workers.index(left)]
        assert (left.num_steps, other.num_steps) == (11, 29)
        assert not left.sessions
        assert (left.actions()["open"], other.actions()["open"]) == (1, 1)
        for _ in range(3):
            await bench.generate(request_of())
        assert left.actions()["open"] == 1, "it takes no new session"


async def test_a_draining_verifier_that_is_the_last_one_keeps_its_sessions() -> None:
    async with running_router(drafters=[]) as bench:
        verifier = bench.verifiers[0]
        tokens: list[int] = []
        async for event in bench.router.generate(request_of()):
            if isinstance(event, TokensEvent):
                tokens += event.token_ids
                verifier.draining = True
        assert tuple(tokens) == continuation(PROMPT, 40, seed=3)
        assert verifier.actions()["open"] == 1


async def test_a_slow_verifier_that_is_the_last_one_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slow = FakeVerifier(info_of("slow"), slow_actions=frozenset({"step"}), slow_seconds=0.3)
    async with running_router(verifiers=[slow], drafters=[]) as bench:
        # As short as a deadline can be, so that every round misses it once.
        shorten_deadlines(monkeypatch, 0.1)
        await generate_all(bench, 1, max_tokens=5)
        assert slow.actions()["open"] == 1, "it keeps its session"
        assert slow.streams == 1


async def test_a_hung_verifier_is_found_by_a_deadline_from_its_own_cost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hanging, other = FakeVerifier(info_of("a")), FakeVerifier(info_of("b"))
    async with running_router(verifiers=[hanging, other], drafters=[]) as bench:
        shorten_deadlines(monkeypatch, 0.3)
        hanging.gate.clear()
        start = time.perf_counter()
        await generate_all(bench, 4)
        assert time.perf_counter() - start < 5.0
        link = bench.cluster.verifiers.links[0]
        assert link.breaker.state != "closed"
        assert hanging.num_steps == 0


async def test_what_a_costly_worker_takes_is_not_taken_for_hanging(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    costly = FakeVerifier(
        info_of("a", step_costs=COSTLY), slow_actions=frozenset({"step"}), slow_seconds=0.5
    )
    async with running_router(verifiers=[costly], drafters=[]) as bench:
        shorten_deadlines(monkeypatch, 0.1)
        await generate_all(bench, 1, max_tokens=3)
        assert bench.cluster.verifiers.links[0].breaker.state == "closed"


async def test_a_lost_lease_ends_the_stream_at_once() -> None:
    losing, other = FakeVerifier(info_of("a"), lose_at=3), FakeVerifier(info_of("b"), lose_at=1)
    async with running_router(verifiers=[losing, other], drafters=[]) as bench:
        with pytest.raises(LeaseLost):
            await bench.generate(request_of())
        assert losing.num_steps + other.num_steps <= 3, "it is not tried elsewhere"
        assert [link.num_seats for link in bench.cluster.verifiers.links] == [0, 0]


async def test_internal_errors_in_a_row_open_the_breaker_of_a_verifier() -> None:
    lying, honest = FakeVerifier(info_of("a"), lie="epoch"), FakeVerifier(info_of("b"))
    links = LinkLimits(min_backoff=0.01)
    async with running_router(verifiers=[lying, honest], drafters=[], links=links) as bench:
        for _ in range(6):
            await generate_all(bench, 2, max_tokens=4)
        assert bench.cluster.verifiers.links[0].breaker.state == "open"
        assert lying.num_steps == 3


@pytest.mark.parametrize("hook", ["open", "propose"])
async def test_a_probe_that_cannot_be_sent_does_not_keep_the_drafter_out(
    hook: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    links = replace(FAST_LINKS, breaker=BreakerLimits(min_rest=0.01, max_rest=0.01))
    async with running_router(limits=limits_of(), links=links) as bench:
        link = bench.cluster.drafters.links[0]
        link.breaker.fail(link.breaker.admit(), at_once=True)
        await until(lambda: link.breaker.state == "half-open", "the rest is over")

        def full(*arguments: object, **named: object) -> None:
            raise ResourceExhausted("too many items wait", retry_after=1.0)

        with monkeypatch.context() as patch:
            patch.setattr(link, hook, full)
            await generate_all(bench, 1, max_tokens=4)
        assert link.trusted
        (reasons,) = await generate_all(bench, 1)
        assert "" in reasons
        assert link.breaker.state == "closed"
