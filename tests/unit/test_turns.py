"""Items in order within a session, sessions independent of each other."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from specinfer.turns import Turns

Item = tuple[str, int]


class Handler:
    """Items 10 and 20 wait for the gate; all are noted when they are done."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.begun: list[Item] = []
        self.done: list[Item] = []

    def __call__(self, item: Item) -> Coroutine[Any, Any, None] | None:
        if item[1] in (10, 20):
            return self._slowly(item)
        self.done.append(item)
        return None

    async def _slowly(self, item: Item) -> None:
        self.begun.append(item)
        await self.gate.wait()
        self.done.append(item)


def put_all(turns: Turns[Item], *items: Item) -> None:
    for item in items:
        turns.put(item[0], item)


async def test_an_item_waits_for_the_one_before_it_and_for_no_other_session() -> None:
    handler = Handler()
    turns = Turns[Item](handler)
    put_all(turns, ("a", 1), ("a", 10), ("a", 2), ("b", 3), ("a", 20), ("a", 4), ("b", 5))
    assert handler.done == [("a", 1), ("b", 3), ("b", 5)]
    handler.gate.set()
    await turns.finish()
    assert handler.done[3:] == [("a", 10), ("a", 2), ("a", 20), ("a", 4)]
    turns.put("a", ("a", 6))
    assert handler.done[-1] == ("a", 6), "nothing is left to wait for"


async def test_finish_waits_for_what_comes_meanwhile() -> None:
    handler = Handler()
    turns = Turns[Item](handler)
    await turns.finish()
    put_all(turns, ("a", 10))
    finishing = asyncio.create_task(turns.finish())
    await asyncio.sleep(0)
    put_all(turns, ("b", 20))
    assert not finishing.done()
    handler.gate.set()
    await finishing
    assert sorted(handler.done) == [("a", 10), ("b", 20)]


async def test_after_a_cancel_nothing_is_handled() -> None:
    handler = Handler()
    turns = Turns[Item](handler)
    put_all(turns, ("a", 10), ("a", 1))
    await asyncio.sleep(0)
    assert handler.begun == [("a", 10)]
    handler.gate.set()
    turns.cancel()
    await turns.finish()
    assert handler.done == []
