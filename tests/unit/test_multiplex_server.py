"""The serving end of a shared stream: many calls side by side, each with a reader of its own."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable
from contextlib import suppress

import pytest

from specinfer.errors import InvalidRequest, NotFound
from specinfer.messages import (
    Finished,
)
from specinfer.multiplex.server import (
    CROWD,
    ITEMS_A_TURN,
    CallReader,
    SharedStreamLimits,
)
from specinfer.v1 import router_pb2
from tests.kit.shared_streams import FINISHED, Held, begin, leave, numbers, talking, tokens
from tests.kit.waiting import until

# Who is not woken waits for ever.
pytestmark = pytest.mark.timeout(30)


async def count_up(call: router_pb2.BeginCall, reader: CallReader) -> None:
    """As many tokens as the prompt has characters."""
    for number in range(len(call.generate.prompt)):
        await reader.room()
        reader.put(tokens(number))
        await asyncio.sleep(0)
    await reader.room()
    reader.put(FINISHED)


@pytest.mark.parametrize("seed", range(5))
async def test_each_call_tells_its_own_events_in_order_and_frames_hold_many(seed: int) -> None:
    chance = random.Random(seed)
    lengths = {call_id: chance.randrange(40) for call_id in range(1, 40)}
    async with talking(count_up) as peer:
        for call_id, length in lengths.items():
            peer.say(begin(call_id, "x" * length))
            if chance.random() < 0.5:
                await asyncio.sleep(0)
        peer.hang_up()
        await peer.task
    assert peer.failures == {}
    for call_id, length in lengths.items():
        assert numbers(peer.events[call_id]) == list(range(length))
        assert isinstance(peer.events[call_id][-1], Finished)
    assert len(peer.frames) < sum(lengths.values()) / 4


async def test_a_reader_without_room_holds_up_its_own_call_alone() -> None:
    async with talking(count_up) as peer:
        peer.say(begin(1, "x" * 30, room=3), begin(2, "x" * 30))
        await until(lambda: len(peer.events[2]) == 31, "the other call's end")
        assert numbers(peer.events[1]) == [0, 1, 2]
        peer.say(router_pb2.CallItem(call_id=1, room=4))
        await until(lambda: len(peer.events[1]) == 7, "what there is room for")
        await asyncio.sleep(0)
        assert numbers(peer.events[1]) == list(range(7))
        peer.say(*[router_pb2.CallItem(call_id=1, room=8)] * 4)
        await until(lambda: len(peer.events[1]) == 31, "the rest")


async def test_room_is_bounded_whatever_a_reader_says() -> None:
    async with talking(count_up, SharedStreamLimits(max_room=5)) as peer:
        peer.say(begin(1, "x" * 50, room=2**31))
        await until(lambda: len(peer.events[1]) == 5, "what there is room for")
        peer.say(*[router_pb2.CallItem(call_id=1, room=2**31)] * 2)
        await until(lambda: len(peer.events[1]) == 10, "what there is room for then")
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(peer.events[1]) == 10


async def test_a_call_that_is_left_ends_and_tells_nothing_more() -> None:
    held = Held()
    async with talking(held) as peer:
        peer.say(begin(1), begin(2))
        await until(lambda: len(peer.events) == 2, "both calls to begin")
        peer.say(leave(1), leave(7))
        await until(lambda: held.running == 1, "the call to end")
        peer.say(leave(2))
        peer.hang_up()
        await peer.task
    assert (held.running, peer.failures) == (0, {})


@pytest.mark.parametrize("seconds", [None, 0.02])
async def test_what_serves_a_call_cleans_up_however_often_it_is_given_up(
    seconds: float | None,
) -> None:
    begun, left, cleaning, cleaned = asyncio.Event(), asyncio.Event(), asyncio.Event(), list[int]()

    async def serve(call: router_pb2.BeginCall, reader: CallReader) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            cleaning.set()
            await left.wait()
            cleaned.append(1)

    async with talking(serve) as peer:
        peer.say(begin(1, seconds=seconds))
        await begun.wait()
        if seconds is None:
            peer.say(leave(1))
        await cleaning.wait()
        peer.say(leave(1), leave(1))
        await until(lambda: peer.said.empty(), "the leaves to be read")
        peer.task.cancel()
        await asyncio.sleep(0)
        left.set()
        await asyncio.wait([peer.task])
    assert cleaned == [1]


async def test_a_leave_is_heard_while_another_timeout_ends() -> None:
    unwinding, end = asyncio.Event(), asyncio.Event()

    async def serve(call: router_pb2.BeginCall, reader: CallReader) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(0):
                try:
                    await asyncio.Event().wait()
                finally:
                    unwinding.set()
                    await end.wait()
        await asyncio.Event().wait()

    async with talking(serve) as peer:
        peer.say(begin(1))
        await unwinding.wait()
        peer.say(leave(1))
        peer.hang_up()
        await until(peer.said.empty, "the leave to be read")
        end.set()
        await asyncio.wait([peer.task], timeout=10)
        assert peer.task.done()


async def test_what_serves_a_call_is_cancelled_by_somebody_else_and_the_reader_is_told() -> None:
    async def serve(call: router_pb2.BeginCall, reader: CallReader) -> None:
        raise asyncio.CancelledError

    async with talking(serve) as peer:
        peer.say(begin(1))
        await until(lambda: 1 in peer.failures, "the failure")
        assert peer.failures[1].code == "INTERNAL"


async def test_an_event_that_cannot_be_written_is_one_calls_alone() -> None:
    held = Held()

    async def serve(call: router_pb2.BeginCall, reader: CallReader) -> None:
        if call.generate.prompt:
            reader.put(tokens(-1))
        await held(call, reader)

    async with talking(serve) as peer:
        peer.say(begin(1), begin(2, "bad"))
        await until(lambda: bool(peer.failures), "the failure")
        await until(lambda: held.running == 1, "the call to end")
        assert (list(peer.failures), numbers(peer.events[1])) == ([2], [0])


@pytest.mark.parametrize(("num_calls", "num_frames"), [(CROWD, CROWD), (CROWD + 1, 2)])
async def test_in_a_crowd_events_wait_a_few_turns_for_each_other(
    num_calls: int, num_frames: int
) -> None:
    turn = asyncio.Event()

    async def serve(call: router_pb2.BeginCall, reader: CallReader) -> None:
        await turn.wait()
        # Each a turn later than the one before, as what workers answer comes.
        for _ in range(int(call.generate.prompt)):
            await asyncio.sleep(0)
        reader.put(tokens(0))
        await asyncio.Event().wait()

    async with talking(serve) as peer:
        peer.say(*(begin(at, str(at)) for at in range(num_calls)))
        await until(peer.said.empty, "the calls to begin")
        turn.set()
        await until(lambda: len(peer.events) == num_calls, "all events")
        assert len(peer.frames) == num_frames


async def test_a_frame_of_very_many_items_leaves_the_loop_to_others() -> None:
    turns, begun = 0, list[int]()

    async def others() -> None:
        nonlocal turns
        while not begun:
            turns += 1
            await asyncio.sleep(0)

    async def serve(call: router_pb2.BeginCall, reader: CallReader) -> None:
        begun.append(turns)

    async with talking(serve) as peer:
        peer.say(*[router_pb2.CallItem(call_id=9)] * 40 * ITEMS_A_TURN, begin(1))
        await others()
        assert begun[0] >= 40


async def test_a_peer_that_goes_takes_its_calls_along() -> None:
    held = Held()
    async with talking(held) as peer:
        peer.say(*map(begin, range(20)))
        await until(lambda: held.running == 20, "all calls to begin")
    assert held.running == 0


async def test_failures_are_told_and_faults_are_not_described() -> None:
    async def fail(call: router_pb2.BeginCall, reader: CallReader) -> None:
        prompt = call.generate.prompt
        if prompt == "unknown":
            error = NotFound("no such model", field="model", retry_after=2.5)
            error.request_id = "r-7"
            raise error
        if prompt == "broken":
            raise ValueError("a secret of ours")
        if prompt == "slow":
            raise TimeoutError
        reader.put(tokens(0))

    async with talking(fail) as peer:
        prompts = ("unknown", "broken", "slow", "unfinished")
        peer.say(*(begin(at, prompt) for at, prompt in enumerate(prompts)))
        peer.hang_up()
        await peer.task
    unknown = peer.failures[0]
    assert isinstance(unknown, NotFound)
    told = (unknown.message, unknown.field, unknown.retry_after, unknown.request_id)
    assert told == ("no such model", "model", 2.5, "r-7")
    assert [peer.failures[at].code for at in (1, 2, 3)] == ["INTERNAL"] * 3
    assert "secret" not in peer.failures[1].message
    assert "without its last event" in peer.failures[3].message


async def test_a_call_whose_time_is_up_is_cancelled_and_told_so() -> None:
    held = Held()
    async with talking(held) as peer:
        peer.say(begin(1, seconds=0.01), begin(2))
        await until(lambda: 1 in peer.failures, "the timeout")
        assert (peer.failures[1].code, held.running) == ("DEADLINE_EXCEEDED", 1)


@pytest.mark.parametrize(
    ("item", "code", "message"),
    [
        (begin(9), "RESOURCE_EXHAUSTED", "2 calls"),
        (begin(9, room=0), "INVALID_ARGUMENT", "room"),
        (begin(9, seconds=math.nan), "INVALID_ARGUMENT", "timeout_seconds"),
        (begin(9, seconds=math.inf), "INVALID_ARGUMENT", "timeout_seconds"),
    ],
)
async def test_what_cannot_be_begun_fails_by_itself(
    item: router_pb2.CallItem, code: str, message: str
) -> None:
    held, most = Held(), 2 if code == "RESOURCE_EXHAUSTED" else 3
    async with talking(held, SharedStreamLimits(max_calls=most)) as peer:
        peer.say(begin(1), begin(2), item)
        await until(lambda: 9 in peer.failures, "the refusal")
        assert peer.failures[9].code == code
        assert message in peer.failures[9].message
        assert held.running == 2


async def test_an_id_that_is_in_use_ends_the_stream_and_its_calls() -> None:
    held = Held()
    async with talking(held) as peer:
        peer.say(begin(1), begin(1))
        with pytest.raises(InvalidRequest, match="under way"):
            await peer.task
    assert held.running == 0


async def test_what_this_version_does_not_know_is_passed_over() -> None:
    async with talking(count_up) as peer:
        peer.say(router_pb2.CallItem(call_id=1), begin(2, "xx"), router_pb2.CallItem(call_id=2))
        peer.hang_up()
        await peer.task
    assert (numbers(peer.events[2]), peer.failures) == ([0, 1], {})


async def test_nothing_is_read_while_too_much_waits_to_be_sent() -> None:
    async with talking(count_up, SharedStreamLimits(max_unsent=4)) as peer:
        peer.reads.clear()
        for call_id in range(100):
            peer.say(begin(call_id, room=0))
        left = await settled(peer.said.qsize)
        assert left > 80
        peer.reads.set()
        await until(lambda: len(peer.failures) == 100, "all refusals")


async def settled(value: Callable[[], int]) -> int:
    """What a value is when many turns of the loop have not changed it."""
    before = -1
    while (now := value()) != before:
        before = now
        for _ in range(20):
            await asyncio.sleep(0)
    return now


async def test_a_frame_is_no_larger_than_it_may_be() -> None:
    async def talk(call: router_pb2.BeginCall, reader: CallReader) -> None:
        for number in range(8):
            reader.put(tokens(number, "x" * 400))
        reader.put(FINISHED)

    for limits in (
        SharedStreamLimits(max_frame_bytes=1000),
        SharedStreamLimits(max_frame_events=2),
    ):
        async with talking(talk, limits) as peer:
            peer.say(begin(1))
            peer.hang_up()
            await peer.task
        assert max(map(len, peer.frames)) <= 3
        assert 4 <= len(peer.frames) <= 5
        assert numbers(peer.events[1]) == list(range(8))
