"""Whether the clients' numbers are those that the router shows to Prometheus.

The router's /metrics are read before and after a run that had the router to itself, and what it
counted in between is laid beside what the clients saw. Times are there three times. A router's
begin with the request's arrival and end when the event is made; a whole request ends when its
stream has. What it tells each client with the last event are these times, the whole one as it is
then. A client's own clock begins with the sending and ends when the event was read: it has the way
there and back on top, and what that takes for each request is a number of its own. This module
knows nothing of schedules.
"""

from __future__ import annotations

import asyncio
import time
import urllib.request
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from specinfer.errors import Unavailable
from specinfer.metrics.metric import PREFIX
from specinfer_bench.load.observation import DONE, Observation

TOLERANCE = 0.02
# What a request and its first event take between two processes: less than this a request is the
# way, not another number.
WAY_SECONDS = 0.002
MAX_PAGE_BYTES = 16 * 1024 * 1024
ANSWER_SECONDS = 10.0
SETTLE_SECONDS = 10.0
POLL_SECONDS = 0.05
COUNTS = ("requests", "prompt_tokens", "generation_tokens", "first_tokens")
# What a client can know as the router does.
EXACT = (*COUNTS, "first_token_seconds")
SERIES = {
    "requests": "requests_total",
    "prompt_tokens": "prompt_tokens_total",
    "generation_tokens": "generation_tokens_total",
    "first_tokens": "time_to_first_token_seconds_count",
    "first_token_seconds": "time_to_first_token_seconds_sum",
    "request_seconds": "e2e_request_latency_seconds_sum",
}
Numbers = dict[str, float]


@dataclass(frozen=True)
class Agreement:
    """One number as both sides have it.

    Attributes:
        client, router: its value over the run, times by the clock of each.
        told: a time as the router told it to the clients; None for counts, and where a request
            that is part of it failed and was told nothing.
        difference: (client - router) / router, or 0 when both are 0.
        way_ms: of a time, milliseconds a request that the client's clock has on top; 0 for counts.
        same: whether the router shows what the clients counted or were told, within TOLERANCE;
            false for a time of which they were told nothing.
        agrees: whether it shows what the clients' clocks say, within TOLERANCE or, where that is
            more, WAY_SECONDS for each request: 2 % of times above 100 ms, 2 ms of shorter ones.
    """

    client: float
    router: float
    told: float | None
    difference: float
    way_ms: float
    same: bool
    agrees: bool


async def scraped(gateway: str) -> Numbers:
    """What a router shows at an HTTP address now, summed over labels.

    Raises:
        Unavailable: when it does not answer.
    """
    text = await asyncio.to_thread(_page, f"http://{gateway}/metrics")
    return read_numbers(text)


async def scraped_after(gateway: str, before: Numbers, seen: Sequence[Observation]) -> Numbers:
    """As `scraped`, once the router has counted as many ends as the clients saw, or in 10 seconds.

    A client has its last event before the router has counted it.
    """
    ends = sum(one.sent is not None for one in seen)
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        after = await scraped(gateway)
        if after["requests"] - before["requests"] >= ends or time.monotonic() > deadline:
            return after
        await asyncio.sleep(POLL_SECONDS)


def _page(url: str) -> str:
    # Never through a proxy: it is a machine of ours that is asked.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=ANSWER_SECONDS) as answer:
            body: bytes = answer.read(MAX_PAGE_BYTES)
    except OSError as error:
        raise Unavailable(f"{url} does not answer: {error}") from error
    return body.decode("utf-8")


def read_numbers(text: str) -> Numbers:
    """The numbers of SERIES from a page in Prometheus's text format; 0 for those not there."""
    sums: Numbers = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            sums[sample.name] += sample.value
    return {name: sums[PREFIX + series] for name, series in SERIES.items()}


def agreement(
    before: Numbers, after: Numbers, observations: Sequence[Observation]
) -> dict[str, Agreement]:
    """Every number of SERIES as the clients and as the router have it.

    Times count from the sending here: the router knows nothing of waits in the client.
    """
    told: dict[str, float] = {}
    done = [seen for seen in observations if seen.outcome == DONE]
    sent = [seen for seen in observations if seen.sent is not None]
    ours: Numbers = {
        "requests": len(sent),
        "prompt_tokens": sum(seen.num_prompt_tokens for seen in done),
        "generation_tokens": sum(seen.num_tokens for seen in done),
        "first_tokens": sum(bool(seen.events) for seen in observations),
        "first_token_seconds": sum(
            seen.events[0][0] - (seen.sent or 0.0) for seen in sent if seen.events
        ),
        "request_seconds": sum(seen.ended - (seen.sent or 0.0) for seen in sent),
    }
    # One that failed was told nothing, and what it had of the router's sums is not known.
    if all(seen.outcome == DONE for seen in sent if seen.events):
        told["first_token_seconds"] = sum(seen.told_first_token_seconds for seen in done)
    if len(done) == len(sent):
        told["request_seconds"] = sum(seen.told_seconds for seen in done)
    theirs = {name: after[name] - before[name] for name in SERIES}
    return {
        name: _compared(name, ours[name], theirs[name], told.get(name), len(sent))
        for name in SERIES
    }


def _compared(
    name: str, client: float, router: float, told: float | None, num_requests: int
) -> Agreement:
    apart, room = client - router, TOLERANCE * abs(router)
    difference = apart / router if router else 0.0
    if name in COUNTS:
        same = abs(apart) <= room
        return Agreement(client, router, None, difference, 0.0, same, same)
    same = told is not None and abs(told - router) <= room
    agrees = abs(apart) <= max(room, WAY_SECONDS * num_requests)
    way_ms = 1e3 * apart / max(1, num_requests)
    return Agreement(client, router, told, difference, way_ms, same, agrees)
