"""Who may start now, who waits and who is turned away: a bounded queue, fair between keys.

Among those that wait, higher priority goes first; within a priority the key with the fewest
running requests, of these the one served longest ago; within a key the first come. When the queue
is full, a newcomer may take the place of the newest request of lower priority, or of the key that
holds the most of the queue, so that no key can fill it. One event loop uses this, without locks.
This module knows nothing of HTTP, gRPC, sessions or what is generated.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from specinfer.errors import (
    DeadlineExceeded,
    InvalidRequest,
    PermissionDenied,
    ResourceExhausted,
    RouterLeaving,
    SpecinferError,
)
from specinfer_router.access import Caller, KeyLimits
from specinfer_router.rates import DrainRate, MinuteBucket

_DRAINING = "this router is shutting down; another will take the request"


@dataclass(frozen=True)
class AdmissionLimits:
    """Bounds of what is taken on.

    Attributes:
        max_streams: most requests in progress at once.
        max_waiting: most requests that wait for a place; 0 lets none wait.
        max_wait_seconds: longest wait, whatever the caller's own deadline.
        max_keys: keys whose use is remembered; those idle the longest are forgotten first.
    """

    max_streams: int = 256
    max_waiting: int = 1024
    max_wait_seconds: float = 60.0
    max_keys: int = 10_000

    def __post_init__(self) -> None:
        for name, least in (("max_streams", 1), ("max_waiting", 0), ("max_keys", 1)):
            if getattr(self, name) < least:
                raise InvalidRequest(f"{name} is at least {least}", field=name)
        if not 0 < self.max_wait_seconds < float("inf"):
            raise InvalidRequest("max_wait_seconds is more than 0", field="max_wait_seconds")


@dataclass
class _KeyUse:
    """What one key has in progress and has used of its allowances."""

    num_running: int = 0
    num_waiting: int = 0
    last_served: int = 0
    requests: MinuteBucket | None = None
    tokens: MinuteBucket | None = None
    drain: DrainRate = field(default_factory=DrainRate)

    @property
    def num_held(self) -> int:
        return self.num_running + self.num_waiting


@dataclass(eq=False)
class _Waiter:
    caller: Caller
    priority: int
    use: _KeyUse
    deadline: float
    turn: asyncio.Future[None]


class Ticket:
    """A place that a request holds.

    Attributes:
        queue_seconds: how long it waited for the place.
    """

    def __init__(self, caller: Caller, use: _KeyUse, queue_seconds: float, now: float) -> None:
        self.queue_seconds = queue_seconds
        self._per_minute = caller.limits.tokens_per_minute
        self._use = use
        self._now = now

    def spend(self, num_tokens: int) -> None:
        """Count tokens, of the prompt or generated, against the key's tokens a minute."""
        if self._per_minute is None:
            return
        if self._use.tokens is None:
            self._use.tokens = MinuteBucket(float(self._per_minute), self._now)
        self._use.tokens.take(num_tokens)


