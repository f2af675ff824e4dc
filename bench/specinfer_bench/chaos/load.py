"""Clients that never rest: each reads one stream after the other, over gRPC or over HTTP.

What breaks is resumed as a user's client would do it: the SDK by itself, a reader of server-sent
events by sending the same POST again with the id of the last event. This module knows nothing of
faults or processes.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import httpx

from specinfer import AsyncClient, RetryPolicy, SpeculationOptions
from specinfer.errors import SpecinferError, Unavailable
from specinfer.options import GenerateOptions
from specinfer_bench.chaos.readings import Answer, Case, Reading

# A shape of its own: a policy may find that guesses do not pay on a busy machine.
WIDTHS = (2, 1, 1)
RETRY = RetryPolicy(max_attempts=10, initial_backoff=0.1, max_backoff=2.0)
SILENCE_SECONDS = 15.0
FINISH_SECONDS = 120.0
POLL_SECONDS = 0.02
REST_SECONDS = 0.5
RETRYABLE_STATUSES = (409, 429, 502, 503, 504)
RETRYABLE_CODES = ("unavailable", "resource_exhausted", "reader_stalled", "stale_epoch")


@dataclass(frozen=True)
class LoadOptions:
    """Who reads what.

    Attributes:
        routers: gRPC addresses.
        gateways: HTTP addresses.
        model: served name.
        cases: what is asked, in turn.
        num_grpc: clients of the SDK.
        num_http: readers of server-sent events.
    """

    routers: Sequence[str]
    gateways: Sequence[str]
    model: str
    cases: Sequence[Case]
    num_grpc: int = 16
    num_http: int = 4


def options_of(case: Case) -> GenerateOptions:
    """A case as the SDK is asked."""
    return {
        "max_tokens": case.max_tokens,
        "temperature": case.temperature,
        "seed": case.seed,
        "ignore_eos": True,
        "speculation": SpeculationOptions(widths=WIDTHS),
    }


def body_of(case: Case, model: str) -> dict[str, object]:
    """A case as the gateway is asked."""
    return {
        "model": model,
        "prompt": case.prompt,
        "max_tokens": case.max_tokens,
        "temperature": case.temperature,
        "seed": case.seed,
        "ignore_eos": True,
        "stream": True,
        "speculation": {"widths": list(WIDTHS)},
    }


async def unbroken(routers: Sequence[str], cases: Sequence[Case]) -> dict[Case, Answer]:
    """What every case gives when nothing happens; raises SpecinferError when one fails."""
    async with AsyncClient(routers) as client:
        done = await asyncio.gather(
            *(client.generate(case.prompt, **options_of(case)) for case in cases)
        )
    return {
        case: Answer(tuple(each.token_ids), each.text)
        for case, each in zip(cases, done, strict=True)
    }


class Load:
    """Streams without end, until told to stop.

    Attributes:
        readings: of every stream so far.
    """

    def __init__(self, options: LoadOptions) -> None:
        self.readings: list[Reading] = []
        self._options = options
        self._stopping = False
        self._next = 0
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin with every client at once."""
        for index in range(self._options.num_grpc):
            self._tasks.append(asyncio.create_task(self._grpc(index), name=f"grpc {index}"))
        for index in range(self._options.num_http):
            self._tasks.append(asyncio.create_task(self._http(index), name=f"http {index}"))

    async def flowing(self, seconds: float = FINISH_SECONDS) -> None:
        """Wait until every client has read from a stream that goes on.

        Raises:
            Unavailable: not in time.
        """
        deadline = time.monotonic() + seconds
        while sum(bool(one.times) and one.ended is None for one in self.readings) < len(
            self._tasks
        ):
            if time.monotonic() > deadline:
                raise Unavailable(f"the streams do not flow: {self._first_error()}")
            await asyncio.sleep(POLL_SECONDS)

    async def finish(self, seconds: float = FINISH_SECONDS) -> None:
        """Begin nothing more and read what runs to its end; what does not end has failed."""
        self._stopping = True
        _, late = await asyncio.wait(self._tasks, timeout=seconds)
        for task in late:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        hung = {task.get_name() for task in late}
        for reading in self.readings:
            if reading.ended is None:
                reading.ended = time.monotonic()
                reading.error = reading.error or f"did not end within {seconds:.0f} seconds"
                hung.discard(reading.client)
        for reading in reversed(self.readings):
            if reading.client in hung:
                hung.remove(reading.client)
                reading.error = reading.error or "the client did not close"
        for task in self._tasks:
            if not task.cancelled():
                task.result()

    def _first_error(self) -> str:
        return next((one.error for one in self.readings if one.error), "no error")

    def _begin(self, client: str) -> Reading:
        case = self._options.cases[self._next % len(self._options.cases)]
        self._next += 1
        reading = Reading(client, case, time.monotonic())
        self.readings.append(reading)
        return reading

    async def _grpc(self, index: int) -> None:
        # Clients spread over the routers: each has another one first.
        routers = _turned(self._options.routers, index)
        async with AsyncClient(routers, retry=RETRY, attempt_timeout=SILENCE_SECONDS) as client:
            while not self._stopping:
                reading = self._begin(f"grpc {index}")
                reading.token_ids = []
                await read_grpc(client, reading)
                await _ended(reading)

    async def _http(self, index: int) -> None:
        gateways = _turned(self._options.gateways, index)
        timeout = httpx.Timeout(SILENCE_SECONDS)
        async with httpx.AsyncClient(timeout=timeout, trust_env=False) as http:
            while not self._stopping:
                reading = self._begin(f"http {index}")
                reader = EventReader(http, gateways, self._options.model, reading)
                await reader.read_all()
                await _ended(reading)


