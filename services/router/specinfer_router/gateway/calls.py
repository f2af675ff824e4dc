"""What every route of the API shares: who calls, under which id, and when the caller has left.

This module knows nothing of what is asked for or of how it is answered.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive

from specinfer.errors import Cancelled, InternalError, SpecinferError
from specinfer.rpc import RESUMES, RESUMES_KEY
from specinfer_router.access import ANYBODY, Caller
from specinfer_router.gateway.errors import REQUEST_ID_HEADER, error_response

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")
Handler = Callable[[Request], Awaitable[Response]]


def request_id_of(request: Request) -> str:
    """Id of the call, the same in logs, errors and gRPC metadata."""
    if getattr(request.state, "request_id", None) is None:
        request.state.request_id = uuid.uuid4().hex
    request_id: str = request.state.request_id
    return request_id


def caller_of(request: Request) -> Caller:
    """Who calls; ANYBODY where no keys are asked for."""
    caller: Caller = getattr(request.state, "caller", ANYBODY)
    return replace(
        caller,
        trace=getattr(request.state, "trace", caller.trace),
        resumes=request.headers.get(RESUMES_KEY) == RESUMES,
    )


def api_route(path: str, handler: Handler, *, methods: tuple[str, ...] = ("POST",)) -> Route:
    """A route whose errors have OpenAI's shape; nothing that was not foreseen leaks out."""

    async def endpoint(request: Request) -> Response:
        request_id = request_id_of(request)
        try:
            return await handler(request)
        except SpecinferError as error:
            return error_response(error, request_id)
        except Exception:  # the last place that can still answer
            log.exception("a route failed", extra={"request_id": request_id})
            return error_response(InternalError("this server made an error"), request_id)

    return Route(path, endpoint, methods=list(methods))


def json_answer(request: Request, body: dict[str, Any]) -> JSONResponse:
    """A body with the call's id."""
    return JSONResponse(body, headers={REQUEST_ID_HEADER: request_id_of(request)})


def encoded_answer(request: Request, content: bytes) -> Response:
    """A body that is JSON already, with the call's id."""
    headers = {REQUEST_ID_HEADER: request_id_of(request)}
    return Response(content, media_type="application/json", headers=headers)


async def while_connected(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
    """The result of `work`, which is cancelled at once when the caller leaves.

    The body has to be read before.

    Raises:
        Cancelled: the caller left; nobody will read the answer.
    """
    task = asyncio.create_task(work)
    leaving = asyncio.create_task(disconnected(request.receive))
    try:
        await asyncio.wait((task, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Cancelled("the caller left")
        return task.result()
    finally:
        leaving.cancel()
        task.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def disconnected(receive: Receive) -> None:
    """Return when the caller has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
