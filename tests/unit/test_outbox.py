"""The outbox of a stream: batches, bounds, and frames that a peer accepts."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass

import pytest

from specinfer.outbox import Outbox, split_frames


@dataclass(frozen=True)
class Parcel:
    """Something with a size."""

    size: int

    def ByteSize(self) -> int:
        return self.size


async def test_results_that_are_ready_together_leave_together() -> None:
    outbox = Outbox[int](max_unanswered=100, max_batch=64)
    for _ in range(70):
        await outbox.expect_one()

    def put_all() -> None:
        for number in range(70):
            outbox.put(number)

    thread = threading.Thread(target=put_all)
    thread.start()
    thread.join()
    outbox.close()
    assert [len(batch) async for batch in outbox.batches()] == [64, 6]


async def test_an_outbox_holds_back_a_peer_that_only_sends() -> None:
    outbox = Outbox[int](max_unanswered=2, max_batch=1)
    for _ in range(2):
        await outbox.expect_one()
    third = asyncio.ensure_future(outbox.expect_one())
    outbox.put(1)
    outbox.put(2)
    await asyncio.sleep(0)
    assert not third.done()
    batches = outbox.batches()
    assert await anext(batches) == [1]
    assert await anext(batches) == [2]
    await third
    outbox.close()
    outbox.put(3)
    assert await anext(batches) == [3]
    with pytest.raises(StopAsyncIteration):
        await anext(batches)


@pytest.mark.parametrize(
    ("sizes", "frames"),
    [
        ([], []),
        ([4, 6, 1], [[4, 6], [1]]),
        ([10, 10], [[10], [10]]),
        ([3, 50, 3, 3], [[3], [50], [3, 3]]),
    ],
)
def test_frames_are_bounded_by_bytes(sizes: list[int], frames: list[list[int]]) -> None:
    split = split_frames(map(Parcel, sizes), max_bytes=10)
    assert [[parcel.size for parcel in frame] for frame in split] == frames
