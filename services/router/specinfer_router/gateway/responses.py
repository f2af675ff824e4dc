"""The Responses API: create, retrieve, follow, resume, cancel and delete.

Checks, calls, translates. A stored response is a document beside its session: what was generated
is read from the session itself, so a stream can be resumed through any router. This module knows
nothing of what a body means, of how events are numbered or of how sessions run.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from specinfer.errors import InvalidRequest, NotFound, Unavailable
from specinfer.messages import GenerateRequest, ResumeRequest
from specinfer_router.access import Caller
from specinfer_router.gateway.body import parse_body
from specinfer_router.gateway.calls import (
    api_route,
    caller_of,
    json_answer,
    request_id_of,
    while_connected,
)
from specinfer_router.gateway.errors import renaming
from specinfer_router.gateway.responses_items import read_items, stored_items
from specinfer_router.gateway.responses_query import ItemsQuery, RetrieveQuery, parse_query
from specinfer_router.gateway.responses_request import (
    ResponseBody,
    check_create,
    check_encodable,
    generate_request,
    new_response,
    response_plan,
)
from specinfer_router.gateway.responses_run import (
    BackgroundRuns,
    Events,
    cancel_run,
    up_to_now,
    written,
)
from specinfer_router.gateway.responses_store import ResponseStore, StoredResponse
from specinfer_router.gateway.sse import EventStream, ServerEvent, StreamSettings
from specinfer_router.gateway.tools import ToolPlan
from specinfer_router.router import Router

PARAMETERS = {
    "prompt": "input",
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "num_logprobs": "top_logprobs",
    "grammar": "text.format",
    "affinity_key": "prompt_cache_key",
}


class ResponseRoutes:
    """Handlers of the routes below /v1/responses, and the runs in the background."""

    def __init__(
        self, get_router: Callable[[], Router], settings: StreamSettings, runs: BackgroundRuns
    ) -> None:
        self._get_router = get_router
        self._settings = settings
        self._runs = runs

    def routes(self) -> list[Route]:
        """All of them."""
        one = "/v1/responses/{response_id}"
        return [
            api_route("/v1/responses", self.create),
            api_route(one, self.retrieve, methods=("GET",)),
            api_route(one, self.delete, methods=("DELETE",)),
            api_route(f"{one}/cancel", self.cancel),
            api_route(f"{one}/input_items", self.input_items, methods=("GET",)),
        ]

    async def create(self, request: Request) -> Response:
        """Generate a response: at once, as a stream, or in the background."""
        body = await parse_body(request, ResponseBody)
        check_create(body)
        router, keep, caller = self._parts(request)
        with renaming(_parameters(body)):
            earlier = await _earlier(keep, body, caller)
            made = await asyncio.to_thread(
                _made, body, earlier, caller, router, request_id_of(request)
            )
        # The call's own deadline is none of a response in the background.
        runner = replace(caller, seconds_left=None) if body.background else caller
        events = written(
            router,
            router.generate(made.request, runner, unattended=bool(body.background)),
            made.stored,
            plan=made.plan,
            keep=keep if body.stored else None,
            raising=not body.stream and not body.background,
        )
        events = _renamed(events, _parameters(body))
        if body.background:
            first = await while_connected(request, self._runs.start(events))
            if not body.stream:
                return json_answer(request, first["response"])
            response_id = first["response"]["id"]
            return self._stream(request, self._followed(response_id, caller, after=-1))
        if body.stream:
            return self._stream(request, events)
        return json_answer(request, await while_connected(request, _last(events)))

    async def retrieve(self, request: Request) -> Response:
        """A stored response, or its events after a sequence number."""
        query = parse_query(request, RetrieveQuery)
        router, keep, caller = self._parts(request)
        stored = await keep.get(request.path_params["response_id"], caller)
        if query.stream == "false":
            stored = await up_to_now(router, stored, caller, keep)
            return json_answer(request, stored.response)
        after = query.after(request.headers.get("last-event-id"))
        return self._stream(request, self._followed(stored.response["id"], caller, after))

    async def cancel(self, request: Request) -> Response:
        """End a running response; one that has ended stays as it is."""
        router, keep, caller = self._parts(request)
        stored = await keep.get(request.path_params["response_id"], caller)
        stored = await cancel_run(router, stored, caller, keep)
        return json_answer(request, stored.response)

    async def delete(self, request: Request) -> Response:
        """Forget a response; one that runs ends."""
        router, keep, caller = self._parts(request)
        stored = await keep.get(request.path_params["response_id"], caller)
        if stored.running:
            with suppress(NotFound):
                await router.cancel(stored.session_id, caller)
        response_id = stored.response["id"]
        await keep.delete(response_id)
        return json_answer(request, {"id": response_id, "object": "response", "deleted": True})

    async def input_items(self, request: Request) -> Response:
        """The items of a response's own input, a page at a time."""
        query = parse_query(request, ItemsQuery)
        _, keep, caller = self._parts(request)
        stored = await keep.get(request.path_params["response_id"], caller)
        return json_answer(request, query.page(stored.input))

    def _parts(self, request: Request) -> tuple[Router, ResponseStore, Caller]:
        router = self._get_router()
        return router, ResponseStore(router.store), caller_of(request)

    async def _followed(self, response_id: str, caller: Caller, after: int) -> Events:
        """The events of a stored response after a sequence number.

        One in the background, or one that has ended, is read along; another one is taken over from
        its reader, who has left.
        """
        router = self._get_router()
        keep = ResponseStore(router.store)
        stored = await keep.get(response_id, caller)
        if stored.running and not stored.response["background"]:
            stream = router.resume(ResumeRequest(stored.session_id, 0), caller)
            async with aclosing(written(router, stream, stored, after=after, keep=keep)) as events:
                async for event in events:
                    yield event
            return
        try:
            async with aclosing(self._read_along(stored, caller, after)) as events:
                async for event in events:
                    after = event["sequence_number"]
                    yield event
        except Unavailable:
            if not stored.running:
                raise
            # Whoever ran it has died, so it runs on here.
            stream = router.resume(ResumeRequest(stored.session_id, 0), caller)
            await self._runs.start(written(router, stream, stored, keep=keep))
            async with aclosing(self._read_along(stored, caller, after)) as events:
                async for event in events:
                    yield event

    def _read_along(self, stored: StoredResponse, caller: Caller, after: int) -> Events:
        router = self._get_router()
        return written(router, router.follow(stored.session_id, 0, caller), stored, after=after)

    def _stream(self, request: Request, events: Events) -> EventStream:
        request_id = request_id_of(request)
        return EventStream(_server_events(events), request_id, settings=self._settings, done=False)


