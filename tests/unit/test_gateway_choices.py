"""Several choices of one call are read as one stream, however few places there are."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from specinfer.errors import InvalidRequest
from specinfer.messages import Finished, GenerateEvent, Started, TokensEvent
from specinfer_router.access import ANYBODY, Caller, KeyLimits
from specinfer_router.admission import AdmissionLimits
from specinfer_router.gateway.choices import check_number, merged, new_streams
from specinfer_router.router import RouterLimits
from tests.kit.gateway import chat_body, completion_body, running_gateway
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


@pytest.mark.parametrize("limits", [KeyLimits(max_streams=2), KeyLimits(requests_per_minute=2)])
async def test_choices_that_a_key_can_never_hold_are_refused(limits: KeyLimits) -> None:
    caller = Caller("team", limits)
    async with running_router() as bench:
        check_number(2, bench.router, caller, "n")
        with pytest.raises(InvalidRequest, match="at most 2") as refused:
            check_number(3, bench.router, caller, "n")
    assert refused.value.field == "n"
    assert not refused.value.retryable


@pytest.mark.parametrize(
    ("path", "body", "parameter"),
    [
        ("/v1/chat/completions", chat_body(n=3), "n"),
        ("/v1/completions", completion_body(n=3), "n"),
        ("/v1/completions", completion_body(prompt=["a", "b", "c"]), "prompt"),
    ],
)
async def test_choices_that_a_router_can_never_hold_are_refused(
    path: str, body: dict[str, Any], parameter: str
) -> None:
    limits = RouterLimits(admission=AdmissionLimits(max_streams=1, max_waiting=1))
    async with running_gateway(limits=limits) as gateway:
        refused = await gateway.http.post(path, json=body)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == parameter
        assert refused.headers["x-should-retry"] == "false"
        assert (await gateway.chat(n=2)).status_code == 200
