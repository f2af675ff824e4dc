"""Which items of a link leave in one frame."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from specinfer.errors import InvalidRequest
from specinfer.outbox import FULL_FRAME, MAX_TURNS
from specinfer_router.crowd import CROWD
from specinfer_router.links import LinkLimits
from tests.kit.links import linked, open_on, step_on
from tests.kit.router import FAST_LINKS


async def test_items_of_one_turn_leave_in_one_frame() -> None:
    async with linked() as (worker, link):
        answers = []
        for number in range(20):
            answers += [open_on(link, f"s{number}"), step_on(link, f"s{number}")]
        await asyncio.gather(*answers)
        assert [len(frame) for frame in worker.frames] == [40]
        assert worker.frames[0][:3] == [("open", "s0"), ("step", "s0"), ("open", "s1")]


async def test_items_that_come_while_a_frame_is_out_share_the_next() -> None:
    async with linked() as (worker, link):
        worker.gate.clear()
        first = open_on(link, "a")
        await worker.wait_for("open", 1)
        later = [step_on(link, "a"), open_on(link, "b"), step_on(link, "b")]
        worker.gate.set()
        await asyncio.gather(first, *later)
        assert [len(frame) for frame in worker.frames] == [1, 3]


@pytest.mark.parametrize(
    ("num_seats", "turns", "frames"),
    [
        (CROWD + 1, [1, 1, 1], [3]),
        (CROWD, [1, 1, 1], [1, 2]),
        (CROWD + 1, [FULL_FRAME, 1], [FULL_FRAME, 1]),
        (CROWD + 1, [1] * 2 * MAX_TURNS, [MAX_TURNS + 1, MAX_TURNS - 1]),
    ],
    ids=["crowd", "few", "full", "many turns"],
)
async def test_in_a_crowd_items_of_a_few_turns_leave_in_one_frame(
    num_seats: int, turns: list[int], frames: list[int]
) -> None:
    async with linked() as (worker, link):
        await open_on(link, "first")
        link.num_seats = num_seats
        answers = []
        for turn, num_items in enumerate(turns):
            answers += [open_on(link, f"{turn}-{number}") for number in range(num_items)]
            await asyncio.sleep(0)
        await asyncio.gather(*answers)
        assert [len(frame) for frame in worker.frames[1:]] == frames


async def test_what_nobody_waits_for_goes_with_the_next_item_and_in_its_place() -> None:
    async with linked(replace(FAST_LINKS, patience_seconds=60.0)) as (worker, link):
        await open_on(link, "a")
        closing = link.forget("a", 0)
        for _ in range(5):  # turns in which it could leave alone
            await asyncio.sleep(0)
        await asyncio.gather(open_on(link, "a"), step_on(link, "a"), closing)
        assert worker.frames[1:] == [[("close", "a"), ("open", "a"), ("step", "a")]]
        stepping = step_on(link, "a")
        await asyncio.gather(link.forget("a", 2), stepping, return_exceptions=True)
        assert worker.frames[2:] == [[("step", "a"), ("close", "a")]]


async def test_what_nobody_waits_for_goes_alone_after_a_while() -> None:
    async with linked() as (worker, link):
        await open_on(link, "a")
        await link.forget("a", 0)
        assert worker.frames == [[("open", "a")], [("close", "a")]]


async def test_frames_are_bounded_in_items_and_bytes() -> None:
    async with linked(LinkLimits(max_frame_items=4, max_frame_bytes=500)) as (worker, link):
        await asyncio.gather(*(open_on(link, f"s{number}") for number in range(10)))
        assert [len(frame) for frame in worker.frames] == [4, 4, 2]
        await asyncio.gather(*(open_on(link, f"t{number}", 120) for number in range(4)))
        assert all(len(frame) <= 3 for frame in worker.frames[3:])
        with pytest.raises(InvalidRequest, match="frame"):
            open_on(link, "large", 400)
