"""A task that is told to end has ended afterwards, also where a cancellation was dropped."""

from __future__ import annotations

import asyncio

from specinfer.tasks import end_task


async def test_a_dropped_cancellation_is_repeated() -> None:
    num_dropped = 0

    async def drops_one() -> None:
        nonlocal num_dropped
        while True:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                if num_dropped:
                    raise
                num_dropped += 1

    task = asyncio.create_task(drops_one())
    await asyncio.sleep(0)
    await end_task(task)
    assert task.cancelled()
    assert num_dropped == 1


async def test_what_a_task_raised_is_nobodys_surprise() -> None:
    async def fails() -> None:
        raise ValueError("of its own")

    task = asyncio.create_task(fails())
    await asyncio.wait([task])
    await end_task(task)
    await end_task(None)
    assert isinstance(task.exception(), ValueError)
