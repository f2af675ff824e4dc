"""The breaker's three states, the hedging budget and the deadline of a round; no clock but ours."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specinfer.messages import StepCost
from specinfer.step_curve import StepCurve
from specinfer_router.breaker import Breaker, BreakerLimits
from specinfer_router.deadlines import StepDeadline
from specinfer_router.hedging import HedgeBudget, MovingQuantile

LIMITS = BreakerLimits(max_failures=3, min_rest=2.0, max_rest=10.0)


class Clock:
    """Time that moves only when a test moves it."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def breaker_of(clock: Clock) -> Breaker:
    return Breaker(LIMITS, clock=clock, jitter=lambda: 1.0)


def fail(breaker: Breaker, times: int = 1) -> None:
    for _ in range(times):
        breaker.fail(breaker.admit())


def test_failures_in_a_row_open_it_and_a_success_between_them_does_not() -> None:
    breaker = breaker_of(Clock())
    fail(breaker, 2)
    breaker.succeed(breaker.admit())
    fail(breaker, 2)
    assert breaker.state == "closed"
    fail(breaker)
    assert (breaker.state, breaker.allows, breaker.admit()) == ("open", False, None)


def test_after_the_rest_one_call_probes_and_its_success_closes() -> None:
    clock = Clock()
    breaker = breaker_of(clock)
    fail(breaker, 3)
    clock.now += 1.9
    assert breaker.state == "open"
    clock.now += 0.2
    assert breaker.state == "half-open"
    ticket = breaker.admit()
    assert ticket is not None
    assert breaker.admit() is None, "one probe at a time"
    breaker.succeed(ticket)
    assert breaker.state == "closed"
    fail(breaker, 2)
    assert breaker.state == "closed"


def test_rests_double_up_to_a_bound_and_start_small_after_a_success() -> None:
    clock = Clock()
    breaker = breaker_of(clock)
    fail(breaker, 3)
    rests = []
    for _ in range(5):
        before = clock.now
        while breaker.state == "open":
            clock.now += 0.5
        rests.append(clock.now - before)
        fail(breaker)
    assert rests == [2.0, 4.0, 8.0, 10.0, 10.0]
    clock.now += 10.0
    breaker.succeed(breaker.admit())
    breaker.fail(breaker.admit(), at_once=True)
    clock.now += 2.0
    assert breaker.state == "half-open"


def test_a_probe_without_a_verdict_lets_another_one_try() -> None:
    clock = Clock()
    breaker = breaker_of(clock)
    fail(breaker, 3)
    clock.now += 2.0
    breaker.release(breaker.admit())
    assert breaker.allows
    breaker.succeed(breaker.admit())
    assert breaker.state == "closed"


def test_a_probe_that_nobody_hears_of_again_gives_way_to_another() -> None:
    clock = Clock()
    breaker = breaker_of(clock)
    fail(breaker, 3)
    clock.now += 2.0
    lost = breaker.admit()
    clock.now += LIMITS.probe_seconds - 0.1
    assert not breaker.allows
    clock.now += 0.2
    second = breaker.admit()
    assert second is not None
    breaker.release(lost)
    assert breaker.admit() is None, "the lost one has no say any more"
    breaker.succeed(second)
    assert breaker.state == "closed"


def test_what_was_asked_before_the_breaker_changed_has_no_say() -> None:
    clock = Clock()
    breaker = breaker_of(clock)
    early = [breaker.admit() for _ in range(8)]
    for ticket in early[:3]:
        breaker.fail(ticket)
    breaker.succeed(early[3])
    assert breaker.state == "open"
    clock.now += 2.0
    probe = breaker.admit()
    breaker.fail(early[4])
    breaker.release(early[5])
    assert breaker.admit() is None, "the probe is still on its way"
    breaker.succeed(probe)
    breaker.fail(early[6], at_once=True)
    assert breaker.state == "closed"


