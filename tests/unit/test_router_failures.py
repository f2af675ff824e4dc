"""Workers that die, hang, restart, lie or fill up: slower, never wrong, and nobody left waiting."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing

import pytest

from specinfer.errors import ResourceExhausted, Unavailable
from specinfer.messages import SpeculationOptions, TokensEvent
from specinfer_router.breaker import BreakerLimits
from specinfer_router.links import LinkLimits
from specinfer_router.opening import SeatLimits
from specinfer_router.router import RouterLimits
from tests.kit.fake_drafter import FakeDrafter
from tests.kit.fake_workers import FakeVerifier, continuation, info_of
from tests.kit.router import PROMPT, Bench, request_of, running_router


async def closed(bench: Bench, number: int = 1) -> None:
    """Wait until both tiers were told of so many closes, and check that they hold nothing."""
    for worker in (*bench.verifiers, *bench.drafters):
        await worker.wait_for("close", number)
        assert not worker.sessions


async def test_without_a_drafter_rounds_go_on_alone() -> None:
    async with running_router(drafters=[]) as bench:
        result = await bench.generate(request_of())
        assert result.token_ids == continuation(PROMPT, 40, seed=3)
        assert result.reasons == ["no_drafter"] * 39 + ["budget"]


@pytest.mark.parametrize("num_proposes", [0, 1, 5])
async def test_a_drafter_that_dies_in_mid_stream_costs_no_token(num_proposes: int) -> None:
    drafter = FakeDrafter(info_of("draft"), max_proposes=num_proposes)
    async with running_router(drafters=[drafter]) as bench:
        result = await bench.generate(request_of(max_tokens=80))
        assert result.token_ids == continuation(PROMPT, 80, seed=3)
        assert result.reasons.count("draft_error") == 1
        assert result.reasons[-2] == "no_drafter"


async def test_a_drafter_that_comes_back_is_used_again() -> None:
    drafter = FakeDrafter(info_of("draft"), max_proposes=2)
    async with running_router(drafters=[drafter]) as bench:
        first = await bench.generate(request_of())
        assert first.reasons[-2] == "no_drafter"
        drafter.max_proposes = 10**9
        await drafter.start()
        await bench.cluster.drafters.wait(seconds=10)
        second = await bench.generate(request_of())
        assert second.token_ids == first.token_ids
        assert set(second.reasons) <= {"", "budget"}


async def test_the_other_drafter_takes_over() -> None:
    drafters = [FakeDrafter(info_of("a"), max_proposes=3), FakeDrafter(info_of("b"))]
    async with running_router(drafters=drafters) as bench:
        result = await bench.generate(request_of(max_tokens=80))
        assert result.token_ids == continuation(PROMPT, 80, seed=3)
        assert "no_drafter" not in result.reasons
        assert drafters[1].num_proposes > 5


async def test_a_drafter_that_hangs_costs_one_deadline() -> None:
    limits = RouterLimits(max_tree_nodes=32, seats=SeatLimits(propose_seconds=0.2))
    async with running_router(limits=limits) as bench:
        bench.drafters[0].gate.clear()
        start = time.perf_counter()
        result = await bench.generate(request_of(max_tokens=30))
        seconds = time.perf_counter() - start
        assert result.token_ids == continuation(PROMPT, 30, seed=3)
        assert result.reasons == ["deadline"] * 29 + ["budget"]
        assert 0.2 <= seconds < 2.0
        assert bench.drafters[0].actions()["propose"] == 1


async def test_a_tree_that_comes_late_is_dropped_and_the_next_one_used() -> None:
    limits = RouterLimits(max_tree_nodes=32, seats=SeatLimits(propose_seconds=0.05))
    async with running_router(limits=limits) as bench:
        drafter = bench.drafters[0]
        drafter.gate.clear()
        tokens: list[int] = []
        reasons: list[str] = []
        async for event in bench.router.generate(request_of(max_tokens=300)):
            if isinstance(event, TokensEvent):
                tokens += event.token_ids
                reasons.append(event.round.root_only_reason)
                if len(reasons) == 5:
                    drafter.gate.set()
        assert tuple(tokens) == continuation(PROMPT, 300, seed=3)
        assert reasons[0] == "deadline"
        assert "" in reasons, "the drafter was used again"


async def test_a_drafter_that_always_fails_is_asked_less_and_less() -> None:
    drafter = FakeDrafter(info_of("draft"), fail=True)
    async with running_router(drafters=[drafter]) as bench:
        result = await bench.generate(request_of(max_tokens=100))
        assert result.token_ids == continuation(PROMPT, 100, seed=3)
        assert result.reasons.count("draft_error") == drafter.num_proposes == 3
        assert set(result.reasons) == {"draft_error", "circuit_open", "budget"}
        assert bench.cluster.drafters.links[0].breaker.state == "open"


@pytest.mark.parametrize("step", [1, 2, 6])
async def test_a_round_whose_verifier_died_is_run_again_elsewhere(step: int) -> None:
    dying = FakeVerifier(info_of("a"), break_steps=frozenset({step}))
    other = FakeVerifier(info_of("b"))
    async with running_router(verifiers=[dying, other]) as bench:
        result = await bench.generate(request_of(max_tokens=60))
        assert result.token_ids == continuation(PROMPT, 60, seed=3)
        assert (dying.num_steps, other.num_steps > 0) == (step, True)


async def test_of_a_group_that_died_with_its_verifier_no_token_is_lost_or_repeated() -> None:
    dying = FakeVerifier(info_of("a"), break_steps=frozenset({3}), most_plain_tokens=16)
    other = FakeVerifier(info_of("b"), most_plain_tokens=16)
    limits = RouterLimits(max_tree_nodes=32, seats=SeatLimits(plain_seconds=1000.0))
    off = SpeculationOptions(enabled=False)
    async with running_router(verifiers=[dying, other], limits=limits) as bench:
        result = await bench.generate(request_of(speculation=off))
        assert result.token_ids == continuation(PROMPT, 40, seed=3)
        # What died had drawn eight tokens that nobody saw; the next attempt asks for less.
        assert [len(event.token_ids) for event in result.rounds] == [1, 8, 1, 8, 8, 8, 6]
        assert (dying.num_steps, other.num_steps) == (3, 5)


async def test_a_verifier_restarted_in_mid_stream_goes_on_with_the_same_tokens() -> None:
    verifier = FakeVerifier(info_of("verify"))
    async with running_router(verifiers=[verifier]) as bench:
        tokens: list[int] = []
        async for event in bench.router.generate(request_of(max_tokens=200)):
            if isinstance(event, TokensEvent):
                tokens += event.token_ids
                if verifier.streams == 1 and len(tokens) > 30:
                    await verifier.kill()
                    await verifier.start()
        assert tuple(tokens) == continuation(PROMPT, 200, seed=3)
        assert verifier.streams >= 2
        assert verifier.actions()["open"] == 2


async def test_a_verifier_that_forgot_the_session_gets_it_again() -> None:
    verifier = FakeVerifier(info_of("verify"))
    async with running_router(verifiers=[verifier]) as bench:
        tokens: list[int] = []
        async for event in bench.router.generate(request_of(max_tokens=100)):
            if isinstance(event, TokensEvent):
                tokens += event.token_ids
                if len(tokens) < 50:
                    verifier.sessions.clear()
        assert tuple(tokens) == continuation(PROMPT, 100, seed=3)
        assert verifier.actions()["open"] > 2


async def test_with_no_verifier_left_the_user_is_told_to_retry() -> None:
    verifier = FakeVerifier(info_of("verify"), break_steps=frozenset({3}))
    limits = RouterLimits(seats=SeatLimits(failover_seconds=0.2))
    async with running_router(verifiers=[verifier], limits=limits) as bench:
        with pytest.raises(Unavailable) as gone:
            await bench.generate(request_of(request_id="mine"))
        assert gone.value.retryable
        assert gone.value.request_id == "mine"


async def test_a_verifier_that_hangs_is_given_up_for_another() -> None:
    hanging, other = FakeVerifier(info_of("a")), FakeVerifier(info_of("b"))
    hanging.gate.clear()
    limits = RouterLimits(seats=SeatLimits(step_seconds=0.2))
    async with running_router(verifiers=[hanging, other], limits=limits) as bench:
        result = await bench.generate(request_of())
        assert result.token_ids == continuation(PROMPT, 40, seed=3)
        assert other.num_steps > 0


async def test_a_verifier_that_hangs_costs_one_session_one_deadline() -> None:
    hanging, other = FakeVerifier(info_of("a")), FakeVerifier(info_of("b"))
    hanging.gate.clear()
    limits = RouterLimits(seats=SeatLimits(step_seconds=0.5))
    async with running_router(verifiers=[hanging, other], limits=limits) as bench:
        link, ready = bench.cluster.verifiers.links[0], asyncio.Event()
        link._on_ready = ready.set
        await bench.generate(request_of())
        async with asyncio.timeout(10):
            await ready.wait()
        assert link.ready
        assert bench.cluster.verifiers.choose() is bench.cluster.verifiers.links[1]
        second = await bench.generate(request_of())
        assert second.token_ids == continuation(PROMPT, 40, seed=3)
        assert hanging.actions()["step"] == 1
        assert bench.cluster.verifiers.choose(bench.cluster.verifiers.links[1]) is link


async def test_a_verifier_that_recovers_is_trusted_after_a_rest() -> None:
    hanging, other = FakeVerifier(info_of("a")), FakeVerifier(info_of("b"))
    hanging.gate.clear()
    limits = RouterLimits(seats=SeatLimits(step_seconds=0.2))
    links = LinkLimits(min_backoff=0.01, breaker=BreakerLimits(min_rest=0.001))
    async with running_router(verifiers=[hanging, other], limits=limits, links=links) as bench:
        link, ready = bench.cluster.verifiers.links[0], asyncio.Event()
        link._on_ready = ready.set
        await bench.generate(request_of())
        async with asyncio.timeout(10):
            await ready.wait()
        assert link.breaker.state == "half-open"
        hanging.gate.set()
        await bench.generate(request_of())
        assert hanging.num_steps > 0
        assert link.breaker.state == "closed"


@pytest.mark.parametrize("lie", ["tokens", "epoch", "path"])
async def test_results_that_make_no_sense_are_not_shown(lie: str) -> None:
    lying, honest = FakeVerifier(info_of("a"), lie=lie), FakeVerifier(info_of("b"))
    async with running_router(verifiers=[lying, honest]) as bench:
        result = await bench.generate(request_of())
        assert result.token_ids == continuation(PROMPT, 40, seed=3)
    async with running_router(verifiers=[FakeVerifier(info_of("a"), lie=lie)]) as bench:
        with pytest.raises(Unavailable):
            await bench.generate(request_of())


async def test_a_tree_that_the_verifier_refuses_is_replaced_by_its_root() -> None:
    verifier = FakeVerifier(info_of("verify"), max_step_nodes=3)
    async with running_router(verifiers=[verifier]) as bench:
        result = await bench.generate(request_of())
        assert result.token_ids == continuation(PROMPT, 40, seed=3)


async def test_a_full_verifier_sends_sessions_to_the_other_and_then_says_full() -> None:
    small = [FakeVerifier(info_of(name, max_sessions=1)) for name in "ab"]
    async with running_router(verifiers=small, drafters=[]) as bench:
        for worker in small:
            worker.sessions["somebody else's"] = None  # type: ignore[assignment]
        with pytest.raises(ResourceExhausted) as full:
            await bench.generate(request_of())
        assert full.value.retry_after
        small[1].sessions.clear()
        result = await bench.generate(request_of())
        assert result.token_ids == continuation(PROMPT, 40, seed=3)


@pytest.mark.parametrize("finish", ["whole", "left"])
async def test_sessions_are_closed_at_both_tiers(finish: str) -> None:
    async with running_router() as bench:
        session_id = ""
        async with aclosing(bench.router.generate(request_of(max_tokens=400))) as events:
            async for event in events:
                session_id = session_id or getattr(event, "session_id", "")
                if finish == "left" and isinstance(event, TokensEvent):
                    break
        await closed(bench)
        expected = "length" if finish == "whole" else "abandoned"
        assert (await bench.store.load(session_id)).finish_reason == expected
        steps = bench.verifiers[0].num_steps
        again = await bench.generate(request_of(max_tokens=1))
        assert bench.verifiers[0].num_steps == steps + len(again.rounds)


async def test_a_cancelled_round_that_hangs_is_given_up_at_once() -> None:
    async with running_router(drafters=[]) as bench:
        verifier = bench.verifiers[0]
        verifier.gate.clear()
        running = asyncio.create_task(bench.generate(request_of()))
        await verifier.wait_for("step", 1)
        running.cancel()
        async with asyncio.timeout(1):
            await asyncio.gather(running, return_exceptions=True)
        verifier.gate.set()
        await closed(bench)


async def test_a_reader_that_stalls_loses_its_session_and_holds_nobody_up() -> None:
    limits = RouterLimits(max_events=4, stall_seconds=0.2)
    async with running_router(limits=limits) as bench:
        slow = bench.router.generate(request_of(max_tokens=300))
        await anext(slow)
        quick = await bench.generate(request_of(max_tokens=60))
        assert quick.token_ids == continuation(PROMPT, 60, seed=3)
        await closed(bench, 2)
        with pytest.raises(ResourceExhausted, match="read"):
            async for _ in slow:
                pass


async def test_an_item_too_large_for_a_frame_fails_alone() -> None:
    links = LinkLimits(max_frame_bytes=600, min_backoff=0.01)
    prompt = tuple(range(150, 350)) * 2
    async with running_router(links=links) as bench:
        large, small = await asyncio.gather(
            bench.generate(request_of(token_ids=prompt)),
            bench.generate(request_of()),
            return_exceptions=True,
        )
        assert isinstance(large, Exception)
        assert "frame" in str(large)
        assert not isinstance(small, BaseException)
        assert small.token_ids == continuation(PROMPT, 40, seed=3)
        assert bench.verifiers[0].streams == 1
