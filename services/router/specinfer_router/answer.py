"""An answer to come of a worker, and waiting for the first of some for so long and no longer.

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


class Answer(Generic[_Value]):
    """What an item ends with: a value or a typed error, set once. An error need not be looked at.

    One waits for it at a time; as many as like watch.

    Attributes:
        done: whether it is there.
        arrived: when it came, by time.monotonic(); which may be long before somebody waits for it.
    """

    __slots__ = ("_error", "_timer", "_value", "_waiter", "_watchers", "arrived", "done")

    def __init__(self) -> None:
        self.done = False
        self.arrived = 0.0
        self._value: _Value | None = None
        self._error: SpecinferError | None = None
        self._watchers: tuple[Callable[[], None], ...] = ()
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

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

    def wait_in(self, waiter: asyncio.Future[None], timer: asyncio.TimerHandle | None) -> None:
        """Set `waiter` when it comes, which it has not, and let `timer` be; one waits at a time."""
        assert self._waiter is None or self._waiter.done(), "somebody waits for it already"
        self._waiter, self._timer = waiter, timer

    def _end(self) -> None:
        self.done, self.arrived = True, time.monotonic()
        if self._timer is not None:
            self._timer.cancel()
        if self._waiter is not None:
            _wake(self._waiter)
        self._waiter = self._timer = None
        watchers, self._watchers = self._watchers, ()
        for tell in watchers:
            tell()


def first_answer(
    answers: Sequence[Answer[Any]], seconds: float | None = None
) -> asyncio.Future[None]:
    """What is there when one of `answers` is, or after `seconds`; none of them is given up.

    It may be cancelled at any time; nobody else waits for any of them meanwhile. A future and no
    coroutine, which would be two more to be resumed in every round.
    """
    loop = asyncio.get_running_loop()
    waiter: asyncio.Future[None] = loop.create_future()
    for answer in answers:
        if answer.done:
            waiter.set_result(None)
            return waiter
    timer = None if seconds is None else loop.call_later(max(0.0, seconds), _wake, waiter)
    for answer in answers:
        answer.wait_in(waiter, timer)
    return waiter


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
