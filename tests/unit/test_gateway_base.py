"""Event streams, bodies, errors and merged choices, each by itself."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, ClassVar

import httpx
import pytest
from pydantic import Field
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message

from specinfer.errors import (
    Cancelled,
    InvalidRequest,
    ReaderStalled,
    ResourceExhausted,
    Unavailable,
)
from specinfer.messages import GenerateEvent, Started
from specinfer_router.gateway.body import MAX_DEPTH, Body, parse_body, validate
from specinfer_router.gateway.calls import api_route, json_answer, while_connected
from specinfer_router.gateway.choices import event_id, merged, places_of
from specinfer_router.gateway.errors import BodyTooLarge, UnknownParameter, error_response
from specinfer_router.gateway.sse import EventStream, ServerEvent, StreamSettings

SCOPE: dict[str, Any] = {"type": "http", "method": "POST", "path": "/", "headers": []}


class Ears:
    """The client's side of one response: what it took, and when it leaves."""

    def __init__(self, leave_after: bytes = b"never") -> None:
        self._leave_after = leave_after
        self.messages: list[Message] = []
        self.leave = asyncio.Event()
        self.heard = asyncio.Event()
        self.deaf = False

    async def receive(self) -> Message:
        await self.leave.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.messages.append(message)
        if message["type"] == "http.response.body":
            self.heard.set()
        if self._leave_after in self.body:
            self.leave.set()
        if self.deaf and message["type"] == "http.response.body":
            await asyncio.Event().wait()

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)


class Source:
    """A generator of events that tells how it was ended."""

    def __init__(self, *events: dict[str, Any] | Exception, endless: bool = False) -> None:
        self._events = events
        self._endless = endless
        self.closed = asyncio.Event()

    async def stream(self) -> AsyncGenerator[ServerEvent, None]:
        try:
            for event in self._events:
                if isinstance(event, Exception):
                    raise event
                yield ServerEvent(event, "a:1")
            if self._endless:
                await asyncio.Event().wait()
        finally:
            self.closed.set()


async def sent(source: Source, ears: Ears, **settings: float) -> None:
    """Run one response to its end."""
    response = EventStream(source.stream(), "id", settings=StreamSettings(**settings))
    async with asyncio.timeout(10):
        await response(SCOPE, ears.receive, ears.send)


async def test_events_have_an_id_and_the_stream_an_end_marker() -> None:
    source, ears = Source({"text": "日本"}, {"b": 2}), Ears()
    await sent(source, ears)
    assert ears.messages[0]["status"] == 200
    first = 'id: a:1\ndata: {"text":"日本"}\n\n'.encode()
    assert ears.body == first + b'id: a:1\ndata: {"b":2}\n\n' + b"data: [DONE]\n\n"
    assert not ears.messages[-1].get("more_body")
    assert source.closed.is_set()


async def test_an_error_before_the_first_event_has_its_status() -> None:
    source, ears = Source(ResourceExhausted("full", retry_after=0.5)), Ears()
    await sent(source, ears)
    assert ears.messages[0]["status"] == 429
    assert (b"retry-after-ms", b"500") in ears.messages[0]["headers"]


async def test_an_error_after_the_first_event_is_an_event() -> None:
    source, ears = Source({"a": 1}, ReaderStalled("not read")), Ears()
    await sent(source, ears)
    assert b'"code":"reader_stalled"' in ears.body
    assert ears.body.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("number", [0, 1])
async def test_what_was_not_foreseen_leaks_nothing(number: int) -> None:
    source, ears = Source(*[{"a": 1}] * number, ValueError("a secret")), Ears()
    await sent(source, ears)
    assert b'"code":"internal"' in ears.body.replace(b" ", b"")
    assert b"secret" not in ears.body


@pytest.mark.parametrize("number", [0, 1])
async def test_a_client_that_leaves_closes_the_source(number: int) -> None:
    source, ears = Source(*[{"a": 1}] * number, endless=True), Ears()
    responding = asyncio.create_task(sent(source, ears))
    await asyncio.sleep(0)
    assert not source.closed.is_set()
    ears.leave.set()
    await responding
    assert source.closed.is_set()
    assert b"[DONE]" not in ears.body


