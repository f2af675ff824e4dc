"""The door's bounds and its order hold for any coming, ending and leaving."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from specinfer.errors import ResourceExhausted
from tests.kit.door import Request, begin, door, key

ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(("come", "end", "cancel")),
        st.sampled_from(("a", "b", "c")),
        st.integers(0, 2),
        st.integers(0, 20),
    ),
    max_size=60,
)


def expected_next(waiting: list[Request], running: list[Request]) -> Callable[[Request], bool]:
    """Whether a request may be the one that starts now."""
    top = max(request.priority for request in waiting)
    candidates = [request for request in waiting if request.priority == top]

    def busy(request: Request) -> int:
        return sum(other.caller.key_id == request.caller.key_id for other in running)

    least = min(busy(request) for request in candidates)

    def allowed(request: Request) -> bool:
        mine = [other for other in candidates if other.caller.key_id == request.caller.key_id]
        return request in candidates and busy(request) == least and mine[0] is request

    return allowed


@settings(max_examples=200, deadline=None)
@given(actions=ACTIONS, max_streams=st.integers(1, 3), max_waiting=st.integers(0, 4))
def test_bounds_and_order_hold_whatever_happens(
    actions: list[tuple[str, str, int, int]], max_streams: int, max_waiting: int
) -> None:
    asyncio.run(_play(actions, max_streams, max_waiting))


async def _play(
    actions: list[tuple[str, str, int, int]], max_streams: int, max_waiting: int
) -> None:
    async with door(max_streams, max_waiting) as (admission, clock):
        requests: list[Request] = []

        def those(state: str) -> list[Request]:
            return [request for request in requests if request.state == state]

        for action, name, priority, pick in actions:
            clock.now += 0.5
            waiting, running = those("waiting"), those("running")
            if action == "come":
                requests.append(await begin(admission, key(name, max_priority=2), priority))
            elif action == "end" and running:
                ended = running.pop(pick % len(running))
                allowed = expected_next(waiting, running) if waiting else None
                await ended.end()
                for request in those("running"):
                    assert request in running or (allowed is not None and allowed(request))
            elif action == "cancel" and waiting:
                await waiting[pick % len(waiting)].cancel()
            assert admission.num_running == len(those("running")) <= max_streams
            assert admission.num_waiting == len(those("waiting")) <= max_waiting
            # Nobody waits beside a free place.
            assert not admission.num_waiting or admission.num_running == max_streams
            for request in those("refused"):
                assert isinstance(request.error, ResourceExhausted | asyncio.CancelledError)
        while left := deque(those("running")):
            await left[0].end()
        assert (admission.num_running, admission.num_waiting, admission._queues) == (0, 0, {})
