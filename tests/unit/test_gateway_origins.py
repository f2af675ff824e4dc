"""Foreign web pages cannot use a gateway through somebody's browser."""

from __future__ import annotations

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from specinfer.telemetry import Telemetry
from specinfer_router.gateway.middleware import gateway_middleware
from specinfer_router.keys.control import AccessControl


def application(*, only_loopback: bool = True, allowed: tuple[str, ...] = ()) -> Starlette:
    async def hello(request: Request) -> Response:
        return PlainTextResponse("hello")

    access = AccessControl(None)
    middleware: list[Middleware] = gateway_middleware(
        access.authenticate,
        frozenset(),
        allowed,
        only_loopback=only_loopback,
        telemetry=Telemetry(),
    )
    return Starlette(routes=[Route("/v1/x", hello, methods=["POST"])], middleware=middleware)


async def status(app: Starlette, host: str, origin: str | None) -> int:
    headers = {"host": host} | ({} if origin is None else {"origin": origin})
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://gateway"
    ) as client:
        answer = await client.post("/v1/x", headers=headers)
        if answer.status_code == 403:
            assert answer.json()["error"]["param"] == "origin"
        return answer.status_code


@pytest.mark.parametrize(
    ("host", "origin", "expected"),
    [
        ("127.0.0.1:8000", None, 200),
        ("anything.example", None, 200),
        ("127.0.0.1:8000", "http://127.0.0.1:8000", 200),
        ("localhost:8000", "http://localhost:8000", 200),
        ("[::1]:8000", "http://[::1]:8000", 200),
        ("127.0.0.1:8000", "http://127.0.0.1:9000", 403),
        ("127.0.0.1:8000", "https://evil.example", 403),
        ("127.0.0.1:8000", "null", 403),
        ("127.0.0.1:8000", "http://[", 403),
        # A foreign name that resolves to this machine.
        ("evil.example:8000", "http://evil.example:8000", 403),
        ("chat.example", "https://chat.example", 200),
    ],
)
async def test_on_loopback(host: str, origin: str | None, expected: int) -> None:
    app = application(allowed=("https://chat.example",))
    assert await status(app, host, origin) == expected


@pytest.mark.parametrize(
    ("host", "origin", "expected"),
    [
        ("gateway.example", "https://gateway.example", 200),
        ("gateway.example", "https://evil.example", 403),
    ],
)
async def test_bound_wide(host: str, origin: str, expected: int) -> None:
    assert await status(application(only_loopback=False), host, origin) == expected
