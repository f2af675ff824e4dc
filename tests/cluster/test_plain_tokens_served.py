"""Plain tokens that come together, through a router and a real worker: one text, fewer rounds."""

from __future__ import annotations

import asyncio
import re
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest

from specinfer.messages import GenerateRequest, Grammar, SpeculationOptions
from specinfer_router.access import Caller
from specinfer_router.opening import SeatLimits
from specinfer_router.router import Router, RouterLimits
from tests.kit.live_cluster import live_cluster
from tests.kit.router import Generated, collected, request_of

PROMPT = tuple(range(20, 60))
OFF = SpeculationOptions(enabled=False)
LINES = "([a-z]{3}-[0-9]{2},){3}"
# However slow the machine, tokens come within it.
AT_ONCE, ONE_BY_ONE = 1000.0, 0.0


async def generated(router: Router, request: GenerateRequest) -> Generated:
    async with aclosing(router.generate(request, Caller(""))) as events:
        return collected([event async for event in events])


async def both_ways(pair: tuple[Path, Path], *requests: GenerateRequest) -> list[list[Generated]]:
    """What each request gives, together and one by one."""
    found = []
    for plain_seconds in (AT_ONCE, ONE_BY_ONE):
        seats = SeatLimits(propose_seconds=10.0, plain_seconds=plain_seconds)
        async with live_cluster(*pair, RouterLimits(seats=seats)) as live:
            found.append([await generated(live.router, request) for request in requests])
    return found


@pytest.fixture(scope="module")
def runs(tiny_pair: tuple[Path, Path]) -> list[list[Generated]]:
    plain = request_of(token_ids=PROMPT, max_tokens=43, speculation=OFF)
    guessed = request_of(token_ids=PROMPT, max_tokens=43)
    sampled = replace(plain, num_logprobs=2)
    structured = replace(plain, grammar=Grammar("regex", LINES))
    return asyncio.run(both_ways(tiny_pair, plain, guessed, sampled, structured))


def test_the_tokens_are_those_that_come_one_by_one(runs: list[list[Generated]]) -> None:
    together, alone = runs
    assert [run.token_ids for run in together] == [run.token_ids for run in alone]
    assert [run.text for run in together] == [run.text for run in alone]
    assert together[0].token_ids == together[1].token_ids, "with guesses and without"


def test_they_come_in_groups_that_end_where_the_request_does(runs: list[list[Generated]]) -> None:
    together, alone = (run[0] for run in runs)
    sizes = [len(event.token_ids) for event in together.rounds]
    # The first round reads the prompt; nobody knows yet how long a token takes.
    assert sizes == [1, 8, 8, 8, 8, 8, 2]
    assert [len(event.token_ids) for event in alone.rounds] == [1] * 43
    assert together.finished.reason == alone.finished.reason == "length"


def test_every_token_has_its_logprobs(runs: list[list[Generated]]) -> None:
    together, alone = (run[2] for run in runs)
    found = [logprob for event in together.rounds for logprob in event.logprobs]
    assert found == [logprob for event in alone.rounds for logprob in event.logprobs]
    assert len(found) == 43


def test_a_grammar_holds_and_ends_within_a_group(runs: list[list[Generated]]) -> None:
    together, alone = (run[3] for run in runs)
    assert re.fullmatch(LINES, together.text)
    assert together.token_ids == alone.token_ids
    sizes = [len(event.token_ids) for event in together.rounds]
    assert sizes[:3] == [1, 8, 8]
    assert 1 < sizes[-1] < 8, "the grammar ends in the middle of a group, and so does the group"
    assert together.finished.reason == alone.finished.reason == "stop"
    assert together.finished.usage == alone.finished.usage


async def test_a_stop_string_within_a_group_ends_the_text_there(
    runs: list[list[Generated]], tiny_pair: tuple[Path, Path]
) -> None:
    stop = runs[0][0].text[20:23]
    request = request_of(token_ids=PROMPT, max_tokens=43, speculation=OFF, stop=(stop,))
    (together,), (alone,) = await both_ways(tiny_pair, request)
    assert together.text == alone.text
    assert together.token_ids == alone.token_ids
    ends = [
        (run.finished.reason, run.finished.stop_match, run.finished.usage)
        for run in (together, alone)
    ]
    assert ends[0] == ends[1]
    assert together.finished.reason == "stop"
