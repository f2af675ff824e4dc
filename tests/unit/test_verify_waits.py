"""How long a session waits for a verify worker, by what it asks of it, and what it does then."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest

from specinfer.errors import Unavailable
from specinfer.messages import StepCost, VerifyResult, WorkerLoad
from specinfer.sampling import SamplingParams
from specinfer.step_curve import StepCurve
from specinfer.tree import TokenTree
from specinfer_router import draft_seat, verify_seat
from specinfer_router.answer import Answer
from specinfer_router.breaker import Breaker, BreakerLimits
from specinfer_router.crowd import RecentMost
from specinfer_router.deadlines import StepDeadline
from specinfer_router.pool import WorkerPool
from specinfer_router.verify_seat import LOOK_SECONDS, VerifySeat
from specinfer_router.worker_links import VerifyLink
from tests.kit.fake_link import FakeLink, pool_of

# Who is waited for wrongly may be waited for for ever.
pytestmark = pytest.mark.timeout(20)

COSTS = (StepCost(1, 0, 0.1), StepCost(64, 0, 0.2), StepCost(256, 0, 0.5))
SLOWER = (StepCost(1, 0, 0.3), StepCost(64, 0, 0.4), StepCost(256, 0, 1.5))
ROOT, CHAIN = TokenTree.root_only(7), TokenTree.chain((7, *range(1, 8)))


class Clock:
    """The seat's time, which passes while it waits and at no other moment."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic


class Worker(FakeLink):
    """What a seat looks at besides; its steps are answered by whoever waits."""

    generation, hung = 1, False

    def __init__(self, clock: Clock, name: str, costs: Sequence[StepCost] = COSTS) -> None:
        super().__init__(name, step_costs=tuple(costs))
        self.breaker = Breaker(BreakerLimits(max_failures=100), clock=clock.monotonic)
        self.recent_seats = RecentMost(clock.monotonic)
        self.num_opened = self.num_given_up = 0
        self._clock = clock

    @property
    def heard(self) -> float:
        """It has answered others since, so that it is slow, unless it is hung."""
        return 0.0 if self.hung else self._clock.now

    def open(self, *args: object, **options: object) -> Answer[None]:
        self.num_opened += 1
        opened = Answer[None]()
        opened.succeed(None)
        return opened

    def step(self, *args: object, **options: object) -> Answer[VerifyResult]:
        return Answer()

    def forget(self, *args: object, **options: object) -> None:
        pass

    def give_up(self) -> None:
        self.num_given_up += 1


class Waits:
    """Stands for a `Patience`: waits in no time, and asks each time whether the answer comes.

    Attributes:
        seconds: how long each wait was to be.
        answers: whether the worker answers within a wait that begins now.
        num_closed: how often nothing more was to be waited for.
    """

    def __init__(self, clock: Clock) -> None:
        self.seconds: list[float] = []
        self.answers: Callable[[], bool] = lambda: True
        self.num_closed = 0
        self._clock = clock

    def first_answer(self, answers: Sequence[Answer[VerifyResult]], seconds: float) -> Any:
        self.seconds.append(seconds)
        if self.answers():
            answers[0].succeed(VerifyResult(1, (), (9,)))
        else:
            self._clock.now += seconds
        done = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done

    def close(self) -> None:
        self.num_closed += 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(verify_seat, "time", clock)
    return clock


