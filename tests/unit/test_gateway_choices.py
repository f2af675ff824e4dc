"""Several choices of one call are read as one stream, however few places there are."""

from __future__ import annotations

import asyncio

import pytest

from specinfer.errors import InvalidRequest
from specinfer.messages import Finished, GenerateEvent, Started, TokensEvent
from specinfer_router.access import ANYBODY
from specinfer_router.admission import AdmissionLimits
from specinfer_router.gateway.choices import merged, new_streams
from specinfer_router.router import RouterLimits
from tests.kit.router import collected, request_of, running_router


@pytest.mark.parametrize("max_streams", [1, 2, 8])
async def test_more_choices_than_places_are_all_read_to_their_end(max_streams: int) -> None:
    # A buffer of two events: a choice that nobody reads could not end and give its place up.
    limits = RouterLimits(
        admission=AdmissionLimits(max_streams=max_streams), max_events=2, stall_seconds=5.0
    )
    async with running_router(limits=limits) as bench:
        wanted = [request_of(seed=seed) for seed in range(3)]
        events: list[list[GenerateEvent]] = [[], [], []]
        order: list[int] = []
        async with asyncio.timeout(20):
            async for index, event in merged(new_streams(bench.router, wanted, ANYBODY)):
                order.append(index)
                events[index].append(event)
        assert order[:3] == [0, 1, 2]
        for seed, choice in enumerate(events):
            assert isinstance(choice[0], Started)
            assert all(isinstance(event, TokensEvent) for event in choice[1:-1])
            assert isinstance(choice[-1], Finished)
            alone = await bench.generate(request_of(seed=seed))
            assert collected(choice).token_ids == alone.token_ids


async def test_one_choice_that_fails_ends_them_all() -> None:
    async with running_router() as bench:
        wanted = [request_of(max_tokens=300), request_of(token_ids=(10**6,))]
        with pytest.raises(InvalidRequest):
            async for _ in merged(new_streams(bench.router, wanted, ANYBODY)):
                pass
        async with asyncio.timeout(5):
            await bench.router.idle()
