"""How a call with choices is answered: whole, as a stream, or from where a stream broke.

This module knows nothing of what the choices look like.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from starlette.requests import Request
from starlette.responses import Response

from specinfer.messages import GenerateRequest, ResumeRequest
from specinfer_router.gateway.answers import Answer
from specinfer_router.gateway.calls import (
    caller_of,
    encoded_answer,
    request_id_of,
    while_connected,
)
from specinfer_router.gateway.choices import LAST_EVENT_ID, Stream, new_streams, places_of
from specinfer_router.gateway.sse import EventStream, StreamSettings
from specinfer_router.router import Router


async def reply(
    request: Request,
    router: Router,
    requests: Sequence[GenerateRequest],
    answer: Answer,
    resume: Callable[[Sequence[ResumeRequest]], list[Stream]],
    *,
    streamed: bool,
    settings: StreamSettings,
) -> Response:
    """The response to a call.

    Args:
        request: the call; a stream goes on after its Last-Event-ID.
        router: runs the choices.
        requests: one for each choice.
        answer: what is made of the choices.
        resume: the rests of the choices' streams after their places.
        streamed: whether the answer comes in chunks.
        settings: how streams are kept and given up.

    Raises:
        SpecinferError: before anything was sent; a stream's errors are events.
    """
    caller, request_id = caller_of(request), request_id_of(request)
    if not streamed:
        streams = new_streams(router, requests, caller)
        return encoded_answer(request, await while_connected(request, answer.body(streams)))
    last_event_id = request.headers.get(LAST_EVENT_ID, "")
    if last_event_id:
        places = places_of(last_event_id, len(requests), request_id)
        answer.resume_at([place.offset for place in places])
        streams = resume(places)
    else:
        streams = new_streams(router, requests, caller)
    return EventStream(answer.stream(streams), request_id, settings=settings)