async def test_a_client_that_takes_nothing_is_cut_off() -> None:
    source, ears = Source({"a": 1}, {"b": 2}, endless=True), Ears()
    ears.deaf = True
    await sent(source, ears, write_seconds=0.02)
    assert source.closed.is_set()


async def test_silence_is_filled() -> None:
    source = Source({"a": 1}, endless=True)
    ears = Ears(leave_after=b": keep-alive\n" * 3)
    await sent(source, ears, keep_alive_seconds=0.01)


async def test_a_long_silence_before_the_first_event_begins_the_stream() -> None:
    source = Source(endless=True)
    ears = Ears(leave_after=b": keep-alive\n" * 3)
    await sent(source, ears, keep_alive_seconds=0.01)
    assert ears.messages[0]["status"] == 200
    assert source.closed.is_set()


async def test_an_error_after_a_long_silence_is_an_event() -> None:
    ears = Ears()

    async def refused() -> AsyncGenerator[ServerEvent, None]:
        await ears.heard.wait()
        raise ResourceExhausted("no place")
        yield ServerEvent(None)

    response = EventStream(refused(), "id", settings=StreamSettings(keep_alive_seconds=0.01))
    async with asyncio.timeout(10):
        await response(SCOPE, ears.receive, ears.send)
    assert ears.messages[0]["status"] == 200
    assert b'"code":"resource_exhausted"' in ears.body
    assert ears.body.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("number", [0, 1])
async def test_an_event_that_is_no_json_ends_the_stream_with_an_error(number: int) -> None:
    source, ears = Source(*[{"a": 1}] * number, {"a": math.inf}), Ears()
    await sent(source, ears)
    assert ears.messages[0]["status"] == (200 if number else 500)
    assert b'"code":"internal"' in ears.body
    assert ears.body.endswith(b"data: [DONE]\n\n") == bool(number)
    assert source.closed.is_set()


class Example(Body):
    """A body to try things on."""

    unsupported: ClassVar[dict[str, str]] = {"audio": "there is none"}

    name: str
    sizes: Annotated[list[int], Field(max_length=3)] | str | None = None
    inner: dict[str, float] | None = None
    free: Any = None


