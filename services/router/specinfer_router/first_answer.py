"""Waiting for the first of some answers, for so long and no longer.

What `asyncio.wait` does, for the twice in every round that it is needed: without its sets, its
checks and a task's wake-up for each future. This module knows nothing of what is answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any


async def first_answer(answers: Sequence[asyncio.Future[Any]], seconds: float) -> None:
    """Return when one of `answers` is done, or after `seconds`; none of them is cancelled."""
    if any(answer.done() for answer in answers):
        return
    loop = asyncio.get_running_loop()
    waiter: asyncio.Future[None] = loop.create_future()

    def wake(_: object = None) -> None:
        if not waiter.done():
            waiter.set_result(None)

    timer = loop.call_later(max(0.0, seconds), wake)
    for answer in answers:
        answer.add_done_callback(wake)
    try:
        await waiter
    finally:
        timer.cancel()
        for answer in answers:
            answer.remove_done_callback(wake)
