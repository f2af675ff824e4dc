"""Which web pages may call: the gateway's own and those that the operator names.

A browser lets any page send requests to this machine and tells which page it was, so a gateway
without keys has to look. Programs other than browsers send no origin and are none of its concern.
This module knows nothing of routes or keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from specinfer.errors import PermissionDenied
from specinfer_router.gateway.errors import error_response

LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")


class Origins:
    """Refuses calls from web pages of other origins.

    On a loopback address a page's own origin has to be a loopback name too: otherwise a foreign
    name that is made to resolve to this machine would pass (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, allowed: Sequence[str], *, only_loopback: bool) -> None:
        self._app = app
        self._allowed = frozenset(allowed)
        self._only_loopback = only_loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one call."""
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            origin = headers.get("origin")
            if origin is not None and not self._may_call(origin, headers.get("host", "")):
                error = PermissionDenied(
                    "this web page is of another origin than the gateway; name its origin with "
                    "--cors-origin to let it call",
                    field="origin",
                )
                response = error_response(error, scope["state"]["request_id"])
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _may_call(self, origin: str, host: str) -> bool:
        if origin in self._allowed:
            return True
        try:
            page = urlsplit(origin)
            name = page.hostname
        except ValueError:
            return False
        if page.netloc != host:
            return False
        return name in LOOPBACK_NAMES or not self._only_loopback
