"""The door: bounds, order, fairness between keys, limits of a key, deadlines and draining."""

from __future__ import annotations

import pytest

from specinfer.errors import (
    DeadlineExceeded,
    InvalidRequest,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)
from specinfer_router.access import ANYBODY, Caller
from specinfer_router.admission import Admission, AdmissionLimits
from specinfer_router.rates import MAX_RETRY_SECONDS, MIN_RETRY_SECONDS
from tests.kit.door import begin, door, key, refusal, settle


async def test_a_place_is_given_back_and_the_wait_is_told() -> None:
    async with door() as (admission, clock):
        first = await begin(admission)
        assert first.ticket is not None
        assert first.ticket.queue_seconds == 0.0
        second = await begin(admission)
        assert (admission.num_running, admission.num_waiting, second.state) == (1, 1, "waiting")
        clock.now += 2.5
        await first.end()
        assert second.ticket is not None
        assert second.ticket.queue_seconds == pytest.approx(2.5)
        await second.end()
        assert (admission.num_running, admission.num_waiting) == (0, 0)


@pytest.mark.parametrize(
    ("limits", "most"),
    [({}, 9), ({"max_streams": 2}, 2), ({"requests_per_minute": 3}, 3), ({"max_streams": 40}, 9)],
)
async def test_what_could_ever_be_held_is_known(limits: dict[str, int], most: int) -> None:
    async with door(max_streams=1, max_waiting=8) as (admission, _):
        caller = key("a", **limits)
        assert admission.most_held(caller.limits) == most
        requests = [await begin(admission, caller) for _ in range(most + 1)]
        assert [request.state == "refused" for request in requests] == [False] * most + [True]
        for request in requests[:most]:
            await request.cancel()


async def test_over_the_queue_the_hint_follows_the_drain_rate() -> None:
    async with door(max_streams=1, max_waiting=3) as (admission, clock):
        requests = [await begin(admission) for _ in range(4)]
        for _ in range(3):
            clock.now += 4.0
            await next(r for r in requests if r.state == "running").end()
            requests.append(await begin(admission))
        # One stream ends every four seconds; the second to come back waits for the second place.
        hints = [refusal(await begin(admission)).retry_after for _ in range(2)]
        assert hints == pytest.approx([4.0, 8.0])
        many = [refusal(await begin(admission)).retry_after or 0.0 for _ in range(40)]
        assert max(many) == MAX_RETRY_SECONDS
        assert min(many) >= MIN_RETRY_SECONDS


async def test_idle_time_does_not_lengthen_the_hint() -> None:
    async with door(max_streams=1, max_waiting=0) as (admission, clock):
        for _ in range(5):
            request = await begin(admission)
            clock.now += 2.0
            await request.end()
            clock.now += 500.0
        await begin(admission)
        assert refusal(await begin(admission)).retry_after == pytest.approx(2.0)


async def test_higher_priority_first_and_first_come_within_a_key() -> None:
    async with door() as (admission, _):
        caller = key("a", max_priority=5)
        running = await begin(admission, caller)
        waiting = [await begin(admission, caller, priority) for priority in (0, -1, 5, 0, 5)]
        order = []
        for _ in waiting:
            await running.end()
            running = next(request for request in waiting if request.state == "running")
            order.append(waiting.index(running))
        assert order == [2, 4, 0, 3, 1]


async def served_after(kind: type[Admission]) -> int:
    """How many others go before a second key when the first has 500 waiting."""
    async with door(max_streams=2, max_waiting=600, kind=kind) as (admission, _):
        greedy = [await begin(admission, key("greedy")) for _ in range(502)]
        modest = await begin(admission, key("modest"))
        num_before = 0
        while True:
            await next(request for request in greedy if request.state == "running").end()
            if modest.state == "running":
                break
            num_before += 1
        admission.drain()
        for request in (*greedy, modest):
            request.go.set()
        await settle()
        return num_before


class FirstComeDoor(Admission):
    """Takes whoever came first, whatever the key; what fairness has to be better than."""

    def _next(self) -> object:  # type: ignore[override]
        return next(iter(self._queues[max(self._queues)].values()))[0]


async def test_one_key_with_a_long_queue_does_not_starve_another() -> None:
    assert await served_after(Admission) == 0


async def test_control_first_come_first_served_starves() -> None:
    assert await served_after(FirstComeDoor) > 400


async def test_one_key_cannot_fill_the_queue() -> None:
    async with door(max_streams=1, max_waiting=4) as (admission, _):
        greedy = [await begin(admission, key("greedy")) for _ in range(5)]
        modest = [await begin(admission, key("modest")) for _ in range(3)]
        assert [request.state for request in greedy] == [
            "running",
            *["waiting"] * 2,
            *["refused"] * 2,
        ]
        assert [request.state for request in modest] == ["waiting", "waiting", "refused"]
        refusal(greedy[-1])


async def test_higher_priority_takes_a_place_in_a_full_queue() -> None:
    async with door(max_streams=1, max_waiting=1) as (admission, _):
        caller = key("a", max_priority=1)
        _running, low = await begin(admission, caller), await begin(admission, caller)
        high = await begin(admission, caller, 1)
        assert (low.state, high.state) == ("refused", "waiting")
        assert (await begin(admission, caller)).state == "refused"


