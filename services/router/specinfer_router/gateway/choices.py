"""The choices of one call: as many streams of the router, opened or resumed, read as one.

This module knows nothing of OpenAI's shapes or of HTTP.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from operator import itemgetter

from specinfer.errors import InvalidRequest
from specinfer.messages import GenerateEvent, GenerateRequest, ResumeRequest, TokensEvent
from specinfer.telemetry import current_span
from specinfer_router.access import Caller
from specinfer_router.router import Router

LAST_EVENT_ID = "last-event-id"
_PLACE = re.compile(r"([0-9A-Za-z_-]{1,64}):([0-9]{1,9})")

Stream = AsyncGenerator[GenerateEvent, None]


def new_streams(
    router: Router, requests: Sequence[GenerateRequest], caller: Caller
) -> list[Stream]:
    """A stream for each request; none starts before it is read."""
    if len(requests) > 1:
        current_span().set({"gen_ai.request.choice.count": len(requests)})
    return [router.generate(request, caller) for request in requests]


def resumed_streams(
    router: Router,
    places: Sequence[ResumeRequest],
    caller: Caller,
    readers: Sequence[Callable[[TokensEvent], None] | None],
) -> list[Stream]:
    """The rest of each stream; a reader is first given what came before the place."""
    return [
        router.resume(place, caller) if read is None else _caught_up(router, place, caller, read)
        for place, read in zip(places, readers, strict=True)
    ]


def places_of(last_event_id: str, number: int, request_id: str) -> list[ResumeRequest]:
    """Where the streams of a call broke, from an event's id: SESSION:OFFSET[,SESSION:OFFSET...].

    Raises:
        InvalidRequest: it is no id of ours, or one of a call with another number of choices.
    """
    places = [_PLACE.fullmatch(place) for place in last_event_id.split(",", number)]
    if len(places) != number or None in places:
        raise InvalidRequest(
            f"{LAST_EVENT_ID} is the id of an event of the same request: one SESSION:OFFSET for "
            "each choice",
            field=LAST_EVENT_ID,
        )
    return [
        ResumeRequest(place[1], int(place[2]), request_id) for place in places if place is not None
    ]


def check_number(number: int, router: Router, caller: Caller, parameter: str) -> None:
    """Raise InvalidRequest, naming `parameter`, for choices that could never all be let in."""
    most = router.most_held(caller)
    if number > most:
        raise InvalidRequest(
            f"each choice counts as a request, and of {number} at most {most} are let in here",
            field=parameter,
        )


def event_id(session_ids: Sequence[str], offsets: Sequence[int]) -> str:
    """What `places_of` reads: the tokens of each choice that were sent."""
    pairs = zip(session_ids, offsets, strict=True)
    return ",".join(f"{session_id}:{offset}" for session_id, offset in pairs)


async def merged(streams: Sequence[Stream]) -> AsyncGenerator[tuple[int, GenerateEvent], None]:
    """Every stream's first event in order, then the others as they come, with their choice.

    All streams are read from the start: one that waits for a place may wait for another to end.
    All are closed when this generator is, or when one of them fails.

    Raises:
        SpecinferError: the first that a stream raises.
    """
    async with AsyncExitStack() as stack:
        for stream in streams:
            await stack.enter_async_context(aclosing(stream))
        if len(streams) == 1:
            async for event in streams[0]:
                yield 0, event
            return
        items = await stack.enter_async_context(aclosing(_interleaved(streams)))
        started: dict[int, GenerateEvent] = {}
        held: list[tuple[int, GenerateEvent]] = []
        async for index, event in items:
            if len(started) == len(streams):
                yield index, event
            elif index in started:
                held.append((index, event))
            else:
                started[index] = event
                if len(started) == len(streams):
                    for item in (*sorted(started.items(), key=itemgetter(0)), *held):
                        yield item


async def _caught_up(
    router: Router, place: ResumeRequest, caller: Caller, read: Callable[[TokensEvent], None]
) -> AsyncGenerator[GenerateEvent, None]:
    async with aclosing(router.resume(place, caller, whole=True)) as events:
        async for event in events:
            if isinstance(event, TokensEvent) and event.offset < place.offset:
                read(event)
            else:
                yield event


async def _interleaved(
    streams: Sequence[Stream],
) -> AsyncGenerator[tuple[int, GenerateEvent], None]:
    # Room for one event each: the router buffers what a slow reader leaves.
    queue: asyncio.Queue[tuple[int, GenerateEvent | BaseException | None]]
    queue = asyncio.Queue(len(streams))
    pumps = [
        asyncio.create_task(_pump(index, stream, queue)) for index, stream in enumerate(streams)
    ]
    try:
        num_running = len(pumps)
        while num_running:
            index, event = await queue.get()
            if isinstance(event, BaseException):
                raise event
            if event is None:
                num_running -= 1
            else:
                yield index, event
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(
    index: int,
    stream: Stream,
    queue: asyncio.Queue[tuple[int, GenerateEvent | BaseException | None]],
) -> None:
    try:
        async for event in stream:
            await queue.put((index, event))
    except Exception as error:  # handed on to whoever reads the queue
        await queue.put((index, error))
    else:
        await queue.put((index, None))