@pytest.fixture
def waits(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Waits:
    waits = Waits(clock)
    monkeypatch.setattr(verify_seat, "Patience", lambda: waits)
    return waits


def seat_in(pool: WorkerPool[VerifyLink], **options: Any) -> VerifySeat:
    sampling = SamplingParams(seed=1)
    fixed: dict[str, Any] = {"num_prompt_tokens": 4, "num_logprobs": None, "vocab_size": 10}
    return VerifySeat(pool, "session", sampling, **fixed, **options)


async def step(
    seat: VerifySeat, tree: TokenTree = ROOT, *, num_prompt: int = 4, num_tokens: int = 1
) -> None:
    checked = await seat.step((7,) * num_prompt, 0, tree, num_tokens=num_tokens)
    assert checked.result.token_ids == (9,)


def seconds_for(costs: Sequence[StepCost] = COSTS, **work: Any) -> float:
    return StepDeadline().wait(StepCurve(costs), **work).seconds


async def test_each_wait_is_as_long_as_its_work_may_take(clock: Clock, waits: Waits) -> None:
    worker = Worker(clock, "a")
    seat = seat_in(pool_of(worker))
    await step(seat, num_prompt=400)
    await step(seat)
    await step(seat)
    worker.num_seats = 64
    await step(seat, CHAIN)
    await step(seat)
    await step(seat, num_tokens=8)
    worker.num_seats = 1
    worker.load = WorkerLoad(num_waiting=80)
    await step(seat, CHAIN)
    worker.load = WorkerLoad()
    await step(seat)
    expected = [
        seconds_for(num_rows=1, num_prefill=400),
        seconds_for(num_rows=1),
        seconds_for(num_rows=1),
        seconds_for(num_rows=8, num_waiting=64),
        seconds_for(num_rows=1, num_waiting=64),
        seconds_for(num_rows=1, num_waiting=64, num_steps=8),
        seconds_for(num_rows=8, num_waiting=80),
        seconds_for(num_rows=1),
    ]
    assert waits.seconds == pytest.approx(expected)
    assert len({round(seconds, 6) for seconds in expected}) == 5, "of a root alone most are alike"


async def test_a_session_that_moves_waits_by_what_its_new_worker_costs(
    clock: Clock, waits: Waits
) -> None:
    workers = [Worker(clock, "a"), Worker(clock, "b", SLOWER)]
    seat = seat_in(pool_of(*workers))
    await step(seat)
    await step(seat)
    workers[0].load, workers[0].ready = WorkerLoad(draining=True), False
    await step(seat)
    await step(seat)
    assert [worker.num_opened for worker in workers] == [1, 1]
    assert waits.seconds == pytest.approx(
        [
            seconds_for(num_rows=1, num_prefill=4),
            seconds_for(num_rows=1),
            seconds_for(SLOWER, num_rows=1, num_prefill=4),
            seconds_for(SLOWER, num_rows=1),
        ]
    )


async def test_who_is_slow_and_alone_is_waited_for_twice_as_long_each_time(
    clock: Clock, waits: Waits, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, failed = Worker(clock, "a"), list[float]()
    seat = seat_in(pool_of(worker))
    await step(seat)
    begun, first = clock.now, seconds_for(num_rows=1)
    monkeypatch.setattr(
        worker.breaker, "fail", lambda ticket, at_once: failed.append(clock.now - begun)
    )
    waits.seconds.clear()
    waits.answers = lambda: clock.now - begun > 7 * first
    await step(seat)
    assert failed == pytest.approx([first, 3 * first, 7 * first])
    assert waits.seconds[0] == pytest.approx(first)
    assert max(waits.seconds[1:]) == LOOK_SECONDS, "somebody else may come at any time"
    assert worker.num_opened == 1
    waits.seconds.clear()
    worker.num_seats = 64
    await step(seat, CHAIN)
    wait = seconds_for(num_rows=8, num_waiting=64)
    assert waits.seconds == pytest.approx([wait]), "the next round has missed none"


async def test_a_worker_that_comes_while_another_is_late_is_taken_at_the_next_look(
    clock: Clock, waits: Waits
) -> None:
    late, other = Worker(clock, "a"), Worker(clock, "b")
    pool = pool_of(late)
    seat = seat_in(pool, max_tries=1)
    came: list[float] = []

    def answers() -> bool:
        if not came and clock.now > 100.0 + 1.5 * seconds_for(num_rows=1, num_prefill=4):
            pool.add(cast(VerifyLink, other))
            came.append(clock.now)
        return other.num_opened > 0

    waits.answers = answers
    await step(seat)
    assert clock.now - came[0] <= LOOK_SECONDS
    assert (late.num_opened, other.num_opened) == (1, 1)
    assert late.num_given_up == 0, "it answers others"


async def test_a_worker_that_answers_nobody_is_given_up_at_once(
    clock: Clock, waits: Waits, monkeypatch: pytest.MonkeyPatch
) -> None:
    hung, other, failed = Worker(clock, "a"), Worker(clock, "b"), list[bool]()
    hung.hung, other.num_seats = True, 1
    monkeypatch.setattr(hung.breaker, "fail", lambda ticket, at_once: failed.append(at_once))
    seat = seat_in(pool_of(hung, other))
    waits.answers = lambda: other.num_opened > 0
    await step(seat, num_tokens=8)
    assert failed == [True]
    assert (hung.num_given_up, other.num_given_up) == (1, 0)
    wait = seconds_for(num_rows=1, num_prefill=4, num_waiting=2, num_misses=1)
    assert waits.seconds[1:] == pytest.approx([wait]), "whose next worker is asked for less"


async def test_the_longest_wait_is_the_last_and_counts_as_a_try(clock: Clock, waits: Waits) -> None:
    worker = Worker(clock, "a")
    seat = seat_in(pool_of(worker), max_tries=2)
    waits.answers = lambda: False
    with pytest.raises(Unavailable, match="took more than 120 s"):
        await step(seat)
    assert worker.num_opened == 2


async def test_who_leaves_has_no_timer_set_any_more(
    clock: Clock, waits: Waits, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool: Any = pool_of(Worker(clock, "a"))
    seat = seat_in(pool)
    await step(seat)
    seat.leave(1)
    assert waits.num_closed == 1
    monkeypatch.setattr(draft_seat, "Patience", lambda: waits)
    sampling = SamplingParams(seed=1)
    fixed: dict[str, Any] = {"num_prompt_tokens": 4, "vocab_size": 10, "deadline_seconds": 1.0}
    draft_seat.DraftSeat(pool, "session", sampling, **fixed).leave(1)
    assert waits.num_closed == 2
