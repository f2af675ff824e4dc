"""An answer to come of a worker, and who waits for the first of some, for so long and no longer.

What an `asyncio.Future` does for the one task that waits, without a turn of the event loop for each
who is told: they are told at once, by whoever brings the answer. A round needs this two times. This
module knows nothing of what is answered.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any, Generic, TypeVar, cast

from specinfer.errors import SpecinferError

_Value = TypeVar("_Value")

# What is left of a wait whose timer has gone off and is over all the same: loops round to this.
TICK_SECONDS = 0.001


class Answer(Generic[_Value]):
    """What an item ends with: a value or a typed error, set once. An error need not be looked at.

    One waits for it at a time; as many as like watch.

    Attributes:
        done: whether it is there.
        arrived: when it came, by time.monotonic(); which may be long before somebody waits for it.
    """

    __slots__ = ("_error", "_value", "_waiter", "_watchers", "arrived", "done")

    def __init__(self) -> None:
        self.done = False
        self.arrived = 0.0
        self._value: _Value | None = None
        self._error: SpecinferError | None = None
        self._watchers: tuple[Callable[[], None], ...] = ()
        self._waiter: asyncio.Future[None] | None = None

    @property
    def failed(self) -> bool:
        """Whether it is there and an error."""
        return self._error is not None

    @property
    def result(self) -> _Value:
        """The value, once it is there; raises the error."""
        if self._error is not None:
            raise self._error
        return cast(_Value, self._value)

    def succeed(self, value: _Value) -> None:
        """Bring the value."""
        self._value = value
        self._end()

    def fail(self, error: SpecinferError) -> None:
        """Bring an error."""
        self._error = error
        self._end()

    def watch(self, tell: Callable[[], None]) -> None:
        """Call `tell` when it comes, or now if it is there; it must not raise."""
        if self.done:
            tell()
        else:
            self._watchers += (tell,)

    def __await__(self) -> Generator[Any, None, _Value]:
        """Wait for as long as it takes."""
        if not self.done:
            yield from first_answer((self,)).__await__()
        return self.result

    def wait_in(self, waiter: asyncio.Future[None]) -> None:
        """Set `waiter` when it comes, which it has not; one waits at a time."""
        assert self._waiter is None or self._waiter.done(), "somebody waits for it already"
        self._waiter = waiter

    def _end(self) -> None:
        self.done, self.arrived = True, time.monotonic()
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
        watchers, self._watchers = self._watchers, ()
        for tell in watchers:
            tell()


def first_answer(answers: Sequence[Answer[Any]]) -> asyncio.Future[None]:
    """What is there when one of `answers` is; none of them is given up.

    It may be cancelled at any time; nobody else waits for any of them meanwhile. A future and no
    coroutine, which would be two more to be resumed in every round.
    """
    waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    for answer in answers:
        if answer.done:
            waiter.set_result(None)
            return waiter
    for answer in answers:
        answer.wait_in(waiter)
    return waiter


class Patience:
    """For how long someone waits who waits for one answer after the other.

    A timer costs as much as the rest of a wait, and nearly every wait ends before its own would: so
    one is left to go off, and set anew then for whatever is being waited for. Whoever waits no more
    closes it.
    """

    __slots__ = ("_due", "_timer", "_until", "_waiter")

    def __init__(self) -> None:
        self._timer: asyncio.TimerHandle | None = None
        self._waiter: asyncio.Future[None] | None = None
        # When the wait is over and when the timer goes off, by the loop's clock.
        self._until = self._due = 0.0

    def first_answer(self, answers: Sequence[Answer[Any]], seconds: float) -> asyncio.Future[None]:
        """As the function of that name, or after `seconds`; the wait before is over by now."""
        waiter = first_answer(answers)
        if not waiter.done():
            self._waiter, self._until = waiter, waiter.get_loop().time() + seconds
            if self._timer is None or self._until < self._due:
                self._set(waiter)
        return waiter

    def close(self) -> None:
        """Set no timer before the next wait; one that is going on has no limit any more."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._waiter = None

    def _set(self, waiter: asyncio.Future[None]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._due = self._until
        self._timer = waiter.get_loop().call_at(self._due, self._go_off)

    def _go_off(self) -> None:
        waiter, self._timer = self._waiter, None
        if waiter is None or waiter.done():
            return
        if self._until - waiter.get_loop().time() >= TICK_SECONDS:
            self._set(waiter)
        else:
            waiter.set_result(None)
