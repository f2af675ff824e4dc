"""The session loop: speculation changes no token, and nothing a drafter does changes one either."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from specinfer.errors import StaleEpoch
from specinfer.messages import Finished, ShapeQuery, SpeculationOptions, Started, TokensEvent
from specinfer.sampling import StopConditions
from specinfer.step_curve import StepCurve
from specinfer_router import goodput
from specinfer_router.calibration import Acceptance, Calibration
from specinfer_router.goodput import AdaptiveShape
from specinfer_router.opening import SeatLimits
from specinfer_router.policy import PlainSpeed, StaticShape, TreeShapePolicy
from specinfer_router.router import RouterLimits
from specinfer_router.sequoia import TokenTable, expected_tokens
from tests.kit.fake_drafter import FakeDrafter
from tests.kit.fake_workers import EOS, FakeVerifier, continuation, info_of
from tests.kit.router import PROMPT, request_of, running_router

OFF = SpeculationOptions(enabled=False)


async def test_without_speculation_every_round_brings_one_token() -> None:
    async with running_router() as bench:
        plain = await bench.generate(request_of(speculation=OFF))
        assert plain.token_ids == continuation(PROMPT, 40, seed=3)
        assert plain.reasons == ["disabled"] * 40
        assert bench.drafters[0].frames == []
        assert plain.finished.reason == "length"
        assert plain.finished.speculation.root_only_reasons == (("disabled", 40),)


# However slow the machine, tokens come within it; eight at most.
TOGETHER = RouterLimits(
    max_tree_nodes=32, seats=SeatLimits(propose_seconds=2.0, plain_seconds=1000.0)
)


def adaptive(max_nodes: int, max_depth: int) -> AdaptiveShape:
    """A policy that knows no costs yet, and no larger trees."""
    return AdaptiveShape(ShapeQuery(max_nodes, max_depth), Calibration(StepCurve(())))


@pytest.mark.parametrize(
    ("policy", "speculation"),
    [
        (StaticShape(ShapeQuery(max_nodes=8, max_depth=5)), OFF),
        (StaticShape(ShapeQuery(max_nodes=8, max_depth=5)), SpeculationOptions(max_nodes=0)),
        (StaticShape(ShapeQuery(max_nodes=0, max_depth=5)), SpeculationOptions()),
        (adaptive(max_nodes=0, max_depth=5), SpeculationOptions()),
        (adaptive(max_nodes=8, max_depth=0), SpeculationOptions()),
    ],
)
async def test_where_nothing_is_ever_guessed_tokens_come_together(
    policy: TreeShapePolicy, speculation: SpeculationOptions
) -> None:
    verifier = FakeVerifier(info_of("verify"), most_plain_tokens=16)
    async with running_router(verifiers=[verifier], policy=policy, limits=TOGETHER) as bench:
        plain = await bench.generate(request_of(speculation=speculation))
        assert plain.token_ids == continuation(PROMPT, 40, seed=3)
        assert [len(event.token_ids) for event in plain.rounds] == [1, 8, 8, 8, 8, 7]


@pytest.mark.parametrize("policy", [StaticShape(ShapeQuery(8, 5)), adaptive(8, 5)])
def test_a_policy_that_may_guess_later_does_not_say_never(policy: TreeShapePolicy) -> None:
    """Control: a group of plain tokens would leave it no round to guess in."""
    assert not policy.never_guesses(SpeculationOptions())
    assert policy.never_guesses(OFF)


async def test_a_text_may_end_anywhere_within_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    observed: list[int] = []
    monkeypatch.setattr(PlainSpeed, "observe", lambda _, facts, num: observed.append(num))
    right = continuation(PROMPT, 40, seed=3)
    verifier = FakeVerifier(info_of("verify"), most_plain_tokens=16)
    async with running_router(verifiers=[verifier], limits=TOGETHER) as bench:
        for length in range(9, 19):
            by_length = request_of(max_tokens=length, speculation=OFF)
            assert right.index(right[length - 1]) == length - 1, "it ends nowhere before"
            stop = StopConditions(max_tokens=40, stop_token_ids=(right[length - 1],))
            for request, reason in ((by_length, "length"), (replace(by_length, stop=stop), "stop")):
                plain = await bench.generate(request)
                assert plain.token_ids == right[:length]
                assert plain.finished.reason == reason
                sizes = [len(event.token_ids) for event in plain.rounds]
                assert sizes == [1, *[8] * ((length - 2) // 8), (length - 2) % 8 + 1]
    assert set(observed) == {8}, "of a last group some tokens may have been dropped"


@pytest.mark.parametrize("seed", range(4))
async def test_speculation_changes_no_token_and_saves_rounds(seed: int) -> None:
    async with running_router() as bench:
        result = await bench.generate(request_of(seed=seed))
        assert result.token_ids == continuation(PROMPT, 40, seed=seed)
        summary = result.finished.speculation
        assert summary.num_rounds == len(result.rounds) < 30
        assert summary.num_accepted_tokens == sum(summary.num_accepted_tokens_per_pos) > 10
        assert summary.num_draft_tokens == sum(e.round.num_draft_tokens for e in result.rounds)
        assert sorted(summary.num_accepted_tokens_per_pos, reverse=True) == list(
            summary.num_accepted_tokens_per_pos
        )
        assert [event.round.epoch for event in result.rounds] == list(
            range(1, len(result.rounds) + 1)
        )


@pytest.mark.parametrize(
    "options",
    [
        SpeculationOptions(max_nodes=1),
        SpeculationOptions(max_nodes=31, max_depth=31),
        SpeculationOptions(widths=(3, 2, 1)),
        SpeculationOptions(max_nodes=0),
    ],
    ids=["one", "deep", "widths", "none"],
)
async def test_any_shape_gives_the_same_tokens(options: SpeculationOptions) -> None:
    async with running_router() as bench:
        result = await bench.generate(request_of(speculation=options))
        assert result.token_ids == continuation(PROMPT, 40, seed=3)
        asked = bench.drafters[0].shapes
        if options.widths:
            assert asked[0] == ShapeQuery(max_nodes=15, max_depth=3, widths=(3, 2, 1))
        elif options.max_nodes:
            assert asked[0].max_nodes == options.max_nodes
        else:
            assert set(result.reasons) == {"disabled"}, "no round of it will ever have a guess"


@pytest.mark.parametrize("seed", range(6))
async def test_a_hostile_drafter_is_slower_and_never_wrong(seed: int) -> None:
    drafter = FakeDrafter(info_of("draft"), hostile=True)
    drafter.random.seed(seed)
    async with running_router(drafters=[drafter]) as bench:
        result = await bench.generate(request_of(max_tokens=200, seed=seed))
        assert result.token_ids == continuation(PROMPT, 200, seed=seed)
        assert "draft_error" in result.reasons
        assert bench.verifiers[0].streams == 1, "no bad tree reached the verify tier"


async def test_an_adaptive_shape_gives_the_same_tokens() -> None:
    costs = info_of("verify").step_costs
    policy = AdaptiveShape(ShapeQuery(max_nodes=12, max_depth=6), Calibration(StepCurve(costs)))
    async with running_router(policy=policy) as bench:
        result = await bench.generate(request_of(max_tokens=120))
        assert result.token_ids == continuation(PROMPT, 120, seed=3)
        assert result.finished.speculation.num_accepted_tokens > 0


async def test_a_choice_is_among_trees_that_there_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = set[int]()

    def counted(acceptance: Acceptance, max_nodes: int, max_depth: int) -> TokenTable:
        sizes.add(max_nodes)
        return expected_tokens(acceptance, max_nodes, max_depth)

    monkeypatch.setattr(goodput, "expected_tokens", counted)
    policy = AdaptiveShape(ShapeQuery(max_nodes=12, max_depth=6), Calibration(StepCurve(())))
    async with running_router(policy=policy) as bench:
        options = SpeculationOptions(max_nodes=1023, max_depth=1023)
        result = await bench.generate(request_of(max_tokens=20, speculation=options))
        assert result.token_ids == continuation(PROMPT, 20, seed=3)
    assert sizes == {31}


async def test_no_tree_reaches_past_the_end() -> None:
    verifier = FakeVerifier(info_of("verify", max_model_len=48, num_blocks=3))
    drafter = FakeDrafter(info_of("draft"), skill=1.0)
    async with running_router(verifiers=[verifier], drafters=[drafter]) as bench:
        result = await bench.generate(request_of(max_tokens=None))
        assert result.token_ids == continuation(PROMPT, 28, seed=3)
        assert result.finished.reason == "length"
        for index, (event, shape) in enumerate(zip(result.rounds, drafter.shapes, strict=False)):
            assert shape.max_depth < 28 - event.offset, index
        assert verifier.num_rows[-1] == 1 or drafter.shapes[-1].max_depth >= 1


async def test_the_last_token_is_not_guessed_past() -> None:
    async with running_router() as bench:
        result = await bench.generate(request_of(max_tokens=1))
        assert result.reasons == ["budget"]
        assert len(result.token_ids) == 1


async def test_an_end_token_inside_an_accepted_path_ends_the_stream() -> None:
    for eos_at in range(5, 12):
        verifier = FakeVerifier(info_of("verify"), eos_at=eos_at)
        drafter = FakeDrafter(info_of("draft"), skill=1.0)
        async with running_router(verifiers=[verifier], drafters=[drafter]) as bench:
            result = await bench.generate(request_of())
            assert result.token_ids == (*continuation(PROMPT, eos_at, seed=3), EOS)
            assert result.finished.reason == "stop"


@pytest.mark.parametrize("enabled", [True, False])
async def test_a_stop_string_cuts_text_and_tokens_alike_in_both_modes(enabled: bool) -> None:
    drafter = FakeDrafter(info_of("draft"), skill=1.0)
    async with running_router(drafters=[drafter]) as bench:
        whole = await bench.generate(request_of(speculation=OFF))
        text = whole.text
        stop = text[len(text) // 2 : len(text) // 2 + 4]
        stopped = await bench.generate(
            request_of(stop=(stop,), speculation=SpeculationOptions(enabled=enabled))
        )
        assert stopped.text == text[: text.index(stop)]
        assert stopped.finished.stop_match == stop
        assert stopped.finished.reason == "stop"
        kept = len(stopped.token_ids)
        assert stopped.token_ids == whole.token_ids[:kept]
        shorter = "".join(event.text for event in whole.rounds[: kept - 1])
        assert stop not in shorter, "the token that completes the stop string is the last one"


async def test_logprobs_come_for_each_kept_token() -> None:
    async with running_router() as bench:
        result = await bench.generate(request_of(num_logprobs=2, max_tokens=11))
        for event in result.rounds:
            assert [entry.token_id for entry in event.logprobs] == list(event.token_ids)
            assert all(len(entry.top) == 2 for entry in event.logprobs)
        plain = await bench.generate(request_of(max_tokens=11))
        assert all(event.logprobs == () for event in plain.rounds)


async def test_sixteen_streams_at_once_give_what_each_gives_alone() -> None:
    drafters = [FakeDrafter(info_of(f"draft {n}")) for n in range(2)]
    verifiers = [FakeVerifier(info_of(f"verify {n}")) for n in range(2)]
    async with running_router(verifiers=verifiers, drafters=drafters) as bench:
        requests = [
            request_of(token_ids=PROMPT[: 3 + n], max_tokens=10 + 7 * n, seed=n) for n in range(16)
        ]
        results = await asyncio.gather(*(bench.generate(request) for request in requests))
        for number, result in enumerate(results):
            expected = continuation(PROMPT[: 3 + number], 10 + 7 * number, seed=number)
            assert result.token_ids == expected
        assert all(worker.actions()["open"] >= 4 for worker in (*verifiers, *drafters))


async def test_tokens_are_committed_before_they_are_shown() -> None:
    async with running_router() as bench:
        shown: list[int] = []
        session_id = ""
        async for event in bench.router.generate(request_of()):
            if isinstance(event, Started):
                session_id = event.session_id
            if isinstance(event, TokensEvent):
                shown += event.token_ids
                kept = (await bench.store.load(session_id)).token_ids[len(PROMPT) :]
                assert list(kept[: len(shown)]) == shown
        record = await bench.store.load(session_id)
        assert record.token_ids == PROMPT + continuation(PROMPT, 40, seed=3)
        assert record.finish_reason == "length"


async def test_a_session_that_was_taken_over_elsewhere_ends_with_its_id() -> None:
    async with running_router() as bench:

        async def lose_at_once() -> None:
            async for event in bench.router.generate(request_of(request_id="mine")):
                if isinstance(event, Started):
                    await bench.store.claim(event.session_id)

        with pytest.raises(StaleEpoch, match="taken over") as stale:
            await lose_at_once()
        assert stale.value.request_id == "mine"


async def test_a_session_that_is_cancelled_elsewhere_ends_as_cancelled() -> None:
    async with running_router() as bench:
        events = []
        async for event in bench.router.generate(request_of(max_tokens=300)):
            events.append(event)
            if isinstance(event, Started):
                await bench.router.cancel(event.session_id)
        finished = events[-1]
        assert isinstance(finished, Finished)
        assert finished.reason == "cancelled"
        assert finished.usage.num_completion_tokens < 300


async def test_a_drafter_with_nothing_to_say_is_plain_decoding() -> None:
    policy = StaticShape(ShapeQuery(max_nodes=4, max_depth=4))
    drafter = FakeDrafter(info_of("draft"), skill=0.0)
    limits = RouterLimits(max_tree_nodes=32, seats=SeatLimits(propose_seconds=2.0))
    async with running_router(drafters=[drafter], policy=policy, limits=limits) as bench:
        result = await bench.generate(request_of(max_tokens=12))
        assert result.token_ids == continuation(PROMPT, 12, seed=3)
