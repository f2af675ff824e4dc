"""The routes of the OpenAI-compatible API, put together for one router.

This module knows nothing of sockets, keys or what the routes do.
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.routing import Route

from specinfer_router.gateway.sse import StreamSettings
from specinfer_router.router import Router


def api_routes(
    get_router: Callable[[], Router], *, streams: StreamSettings | None = None
) -> list[Route]:
    """All routes of the API.

    Args:
        get_router: the router; raises Unavailable while there is none yet.
        streams: how streams are kept and given up.
    """
    streams = streams or StreamSettings()
    routes: list[Route] = []
    return routes