def responses_routes(
    get_router: Callable[[], Router],
    settings: StreamSettings | None = None,
    runs: BackgroundRuns | None = None,
) -> list[Route]:
    """The routes below /v1/responses.

    Args:
        get_router: the router; raises Unavailable while there is none yet.
        settings: how streams are kept and given up.
        runs: owns the responses in the background.
    """
    return ResponseRoutes(
        get_router, settings or StreamSettings(), runs or BackgroundRuns()
    ).routes()


@dataclass(frozen=True)
class _Made:
    """What a body made: what to ask the router for, how to read tools, and what to keep."""

    request: GenerateRequest
    plan: ToolPlan
    stored: StoredResponse


def _made(
    body: ResponseBody,
    earlier: list[dict[str, Any]],
    caller: Caller,
    router: Router,
    request_id: str,
) -> _Made:
    """Runs on a thread: conversations and schemas may be long."""
    model = body.model or router.capabilities().model
    stored = StoredResponse(
        key_id=caller.key_id,
        session_id="",
        request=body.model_dump(by_alias=True, exclude_none=True),
        earlier=earlier,
        input=stored_items(body.input, uuid.uuid4().hex),
        response=new_response(body, int(time.time()), model),
    )
    check_encodable(stored.response)
    plan = response_plan(body, router.tokenizer.chat_template)
    items = read_items([*stored.earlier, *stored.input])
    return _Made(generate_request(body, items, plan, request_id), plan, stored)


def _parameters(body: ResponseBody) -> dict[str, str]:
    """What the router calls a field, and what this request does."""
    forced = body.text is None or body.text.format is None
    return PARAMETERS | ({"grammar": "tools"} if forced else {})


async def _earlier(keep: ResponseStore, body: ResponseBody, caller: Caller) -> list[dict[str, Any]]:
    """The conversation that the request goes on with."""
    if not body.previous_response_id:
        return []
    before = await keep.get(body.previous_response_id, caller, field="previous_response_id")
    if before.running:
        raise InvalidRequest(
            "the previous response has not ended yet", field="previous_response_id"
        )
    return before.conversation


async def _renamed(events: Events, parameters: dict[str, str]) -> Events:
    """Errors name the parameters of this API."""
    with renaming(parameters):
        async with aclosing(events):
            async for event in events:
                yield event


async def _last(events: Events) -> dict[str, Any]:
    """The response at the end of its events."""
    event: dict[str, Any] = {}
    async with aclosing(events):
        async for each in events:
            event = each
    response: dict[str, Any] = event["response"]
    return response


async def _server_events(events: Events) -> AsyncGenerator[ServerEvent, None]:
    any_sent = False
    async with aclosing(events):
        async for event in events:
            any_sent = True
            yield ServerEvent(event, id=str(event["sequence_number"]), name=event["type"])
    if not any_sent:
        # All had been read before.
        yield ServerEvent(None)
