"""What every HTTP call passes before its route: an id, bounds on size, and a key where one is due.

Plain ASGI, so that a stream passes through untouched. This module knows nothing of routes or of
how keys are kept.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from specinfer.errors import DeadlineExceeded, InvalidRequest, SpecinferError
from specinfer.telemetry import Telemetry
from specinfer_router.access import Caller
from specinfer_router.checks import MAX_REQUEST_ID_LENGTH
from specinfer_router.gateway.body import MAX_BODY_BYTES
from specinfer_router.gateway.errors import REQUEST_ID_HEADER, BodyTooLarge, error_response
from specinfer_router.gateway.origins import Origins
from specinfer_router.gateway.tracing import Traced
from specinfer_router.keys.control import bearer_token

MAX_HEADER_BYTES = 16 * 1024
MAX_HEADERS = 100
BODY_SECONDS = 60.0
_EXPOSED = (REQUEST_ID_HEADER, "retry-after", "retry-after-ms", "x-should-retry")

Authenticate = Callable[[str | None], Caller]


class Bounds:
    """Gives each call an id, and refuses headers and bodies past their bounds.

    The id is the caller's own `x-request-id` where that is fit to be one.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one call."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _request_id(headers.get(REQUEST_ID_HEADER, ""))
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).setdefault(REQUEST_ID_HEADER, request_id)
            await send(message)

        try:
            _check_sizes(headers)
        except SpecinferError as error:
            await error_response(error, request_id)(scope, receive, send_with_id)
            return
        await self._app(scope, _bounded(receive), send_with_id)


class Authentication:
    """Asks for a key on every path but the open ones, and says who calls."""

    def __init__(
        self, app: ASGIApp, authenticate: Authenticate, open_paths: frozenset[str]
    ) -> None:
        self._app = app
        self._authenticate = authenticate
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one call."""
        if scope["type"] == "http" and scope["path"] not in self._open_paths:
            token = bearer_token(Headers(scope=scope).get("authorization"))
            try:
                scope["state"]["caller"] = self._authenticate(token)
            except SpecinferError as error:
                response = error_response(error, scope["state"]["request_id"])
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


def gateway_middleware(
    authenticate: Authenticate,
    open_paths: frozenset[str],
    cors_origins: Sequence[str],
    *,
    only_loopback: bool,
    telemetry: Telemetry,
) -> list[Middleware]:
    """Everything in the order in which a call passes it.

    A browser asks for leave without a key, so CORS stands before authentication. Cookies are never
    asked for: a key travels in a header that the page has to set itself.
    """
    stack = [
        Middleware(Bounds),
        Middleware(Traced, telemetry=telemetry, open_paths=open_paths),
        Middleware(Origins, allowed=cors_origins, only_loopback=only_loopback),
    ]
    if cors_origins:
        stack.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(cors_origins),
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],
                expose_headers=list(_EXPOSED),
            )
        )
    stack.append(Middleware(Authentication, authenticate=authenticate, open_paths=open_paths))
    return stack


def _request_id(given: str) -> str:
    if 0 < len(given) <= MAX_REQUEST_ID_LENGTH and all(
        "!" <= character <= "~" for character in given
    ):
        return given
    return uuid.uuid4().hex


def _check_sizes(headers: Headers) -> None:
    total = sum(len(name) + len(value) for name, value in headers.raw)
    if total > MAX_HEADER_BYTES or len(headers.raw) > MAX_HEADERS:
        raise InvalidRequest(
            f"headers have at most {MAX_HEADER_BYTES} bytes and {MAX_HEADERS} lines",
            field="headers",
        )
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
        raise _too_large()


def _bounded(receive: Receive) -> Receive:
    """Bodies without a length are counted as they come, and none takes for ever."""
    num_bytes = 0
    deadline: float | None = asyncio.get_running_loop().time() + BODY_SECONDS

    async def counted() -> Message:
        nonlocal num_bytes, deadline
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"the body did not come within {BODY_SECONDS:g} seconds"
            ) from error
        if not message.get("more_body", False):
            # What comes after the body is the caller's leaving, for which a stream waits.
            deadline = None
        num_bytes += len(message.get("body", b""))
        if num_bytes > MAX_BODY_BYTES:
            raise _too_large()
        return message

    return counted


def _too_large() -> BodyTooLarge:
    return BodyTooLarge(f"a body has at most {MAX_BODY_BYTES} bytes")
