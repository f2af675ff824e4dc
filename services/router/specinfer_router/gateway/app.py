"""The routes of the OpenAI-compatible API, put together for one router.

This module knows nothing of sockets, keys or what the routes do.
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.routing import Route

from specinfer_router.gateway.calls import api_route
from specinfer_router.gateway.chat import chat_handler
from specinfer_router.gateway.completions import completions_handler
from specinfer_router.gateway.models import model_handler, models_handler
from specinfer_router.gateway.openapi import openapi_route
from specinfer_router.gateway.responses import responses_routes
from specinfer_router.gateway.responses_run import BackgroundRuns
from specinfer_router.gateway.sse import StreamSettings
from specinfer_router.gateway.tokenize import detokenize_handler, tokenize_handler
from specinfer_router.router import Router


def api_routes(
    get_router: Callable[[], Router],
    *,
    streams: StreamSettings | None = None,
    runs: BackgroundRuns | None = None,
) -> list[Route]:
    """All routes of the API.

    Args:
        get_router: the router; raises Unavailable while there is none yet.
        streams: how streams are kept and given up.
        runs: owns the responses in the background; whoever gives them closes them.
    """
    streams = streams or StreamSettings()
    tokenize, detokenize = tokenize_handler(get_router), detokenize_handler(get_router)
    return [
        api_route("/v1/chat/completions", chat_handler(get_router, streams)),
        api_route("/v1/completions", completions_handler(get_router, streams)),
        api_route("/v1/models", models_handler(get_router), methods=("GET",)),
        api_route("/v1/models/{model:path}", model_handler(get_router), methods=("GET",)),
        api_route("/tokenize", tokenize),
        api_route("/detokenize", detokenize),
        api_route("/v1/tokenize", tokenize),
        api_route("/v1/detokenize", detokenize),
        *responses_routes(get_router, streams, runs),
        openapi_route(get_router),
    ]
