"""When a failed call is tried again, how long to wait first, and when to give up.

This module decides on our errors and on time alone; it knows nothing of channels or requests.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass

from specinfer.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ReaderStalled,
    ResourceExhausted,
    RouterLeaving,
    SpecinferError,
    Unavailable,
)

# A router that restarts is asked this often whether it is back.
HANDOVER_BACKOFF_SECONDS = 0.5


@dataclass(frozen=True)
class RetryPolicy:
    """Exponential backoff with jitter, for errors that a later call may not meet.

    `Unavailable` is retried, `ReaderStalled`, and `ResourceExhausted` when the server said how long
    to wait. A stream that breaks before its first token is asked for again; afterwards it is
    resumed at its offset, so that no token comes twice. Tokens that arrive make the count start
    anew.

    Attributes:
        max_attempts: attempts in all, at least 1; 1 never retries. One attempt asks each of the
            client's routers at most once, without waiting between them.
        initial_backoff: seconds before the second attempt.
        multiplier: growth of the wait from one attempt to the next, at least 1.
        max_backoff: longest wait in seconds; a server's `retry_after` may be longer.
        jitter: share of each wait that is random, from 0 to 1.
        handover: seconds for which another router, or the same one restarted, is looked for when a
            router shuts down, whatever `max_attempts`; 0 does without, and so does a policy that
            never retries: their streams have to finish before the router ends.
        regenerate: when the store has lost a stream's session, make the same request again with the
            same seed and go on after the tokens that are there.

    Raises:
        InvalidRequest: naming the field that is out of its range.
    """

    max_attempts: int = 4
    initial_backoff: float = 0.1
    multiplier: float = 2.0
    max_backoff: float = 5.0
    jitter: float = 0.2
    handover: float = 60.0
    regenerate: bool = True

    def __post_init__(self) -> None:
        bounds = {
            "max_attempts": (self.max_attempts, 1, 100),
            "initial_backoff": (self.initial_backoff, 0, 60),
            "multiplier": (self.multiplier, 1, 10),
            "max_backoff": (self.max_backoff, 0, 600),
            "jitter": (self.jitter, 0, 1),
            "handover": (self.handover, 0, 3600),
        }
        for name, (value, low, high) in bounds.items():
            if not low <= value <= high:
                raise InvalidRequest(
                    f"retry.{name} is between {low} and {high}, got {value}", field=f"retry.{name}"
                )

    @property
    def hands_over(self) -> bool:
        """Whether a stream goes on elsewhere when its router shuts down."""
        return self.max_attempts > 1 and self.handover > 0

    def wait_after(
        self, attempt: int, error: SpecinferError, chance: random.Random
    ) -> float | None:
        """Seconds to wait after failed attempt number `attempt` (from 1); None gives up."""
        if attempt >= self.max_attempts or not self.covers(error):
            return None
        return max(self.backoff(attempt, chance), error.retry_after or 0.0)

    def backoff(self, attempt: int, chance: random.Random) -> float:
        """Seconds to wait after failed attempt number `attempt` (from 1), with jitter."""
        # Far more attempts than 64 change nothing but overflow.
        growth = self.multiplier ** min(attempt - 1, 64)
        wait = min(self.max_backoff, self.initial_backoff * growth)
        return wait * (1.0 + self.jitter * (2.0 * chance.random() - 1.0))

    @staticmethod
    def covers(error: SpecinferError) -> bool:
        """Whether this kind of error is worth another call."""
        if isinstance(error, ResourceExhausted) and not isinstance(error, ReaderStalled):
            return error.retry_after is not None
        return isinstance(error, Unavailable | ReaderStalled)


class Attempts:
    """The calls made for one request, under one deadline.

    Attributes:
        number: of the attempt under way, from 1; progress sets it back.
    """

    def __init__(self, policy: RetryPolicy, timeout: float | None, chance: random.Random) -> None:
        """Start the clock; `timeout` is in seconds, None has no deadline."""
        self.number = 1
        self._policy = policy
        self._chance = chance
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._moves = 0
        self._renewed = False
        self._handover_ends: float | None = None

    def remaining(self) -> float | None:
        """Seconds left for the next call, or None without a deadline; raises DeadlineExceeded."""
        if self._deadline is None:
            return None
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded("the timeout passed before the call could be made")
        return left

    def progress(self) -> None:
        """Something arrived: what fails from now on is a new trouble."""
        self.number = 1
        self._moves = 0
        self._renewed = False
        self._handover_ends = None

    def renew(self) -> bool:
        """Whether a refused token may be replaced: once, until there is progress."""
        renewed, self._renewed = self._renewed, True
        return not renewed

    async def wait_or_raise(self, error: SpecinferError, num_others: int = 0) -> None:
        """Sleep until the next call is due; raises `error` when there is to be none.

        A wait that would not end before the deadline is not begun: the error says more than a
        timeout would. The `num_others` further routers are asked at once, without a wait.
        """
        if isinstance(error, RouterLeaving) and self._handover_ends is None:
            self._handover_ends = time.monotonic() + self._policy.handover
        if isinstance(error, Unavailable) and self._moves < num_others:
            self._moves += 1
            return
        wait = self._wait_after(error)
        left = None if self._deadline is None else self._deadline - time.monotonic()
        if wait is None or (left is not None and wait >= left):
            raise error
        await asyncio.sleep(wait)
        self.number += 1
        self._moves = 0

    def _wait_after(self, error: SpecinferError) -> float | None:
        """Seconds to wait after an error; None gives up."""
        handing_over = self._policy.hands_over and self._handover_ends is not None
        if not handing_over or not isinstance(error, Unavailable):
            return self._policy.wait_after(self.number, error, self._chance)
        assert self._handover_ends is not None
        wait = min(HANDOVER_BACKOFF_SECONDS, self._policy.backoff(self.number, self._chance))
        return wait if time.monotonic() + wait < self._handover_ends else None
