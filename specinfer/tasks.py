"""How a task that runs on until it is told to end is ended. Knows nothing of what tasks do."""

from __future__ import annotations

import asyncio

_AGAIN_SECONDS = 0.5


async def end_task(task: asyncio.Task[None] | None) -> None:
    """Cancel a task and return when it has ended, whatever it raised; None has ended already.

    One cancellation is not always enough: `asyncio.wait_for` of Python 3.11, which Redis's client
    sends with, drops one that comes when what it waits for is just done.
    """
    while task is not None and not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=_AGAIN_SECONDS)
    if task is not None and not task.cancelled():
        task.exception()  # seen: nobody else asks for it
