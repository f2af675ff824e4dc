"""Answers of workers: told at once, waited for by one, for so long and no longer."""

from __future__ import annotations

import asyncio
import weakref

import pytest

from specinfer.errors import Unavailable
from specinfer_router.answer import Answer, first_answer


def test_who_watches_is_told_in_the_same_turn() -> None:
    answer, told = Answer[int](), []
    answer.watch(lambda: told.append("first"))
    answer.succeed(7)
    answer.watch(lambda: told.append("late"))
    assert told == ["first", "late"]
    assert (answer.done, answer.failed, answer.result) == (True, False, 7)
    assert answer.arrived > 0


async def test_an_error_is_raised_as_often_as_it_is_asked_for() -> None:
    answer = Answer[int]()
    asyncio.get_running_loop().call_soon(answer.fail, Unavailable("gone"))
    with pytest.raises(Unavailable):
        await answer
    with pytest.raises(Unavailable):
        _ = answer.result


async def test_the_first_of_several_ends_the_wait_and_the_others_live_on() -> None:
    answers = [Answer[int](), Answer[int]()]
    loop = asyncio.get_running_loop()
    loop.call_soon(answers[1].succeed, 1)
    await first_answer(answers, 60.0)
    assert [answer.done for answer in answers] == [False, True]
    await first_answer(answers, 60.0)
    loop.call_soon(answers[0].succeed, 0)
    assert await answers[0] == 0


async def test_a_wait_ends_in_time_and_the_answer_may_come_later() -> None:
    answer = Answer[int]()
    await first_answer((answer,), 0.0)
    assert not answer.done
    answer.succeed(3)
    assert answer.result == 3


async def test_an_answer_ends_the_timer_of_whoever_waits() -> None:
    answer = Answer[int]()
    waiter = first_answer((answer,), 60.0)
    answer.succeed(3)
    await waiter
    # A timer that goes on would keep what it is to wake.
    left = weakref.ref(waiter)
    del waiter
    assert left() is None


async def test_one_waits_at_a_time() -> None:
    answer = Answer[int]()
    first = first_answer((answer,), 60.0)
    with pytest.raises(AssertionError, match="somebody waits"):
        first_answer((answer,), 60.0)
    first.cancel()
    second = first_answer((answer,), 60.0)
    answer.succeed(3)
    await second


async def test_a_wait_that_is_cancelled_leaves_nobody_behind() -> None:
    answer = Answer[int]()

    async def wait() -> None:
        await first_answer((answer,), 60.0)

    waiting = asyncio.create_task(wait())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    answer.succeed(3)
    assert answer.result == 3