@given(st.lists(st.sampled_from(["admit", "fail", "succeed", "release", "wait"]), max_size=60))
def test_whatever_happens_there_is_at_most_one_probe_and_never_a_stuck_breaker(
    events: list[str],
) -> None:
    clock = Clock()
    breaker = breaker_of(clock)
    open_tickets: list[int] = []
    probes = 0
    for event in events:
        if event == "wait":
            clock.now += 1.0
        elif event == "admit":
            state, ticket = breaker.state, breaker.admit()
            assert (ticket is None) == (state == "open" or (state == "half-open" and probes > 0))
            if ticket is not None:
                open_tickets.append(ticket)
                probes += state == "half-open"
        elif open_tickets:
            ticket = open_tickets.pop()
            getattr(breaker, event)(ticket)
            breaker.release(ticket)
            probes = 0 if breaker.allows else probes
    while open_tickets:
        breaker.release(open_tickets.pop())
    clock.now += LIMITS.max_rest
    breaker.succeed(breaker.admit())
    assert breaker.state == "closed"


def test_hedges_are_bounded_by_a_share_of_the_asks_and_a_burst() -> None:
    budget = HedgeBudget(share=0.1, burst=4.0)
    assert sum(budget.spend() for _ in range(100)) == 4
    spent = 0
    for _ in range(1000):
        budget.earn()
        spent += budget.spend()
    assert 98 <= spent <= 101
    for _ in range(1000):
        budget.earn()
    assert sum(budget.spend() for _ in range(100)) == 4
    assert budget.num_hedges == 4 + spent + 4


def test_the_quantile_follows_the_last_values_and_is_silent_at_first() -> None:
    quantile = MovingQuantile(0.95)
    for _ in range(15):
        quantile.observe(1.0)
    assert quantile.value is None
    quantile.observe(1.0)
    assert quantile.value == 1.0
    for number in range(200):
        quantile.observe(float(number))
    assert 185 <= (quantile.value or 0) < 200


CURVE = StepCurve((StepCost(1, 256, 0.01), StepCost(64, 256, 0.04)))


def seconds_of(deadline: StepDeadline, curve: StepCurve, **work: int) -> float:
    return deadline.wait(curve, **work).seconds  # type: ignore[arg-type]


def test_the_deadline_of_a_round_grows_with_its_work_and_with_those_who_wait() -> None:
    deadline = StepDeadline()
    alone = seconds_of(deadline, CURVE, num_rows=1)
    assert deadline.floor_seconds < alone < 5.0
    assert seconds_of(deadline, CURVE, num_rows=1, num_prefill=4096) > alone + 8 * 4096 / 64 * 0.03
    # Eight roots share a pass; eight trees of 64 nodes fill two. Eight prompts are read in turn.
    assert seconds_of(deadline, CURVE, num_rows=1, num_waiting=8) == alone
    assert seconds_of(deadline, CURVE, num_rows=64, num_waiting=8) > alone
    one = seconds_of(deadline, CURVE, num_rows=1, num_prefill=512)
    eight = seconds_of(deadline, CURVE, num_rows=1, num_prefill=512, num_waiting=8)
    assert eight - alone == pytest.approx(8 * (one - alone))
    assert seconds_of(deadline, CURVE, num_rows=1, with_grammar=True) >= alone + 10.0


def test_the_deadline_doubles_with_every_miss_up_to_the_cap() -> None:
    deadline = StepDeadline()
    waits = [seconds_of(deadline, CURVE, num_rows=1, num_misses=misses) for misses in range(12)]
    assert waits[1] == pytest.approx(2 * waits[0])
    assert waits == sorted(waits)
    assert waits[-1] == deadline.cap_seconds == deadline.most_seconds
    assert seconds_of(deadline, CURVE, num_rows=1, num_misses=10**6) == deadline.cap_seconds


def test_a_fixed_deadline_stays_as_it_is() -> None:
    deadline = StepDeadline(fixed_seconds=7.0)
    assert seconds_of(deadline, CURVE, num_rows=9, num_prefill=900, num_misses=5) == 7.0
    assert deadline.most_seconds == 7.0


def test_a_long_prompt_on_a_slow_machine_is_not_given_up_before_it_can_be_done() -> None:
    deadline, slow = StepDeadline(), StepCurve((StepCost(1, 0, 1.0), StepCost(64, 0, 4.0)))
    cost = 4096 / 64 * 4.0
    first = deadline.wait(slow, num_rows=1, num_prefill=4096)
    assert first.seconds > 2 * cost > deadline.cap_seconds
    later = deadline.wait(slow, num_rows=1, num_prefill=4096, num_misses=9)
    assert later.last
    assert later.seconds < 5 * cost