class Admission:
    """The one door of a router.

    Attributes:
        refusals: requests turned away so far, by reason.
    """

    def __init__(
        self, limits: AdmissionLimits | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limits = limits or AdmissionLimits()
        self._clock = clock
        self._uses: OrderedDict[str, _KeyUse] = OrderedDict()
        # By priority, then by key; empty ones are removed.
        self._queues: dict[int, dict[str, deque[_Waiter]]] = {}
        self._num_running = 0
        self._num_waiting = 0
        self._num_served = 0
        self._num_refused = 0
        self.refusals: Counter[str] = Counter()
        self._drain_rate = DrainRate()
        self._closed = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_running(self) -> int:
        """Requests that hold a place."""
        return self._num_running

    @property
    def num_waiting(self) -> int:
        """Requests that wait for one."""
        return self._num_waiting

    @property
    def num_keys(self) -> int:
        """Keys whose use is remembered."""
        return len(self._uses)

    @property
    def draining(self) -> bool:
        """Whether nobody is let in any more."""
        return self._closed

    def most_held(self, limits: KeyLimits) -> int:
        """Requests of one key that could ever run and wait here together."""
        bounds = (limits.max_streams, limits.requests_per_minute)
        room = self._limits.max_streams + self._limits.max_waiting
        return min([room, *(bound for bound in bounds if bound is not None)])

    def drain(self) -> None:
        """Let nobody in from now on; those that wait get RouterLeaving, those inside go on."""
        self._closed = True
        for waiter in list(self._waiters()):
            self._turn_away(waiter, "draining", RouterLeaving(_DRAINING))

    async def idle(self) -> None:
        """Return when nobody is inside."""
        await self._idle.wait()

    @asynccontextmanager
    async def slot(self, caller: Caller, priority: int = 0) -> AsyncGenerator[Ticket, None]:
        """A place for one request, after waiting for it where that is needed.

        Leaving the block, or being cancelled while waiting, gives the place back.

        Raises:
            ResourceExhausted: the queue is full or the wait took too long, or (`field` "api_key")
                the key has used up one of its limits; `retry_after` says when to try again.
            DeadlineExceeded: the caller's deadline passed while waiting.
            PermissionDenied: `priority` is higher than the key may ask for.
            RouterLeaving: the router is shutting down.
        """
        arrived = self._clock()
        use = self._check(caller, priority, arrived)
        deadline = float("inf") if caller.seconds_left is None else arrived + caller.seconds_left
        if self._num_running < self._limits.max_streams:
            self._seat(use)
        else:
            await self._wait(_Waiter(caller, priority, use, deadline, _new_turn()), arrived)
        try:
            now = self._clock()
            if now >= deadline:
                raise self._refused("deadline", _too_late())
            yield Ticket(caller, use, now - arrived, now)
        finally:
            self._leave(use)

    def _check(self, caller: Caller, priority: int, now: float) -> _KeyUse:
        """The key's use, with this request charged to it."""
        limits = caller.limits
        if self._closed:
            raise self._refused("draining", RouterLeaving(_DRAINING))
        if priority > limits.max_priority:
            error = PermissionDenied(
                f"priority {priority} is above {limits.max_priority}, the highest allowed here",
                field="priority",
            )
            raise self._refused("priority", error)
        if caller.seconds_left is not None and caller.seconds_left <= 0:
            raise self._refused("deadline", _too_late())
        use = self._use_of(caller.key_id)
        _charge(use, limits, now, self.refusals)
        return use

    def _use_of(self, key_id: str) -> _KeyUse:
        use = self._uses.get(key_id)
        if use is None:
            use = self._uses[key_id] = _KeyUse()
        self._uses.move_to_end(key_id)
        excess = len(self._uses) - self._limits.max_keys
        if excess > 0:
            # The newest stays: it is the one asked for.
            idle = (name for name, old in self._uses.items() if not old.num_held and old is not use)
            for name in [name for _, name in zip(range(excess), idle, strict=False)]:
                del self._uses[name]
        return use

    async def _wait(self, waiter: _Waiter, arrived: float) -> None:
        """Return once `waiter` has a place."""
        self._make_room(waiter, arrived)
        self._enqueue(waiter)
        longest = self._limits.max_wait_seconds
        try:
            async with asyncio.timeout(min(longest, waiter.deadline - arrived)):
                await waiter.turn
        except TimeoutError as error:
            self._abandon(waiter)
            if waiter.deadline - arrived <= longest:
                raise self._refused("deadline", _too_late()) from error
            late = ResourceExhausted(
                f"no place became free within {longest:g} seconds",
                retry_after=self._drain_rate.seconds_for(self._num_waiting + 1, self._clock()),
            )
            raise self._refused("queue_timeout", late) from error
        except BaseException:
            self._abandon(waiter)
            raise

    def _make_room(self, waiter: _Waiter, now: float) -> None:
        if self._num_waiting < self._limits.max_waiting:
            return
        victim = self._victim(waiter)
        if victim is None:
            self._give_back(waiter.use)
            raise self._refused("queue_full", self._queue_full(now))
        self._turn_away(victim, "queue_full", self._queue_full(now))

    def _victim(self, newcomer: _Waiter) -> _Waiter | None:
        """Whose place in the queue the newcomer may take: the newest of the busiest key there."""
        if not self._queues:
            return None
        lowest = min(self._queues)
        if lowest > newcomer.priority:
            return None
        queue = max(self._queues[lowest].values(), key=lambda queue: queue[0].use.num_waiting)
        fairer = newcomer.use.num_waiting + 1 < queue[0].use.num_waiting
        return queue[-1] if lowest < newcomer.priority or fairer else None

    def _queue_full(self, now: float) -> ResourceExhausted:
        # Those refused before will be back first, and each takes a place.
        self._num_refused += 1
        return ResourceExhausted(
            f"{self._num_running} requests are in progress and {self._num_waiting} wait, "
            "as many as allowed",
            retry_after=self._drain_rate.seconds_for(self._num_refused, now),
        )

    def _enqueue(self, waiter: _Waiter) -> None:
        keys = self._queues.setdefault(waiter.priority, {})
        keys.setdefault(waiter.caller.key_id, deque()).append(waiter)
        waiter.use.num_waiting += 1
        self._num_waiting += 1

    def _dequeue(self, waiter: _Waiter) -> None:
        keys = self._queues[waiter.priority]
        queue = keys[waiter.caller.key_id]
        queue.remove(waiter)
        if not queue:
            del keys[waiter.caller.key_id]
        if not keys:
            del self._queues[waiter.priority]
        waiter.use.num_waiting -= 1
        self._num_waiting -= 1

    def _refused(self, reason: str, error: SpecinferError) -> SpecinferError:
        self.refusals[reason] += 1
        return error

    def _turn_away(self, waiter: _Waiter, reason: str, error: SpecinferError) -> None:
        self._dequeue(waiter)
        self._give_back(waiter.use)
        if not waiter.turn.done():
            waiter.turn.set_exception(self._refused(reason, error))

    def _abandon(self, waiter: _Waiter) -> None:
        """Clean up after a wait that ended without a place being used."""
        queue = self._queues.get(waiter.priority, {}).get(waiter.caller.key_id, ())
        if waiter in queue:
            self._dequeue(waiter)
            self._give_back(waiter.use)
        elif waiter.turn.done() and not waiter.turn.cancelled() and not waiter.turn.exception():
            # The place came in the moment in which the caller left.
            self._give_back(waiter.use)
            self._leave(waiter.use)

    def _seat(self, use: _KeyUse) -> None:
        self._num_running += 1
        self._idle.clear()
        self._num_served += 1
        use.num_running += 1
        use.last_served = self._num_served
        full = self._num_running >= self._limits.max_streams
        self._drain_rate.mark(full=full, now=self._clock())

    def _leave(self, use: _KeyUse) -> None:
        now = self._clock()
        self._drain_rate.ended(now)
        use.drain.ended(now)
        use.drain.mark(full=False, now=now)
        self._num_running -= 1
        use.num_running -= 1
        self._num_refused = max(0, self._num_refused - 1)
        while self._num_running < self._limits.max_streams and self._queues:
            waiter = self._next()
            if waiter.turn.done() or waiter.deadline <= now:
                self._turn_away(waiter, "deadline", _too_late())
            else:
                self._dequeue(waiter)
                self._seat(waiter.use)
                waiter.turn.set_result(None)
        self._drain_rate.mark(full=self._num_running >= self._limits.max_streams, now=now)
        if not self._num_running:
            self._idle.set()

    def _give_back(self, use: _KeyUse) -> None:
        """A request that never began does not count among the key's requests a minute."""
        use.drain.mark(full=False, now=self._clock())
        if use.requests is not None:
            use.requests.take(-1)

    def _next(self) -> _Waiter:
        queues = self._queues[max(self._queues)].values()
        fairest = min(queues, key=lambda queue: _order(queue[0].use))
        return fairest[0]

    def _waiters(self) -> Iterator[_Waiter]:
        for keys in self._queues.values():
            for queue in keys.values():
                yield from queue


def _charge(use: _KeyUse, limits: KeyLimits, now: float, refusals: Counter[str]) -> None:
    """Count a request against its key's limits; raises ResourceExhausted."""

    def over_limit(name: str, limit: int, seconds: float) -> ResourceExhausted:
        refusals[name] += 1
        return _over_limit(name, limit, seconds)

    held = use.num_held
    if limits.max_streams is not None and held >= limits.max_streams:
        raise over_limit("max_streams", limits.max_streams, use.drain.seconds_for(1, now))
    if limits.tokens_per_minute is not None:
        use.tokens = use.tokens or MinuteBucket(float(limits.tokens_per_minute), now)
        seconds = use.tokens.seconds_until(1, limits.tokens_per_minute, now)
        if seconds > 0:
            raise over_limit("tokens_per_minute", limits.tokens_per_minute, seconds)
    if limits.requests_per_minute is not None:
        use.requests = use.requests or MinuteBucket(float(limits.requests_per_minute), now)
        seconds = use.requests.seconds_until(1, limits.requests_per_minute, now)
        if seconds > 0:
            raise over_limit("requests_per_minute", limits.requests_per_minute, seconds)
        use.requests.take(1)
    full = limits.max_streams is not None and held + 1 >= limits.max_streams
    use.drain.mark(full=full, now=now)


def _order(use: _KeyUse) -> tuple[int, int]:
    return use.num_running, use.last_served


def _new_turn() -> asyncio.Future[None]:
    return asyncio.get_running_loop().create_future()


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded("the deadline passed before the request could start")


def _over_limit(name: str, limit: int, seconds: float) -> ResourceExhausted:
    return ResourceExhausted(
        f"this API key has reached its limit {name} = {limit}",
        field="api_key",
        retry_after=seconds,
    )