@pytest.mark.parametrize(
    ("content", "param"),
    [
        (b'{"name": "a", "more": 1}', "more"),
        (b"{}", "name"),
        (b'{"name": 3}', "name"),
        (b'{"name": "a", "sizes": [1, "2"]}', "sizes[1]"),
        (b'{"name": "a", "sizes": [1, 2, 3, 4]}', "sizes"),
        (b'{"name": "a", "sizes": true}', "sizes"),
        (b'{"name": "a", "inner": {"b": "c"}}', "inner.b"),
        (b'{"name": "a", "audio": 1}', "audio"),
    ],
)
def test_a_wrong_body_names_its_parameter(content: bytes, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        validate(content, Example)
    assert caught.value.field == param


def test_null_is_as_good_as_nothing() -> None:
    assert validate(b'{"name": "a", "sizes": null, "audio": null}', Example).sizes is None
    assert validate(b'{"name": "a", "more": null}', Example).name == "a"
    with pytest.raises(UnknownParameter):
        validate(b'{"name": "a", "more": 0}', Example)


def nested(depth: int) -> bytes:
    """A body with so many levels."""
    return b'{"name": "a", "free": ' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


def test_the_depth_of_a_body_is_bounded() -> None:
    assert validate(nested(MAX_DEPTH), Example).free is not None
    for depth in (MAX_DEPTH + 1, 500, 900):
        with pytest.raises(InvalidRequest, match="levels"):
            validate(nested(depth), Example)


@pytest.mark.parametrize("number", [b"1e999", b"-1e400", b"9" * 400 + b".0"])
def test_numbers_that_no_float_holds_are_refused_wherever_they_stand(number: bytes) -> None:
    with pytest.raises(InvalidRequest, match="too large"):
        validate(b'{"name": "a", "free": {"b": [' + number + b"]}}", Example)


@pytest.mark.parametrize(
    "content",
    [
        b'{"name": "\xed\xa0\x80"}',
        '{"name": "\ud800"}'.encode("utf-16", "surrogatepass"),
        '{"name": "a"}'.encode("utf-16"),
        '{"name": "a"}'.encode("utf-32"),
        b'{"name": "\xff"}',
    ],
)
def test_only_utf_8_is_read(content: bytes) -> None:
    with pytest.raises(InvalidRequest):
        validate(content, Example)
    assert validate(b'\xef\xbb\xbf{"name": "\xc3\xa9"}', Example).name == "\u00e9"


async def test_a_large_body_is_refused_before_it_is_read() -> None:
    num_pieces = 0

    async def receive() -> Message:
        nonlocal num_pieces
        num_pieces += 1
        return {"type": "http.request", "body": b" " * 1000, "more_body": True}

    with pytest.raises(BodyTooLarge):
        await parse_body(Request(SCOPE, receive), Example, max_bytes=2500)
    assert num_pieces == 3


async def test_a_client_that_leaves_while_sending_is_cancelled() -> None:
    async def receive() -> Message:
        return {"type": "http.disconnect"}

    with pytest.raises(Cancelled):
        await parse_body(Request(SCOPE, receive), Example)


async def test_work_ends_with_its_caller() -> None:
    ears, ended = Ears(), asyncio.Event()

    async def work() -> None:
        try:
            ears.leave.set()
            await asyncio.Event().wait()
        finally:
            ended.set()

    with pytest.raises(Cancelled):
        await while_connected(Request(SCOPE, ears.receive), work())
    assert ended.is_set()


async def test_routes_answer_with_the_calls_id() -> None:
    async def handler(request: Request) -> Response:
        return json_answer(request, {})

    app = Starlette(routes=[api_route("/", handler)])
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        first, second = [(await client.post("/")).headers["x-request-id"] for _ in range(2)]
    assert first != second


def test_halves_of_surrogate_pairs_do_not_stop_an_error() -> None:
    response = error_response(InvalidRequest("no \ud800", field="\udfff"), "id")
    assert b'"param":"?"' in response.body


async def events(
    *names: str, error: Exception | None = None
) -> AsyncGenerator[GenerateEvent, None]:
    for name in names:
        await asyncio.sleep(0)
        yield Started(name, name, "table", 0, 1)
    if error is not None:
        raise error


async def test_first_events_come_in_order_and_all_the_others() -> None:
    streams = [events("a0", "a1", "a2"), events("b0"), events("c0", "c1")]
    seen = [(index, event.session_id) async for index, event in merged(streams)]  # type: ignore[union-attr]
    assert seen[:3] == [(0, "a0"), (1, "b0"), (2, "c0")]
    assert sorted(seen[3:]) == [(0, "a1"), (0, "a2"), (2, "c1")]


async def test_one_failure_closes_all_streams() -> None:
    closed = asyncio.Event()

    async def endless() -> AsyncGenerator[GenerateEvent, None]:
        try:
            yield Started("a", "a", "table", 0, 1)
            await asyncio.Event().wait()
        finally:
            closed.set()

    with pytest.raises(Unavailable):
        async with (
            asyncio.timeout(10),
            aclosing(merged([endless(), events("b", error=Unavailable("gone"))])) as source,
        ):
            _ = [event async for event in source]
    assert closed.is_set()


def test_an_event_id_comes_back_as_places() -> None:
    identity = event_id(["a1", "b-2"], [0, 17])
    places = places_of(identity, 2, "mine")
    assert [(place.session_id, place.offset) for place in places] == [("a1", 0), ("b-2", 17)]
    assert {place.request_id for place in places} == {"mine"}
    with pytest.raises(InvalidRequest):
        places_of(identity, 1, "mine")
