"""Answers of workers: told at once, waited for by one, for so long and no longer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, TypeVarTuple

import pytest

from specinfer.errors import Unavailable
from specinfer.server import fastest_loop
from specinfer_router.answer import Answer, Patience, first_answer

_Arguments = TypeVarTuple("_Arguments")


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
    await first_answer(answers)
    assert [answer.done for answer in answers] == [False, True]
    await first_answer(answers)
    loop.call_soon(answers[0].succeed, 0)
    assert await answers[0] == 0


async def test_one_waits_at_a_time() -> None:
    answer = Answer[int]()
    first = first_answer((answer,))
    with pytest.raises(AssertionError, match="somebody waits"):
        first_answer((answer,))
    first.cancel()
    second = first_answer((answer,))
    answer.succeed(3)
    await second


async def test_a_wait_that_is_cancelled_leaves_nobody_behind() -> None:
    answer = Answer[int]()

    async def wait() -> None:
        await first_answer((answer,))

    waiting = asyncio.create_task(wait())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    answer.succeed(3)
    assert answer.result == 3


class FakeLoop(asyncio.SelectorEventLoop):
    """A loop whose clock stands still until it is moved, and which counts the timers set."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.timers: list[asyncio.TimerHandle] = []

    def time(self) -> float:
        return self.now

    def call_at(
        self,
        when: float,
        callback: Callable[[*_Arguments], object],
        *args: *_Arguments,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        timer = super().call_at(when, callback, *args, context=context)
        self.timers.append(timer)
        return timer

    async def pass_by(self, seconds: float) -> None:
        """Move the clock on, and let go off what is due."""
        self.now += seconds
        for _ in range(3):
            await asyncio.sleep(0)


def in_fake_time(test: Callable[[FakeLoop], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(loop_factory=FakeLoop) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, FakeLoop)
        runner.run(test(loop))


def test_a_wait_ends_in_time_and_not_before_and_the_answer_may_come_later() -> None:
    async def test(loop: FakeLoop) -> None:
        patience, answer = Patience(), Answer[int]()
        waiter = patience.first_answer((answer,), 5.0)
        await loop.pass_by(4.9)
        assert not waiter.done()
        await loop.pass_by(0.2)
        assert waiter.done()
        assert not answer.done
        answer.succeed(3)
        assert answer.result == 3

    in_fake_time(test)


def test_a_timer_serves_the_waits_after_its_own() -> None:
    async def test(loop: FakeLoop) -> None:
        patience = Patience()
        for _ in range(40):
            answer = Answer[int]()
            waiter = patience.first_answer((answer,), 5.0)
            answer.succeed(0)
            await waiter
            await loop.pass_by(0.1)
        assert len(loop.timers) == 1
        # It goes off while this one waits, at 5.0, and once more when that is over, at 9.0.
        late = patience.first_answer((Answer[int](),), 5.0)
        await loop.pass_by(1.5)
        assert not late.done()
        assert len(loop.timers) == 2
        await loop.pass_by(3.4)
        assert not late.done()
        await loop.pass_by(0.2)
        assert late.done()
        assert len(loop.timers) == 2

    in_fake_time(test)


def test_a_shorter_wait_is_not_kept_by_a_longer_one() -> None:
    async def test(loop: FakeLoop) -> None:
        patience, answer = Patience(), Answer[int]()
        long = patience.first_answer((answer,), 60.0)
        answer.succeed(0)
        await long
        short = patience.first_answer((Answer[int](),), 0.5)
        await loop.pass_by(0.6)
        assert short.done()
        assert [timer.cancelled() for timer in loop.timers] == [True, False]
        for seconds in (0.0, -1.0):
            at_once = patience.first_answer((Answer[int](),), seconds)
            await loop.pass_by(0.0)
            assert at_once.done()

    in_fake_time(test)


def test_a_timer_that_goes_off_between_two_waits_wakes_nobody() -> None:
    async def test(loop: FakeLoop) -> None:
        patience, answer = Patience(), Answer[int]()
        waiter = patience.first_answer((answer,), 1.0)
        waiter.cancel()
        await loop.pass_by(2.0)
        assert waiter.cancelled()
        again = patience.first_answer((answer,), 1.0)
        await loop.pass_by(0.5)
        assert not again.done()
        await loop.pass_by(0.6)
        assert again.done()

    in_fake_time(test)


def test_who_waits_no_more_leaves_no_timer() -> None:
    async def test(loop: FakeLoop) -> None:
        patience, answer = Patience(), Answer[int]()
        waiter = patience.first_answer((answer,), 60.0)
        answer.succeed(0)
        await waiter
        patience.close()
        patience.close()
        assert all(timer.cancelled() for timer in loop.timers)
        # As when a session moves to another worker.
        again = patience.first_answer((Answer[int](),), 70.0)
        await loop.pass_by(70.0)
        assert again.done()

    in_fake_time(test)


class CountedPatience(Patience):
    """Counts the timers that it sets."""

    num_set = 0

    def _set(self, waiter: asyncio.Future[None]) -> None:
        self.num_set += 1
        super()._set(waiter)


@pytest.mark.parametrize("loop_factory", [None, fastest_loop()])
def test_a_wait_that_runs_out_needs_one_timer_on_real_loops(
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None,
) -> None:
    """A loop whose clock is coarse lets timers go off a moment early."""

    async def test() -> int:
        patience = CountedPatience()
        for _ in range(40):
            await patience.first_answer((Answer[int](),), 0.0032)
        # So short that the loop makes no timer of it.
        patience.first_answer((answer := Answer[int](),), 0.0002)
        answer.succeed(0)
        await patience.first_answer((Answer[int](),), 0.002)
        return patience.num_set

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        assert runner.run(test()) <= 42