async def _ended(reading: Reading) -> None:
    reading.ended = time.monotonic()
    if reading.error:
        # Whoever was refused does not ask again at once, for ever.
        await asyncio.sleep(REST_SECONDS)


async def read_grpc(client: AsyncClient, reading: Reading) -> None:
    """Read one stream with the SDK, which resumes it by itself."""
    case = reading.case
    tokens = reading.token_ids if reading.token_ids is not None else []
    try:
        async with client.stream(case.prompt, **options_of(case)) as stream:
            async for event in stream:
                reading.times.append(time.monotonic())
                tokens.extend(event.token_ids)
            reading.text = stream.completion.text
    except SpecinferError as error:
        reading.error = f"{type(error).__name__}: {error.message}"


class _Again(Exception):
    """The stream is to be asked for again."""


class EventReader:
    """Reads one stream of server-sent events, over as many connections as it takes."""

    def __init__(
        self, http: httpx.AsyncClient, gateways: Sequence[str], model: str, reading: Reading
    ) -> None:
        self._http = http
        self._gateways = gateways
        self._body = body_of(reading.case, model)
        self._reading = reading
        self._last_id = ""
        self._event: dict[str, str] = {}
        self._done = False

    async def read_all(self) -> None:
        """Read to the end or to an error that no repetition mends."""
        attempt = 0
        known = 0
        while not self._done and not self._reading.error:
            gateway = self._gateways[attempt % len(self._gateways)]
            try:
                await self._read(f"http://{gateway}/v1/completions")
            except (httpx.TransportError, _Again) as error:
                self._reading.breaks += 1
                attempt = 1 if len(self._reading.times) > known else attempt + 1
                known = len(self._reading.times)
                await self._wait(attempt, error)

    async def _wait(self, attempt: int, error: Exception) -> None:
        if attempt >= RETRY.max_attempts * len(self._gateways):
            self._reading.error = f"{type(error).__name__}: {error}"
            return
        rounds = attempt // len(self._gateways)
        if rounds:
            await asyncio.sleep(min(RETRY.max_backoff, RETRY.initial_backoff * 2.0**rounds))

    async def _read(self, url: str) -> None:
        headers = {"last-event-id": self._last_id} if self._last_id else {}
        self._event = {}
        async with self._http.stream("POST", url, json=self._body, headers=headers) as response:
            if response.status_code in RETRYABLE_STATUSES:
                raise _Again(f"{response.status_code}: {(await response.aread())!r}")
            if response.status_code != 200:
                self._reading.error = f"{response.status_code}: {(await response.aread())!r}"
                return
            async for line in response.aiter_lines():
                self._take(line)
        if not self._done:
            raise _Again("the stream ended without its end")

    def _take(self, line: str) -> None:
        """Take one line; an event counts once it is whole, which is at its empty line."""
        name, _, value = line.partition(": ")
        if line:
            self._event[name] = value
            return
        event, self._event = self._event, {}
        data = event.get("data")
        if data == "[DONE]":
            self._done = True
        elif data:
            self._whole(json.loads(data), event.get("id", ""))

    def _whole(self, data: Mapping[str, object], event_id: str) -> None:
        error = data.get("error")
        if isinstance(error, Mapping):
            if error.get("code") in RETRYABLE_CODES:
                raise _Again(str(error.get("message")))
            self._reading.error = f"{error.get('code')}: {error.get('message')}"
            return
        self._last_id = event_id or self._last_id
        choices = data["choices"]
        assert isinstance(choices, list)
        for choice in choices:
            if choice["text"]:
                self._reading.text += choice["text"]
                self._reading.times.append(time.monotonic())


def _turned(values: Sequence[str], by: int) -> tuple[str, ...]:
    start = by % len(values)
    return (*values[start:], *values[:start])
