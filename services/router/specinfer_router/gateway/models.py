"""GET /v1/models and /v1/models/{model}: the one model that is served, and what it takes.

This module knows nothing of how models are served.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from specinfer.errors import NotFound
from specinfer.messages import Capabilities
from specinfer_router.gateway.calls import Handler, json_answer
from specinfer_router.router import Router


def models_handler(get_router: Callable[[], Router]) -> Handler:
    """The handler of the list."""

    async def models(request: Request) -> Response:
        served = get_router().capabilities()
        return json_answer(request, {"object": "list", "data": [model_object(served)]})

    return models


def model_handler(get_router: Callable[[], Router]) -> Handler:
    """The handler of one model, whose name may hold slashes."""

    async def model(request: Request) -> Response:
        served = get_router().capabilities()
        name = request.path_params["model"]
        if name != served.model:
            raise NotFound(
                f"no model {name!r} here; this cluster serves {served.model!r}", field="model"
            )
        return json_answer(request, model_object(served))

    return model


def model_object(served: Capabilities) -> dict[str, Any]:
    """OpenAI's model object; `specinfer` holds the capabilities."""
    return {
        "id": served.model,
        "object": "model",
        # A served model has no date of its own, and clients want a number.
        "created": 0,
        "owned_by": "specinfer",
        "max_model_len": served.max_model_len,
        "specinfer": asdict(served),
    }
