"""A span around each HTTP call of the API, from its headers to the end of its answer.

Plain ASGI, as the rest of the middleware. This module knows nothing of what is asked for.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from specinfer.telemetry import Span, Telemetry, TraceContext

_METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})


class Traced:
    """Continues the caller's trace, W3C's `traceparent`, on every path but the open ones."""

    def __init__(self, app: ASGIApp, telemetry: Telemetry, open_paths: frozenset[str]) -> None:
        self._app = app
        self._telemetry = telemetry
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one call."""
        if scope["type"] != "http" or scope["path"] in self._open_paths:
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        state, parent = headers.get("tracestate", ""), headers.get("traceparent", "")
        method = scope["method"] if scope["method"] in _METHODS else "HTTP"
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        with self._telemetry.span(method, parent=TraceContext(parent, state)) as span:
            scope.setdefault("state", {})["trace"] = TraceContext(span.traceparent, state, True)
            try:
                await self._app(scope, receive, watched)
            finally:
                if span.recording:
                    _describe(span, scope, method, status)


def _describe(span: Span, scope: Scope, method: str, status: int) -> None:
    # Paths have ids in them; the route's own pattern is what calls have in common.
    route = getattr(scope.get("route"), "path", "")
    if route:
        span.rename(f"{method} {route}")
        span.set({"http.route": route})
    host, port = scope.get("server") or ("", None)
    span.set({"http.request.method": method, "url.scheme": scope["scheme"], "server.address": host})
    span.set({"specinfer.request.id": scope["state"].get("request_id", "")})
    if port:
        span.set({"server.port": port})
    if status:
        span.set({"http.response.status_code": status})
    if status >= 500:
        span.set({"error.type": str(status)})