async def test_a_keys_streams_are_bounded() -> None:
    async with door(max_streams=1) as (admission, clock):
        caller = key("a", max_streams=2)
        running, waiting = await begin(admission, caller), await begin(admission, caller)
        error = refusal(await begin(admission, caller))
        assert (error.field, "max_streams = 2" in error.message) == ("api_key", True)
        other = await begin(admission, key("b", max_streams=2))
        clock.now += 6.0
        await running.end()
        assert (await begin(admission, caller)).state == "waiting"
        # One stream ended in the six seconds in which the key held all it may.
        assert refusal(await begin(admission, caller)).retry_after == pytest.approx(6.0)
        # The key that has not been served yet comes before the one that just was.
        assert (waiting.state, other.state) == ("waiting", "running")


@pytest.mark.parametrize("limit", ["requests_per_minute", "tokens_per_minute"])
async def test_a_minutes_allowance_and_its_honest_hint(limit: str) -> None:
    async with door(max_streams=8) as (admission, clock):
        caller = key("a", **{limit: 30})
        for _ in range(30 if limit == "requests_per_minute" else 1):
            request = await begin(admission, caller)
            assert request.ticket is not None
            request.ticket.spend(1 if limit == "requests_per_minute" else 44)
            await request.end()
        error = refusal(await begin(admission, caller))
        assert (error.field, f"{limit} = 30" in error.message) == ("api_key", True)
        assert error.retry_after == pytest.approx(2.0 if limit == "requests_per_minute" else 30.0)
        clock.now += (error.retry_after or 0.0) - 0.01
        assert (await begin(admission, caller)).state == "refused"
        clock.now += 0.02
        assert (await begin(admission, caller)).state == "running"
        assert (await begin(admission, key("b", **{limit: 30}))).state == "running"


async def test_a_request_that_never_began_is_not_counted() -> None:
    async with door(max_streams=1) as (admission, _):
        running = await begin(admission, key("b"))
        caller = key("a", requests_per_minute=1)
        for _ in range(3):
            await (await begin(admission, caller)).cancel()
        last = await begin(admission, caller)
        await running.end()
        assert last.state == "running"
        assert (await begin(admission, caller)).state == "refused"


async def test_priority_above_the_keys_is_refused() -> None:
    async with door() as (admission, _):
        with pytest.raises(PermissionDenied) as caught:
            async with admission.slot(key("a", max_priority=2), 3):
                pass
        assert caught.value.field == "priority"
        assert admission.num_running == 0


async def test_a_deadline_ends_the_wait_and_no_work_starts() -> None:
    async with door() as (admission, _):
        running = await begin(admission)
        with pytest.raises(DeadlineExceeded):
            async with admission.slot(Caller(seconds_left=0.01)):
                raise AssertionError
        with pytest.raises(DeadlineExceeded):
            async with admission.slot(Caller(seconds_left=0.0)):
                raise AssertionError
        assert admission.num_waiting == 0
        await running.end()
        assert admission.num_running == 0


async def test_a_place_that_comes_after_the_deadline_goes_to_the_next() -> None:
    async with door() as (admission, clock):
        running = await begin(admission)
        late = await begin(admission, Caller(seconds_left=5.0))
        patient = await begin(admission)
        clock.now += 5.0
        await running.end()
        assert isinstance(late.error, DeadlineExceeded)
        assert patient.state == "running"


async def test_a_wait_has_an_end() -> None:
    admission = Admission(AdmissionLimits(max_streams=1, max_wait_seconds=0.01))
    async with admission.slot(ANYBODY):
        with pytest.raises(ResourceExhausted, match="within") as caught:
            async with admission.slot(Caller(seconds_left=60.0)):
                raise AssertionError
    assert caught.value.retry_after is not None
    assert (admission.num_running, admission.num_waiting) == (0, 0)


async def test_leaving_in_the_moment_the_place_comes_gives_it_back() -> None:
    async with door() as (admission, _):
        async with admission.slot(ANYBODY):
            waiting = await begin(admission)
        # The place is there already, and the waiting task has not run since.
        assert (admission.num_running, admission.num_waiting, waiting.ticket) == (1, 0, None)
        assert waiting.task is not None
        waiting.task.cancel()
        await waiting.task
        assert waiting.ticket is None
        assert (admission.num_running, admission.num_waiting) == (0, 0)


async def test_draining_refuses_those_that_wait_and_those_that_come() -> None:
    async with door() as (admission, _):
        running, waiting = await begin(admission), await begin(admission)
        admission.drain()
        await settle()
        assert isinstance(waiting.error, Unavailable)
        assert isinstance((await begin(admission)).error, Unavailable)
        assert running.state == "running"
        await running.end()
        assert (admission.num_running, admission.num_waiting) == (0, 0)


async def test_idle_keys_are_forgotten() -> None:
    admission = Admission(AdmissionLimits(max_streams=4, max_keys=3))
    async with admission.slot(key("busy")):
        for number in range(20):
            async with admission.slot(key(f"k{number}")):
                pass
            assert admission.num_keys <= 3
        assert "busy" in admission._uses


def test_limits_that_make_no_sense_are_refused() -> None:
    for name, value in (
        ("max_streams", 0),
        ("max_waiting", -1),
        ("max_keys", 0),
        ("max_wait_seconds", float("nan")),
        ("max_wait_seconds", float("inf")),
    ):
        with pytest.raises(InvalidRequest) as caught:
            AdmissionLimits(**{name: value})  # type: ignore[arg-type]
        assert caught.value.field == name
