"""Routes for machines: health for load balancers and metrics for Prometheus.

This module knows nothing of sessions, workers or generation.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from specinfer.metrics import expose_aside


def operator_routes(
    not_ready_reason: Callable[[], str], registry: CollectorRegistry | None
) -> list[Route]:
    """Routes for health checks and, with a registry, metrics.

    Args:
        not_ready_reason: why requests would fail now, or "" when they would not.
        registry: metrics to show, or None where they have a port of their own.
    """

    async def live(request: Request) -> Response:
        return JSONResponse({"status": "live"})

    async def ready(request: Request) -> Response:
        reason = not_ready_reason()
        if reason:
            return JSONResponse({"status": "not ready", "reason": reason}, status_code=503)
        return JSONResponse({"status": "ready"})

    async def metrics(request: Request) -> Response:
        assert registry is not None
        body, content_type = await expose_aside(registry, request.headers.get("accept"))
        return Response(body, headers={"content-type": content_type})

    return [
        Route("/health/live", live),
        Route("/health/ready", ready),
        # Where load generators look before they begin.
        Route("/health", ready),
        *([Route("/metrics", metrics)] if registry is not None else []),
    ]
