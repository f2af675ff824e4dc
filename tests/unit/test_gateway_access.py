"""What every HTTP call passes: ids, bounds, keys, CORS and TLS, over real sockets."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from prometheus_client import CollectorRegistry
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from specinfer.errors import InvalidRequest, Unauthenticated
from specinfer.rpc import TlsSettings
from specinfer_router.access import Caller
from specinfer_router.gateway import connection, middleware
from specinfer_router.gateway.body import MAX_BODY_BYTES
from specinfer_router.gateway.calls import api_route, caller_of, json_answer, while_connected
from specinfer_router.gateway.operator import operator_routes
from specinfer_router.gateway.server import Gateway
from tests.kit.certificates import Certificates

ORIGIN = "https://chat.example"


def authenticate(token: str | None) -> Caller:
    if token != "right":
        raise Unauthenticated("no", field="api_key")
    return Caller("team")


async def who(request: Request) -> Response:
    """Say what a route is told, after reading the body."""
    size = len(await request.body())
    return json_answer(request, {"caller": caller_of(request).key_id, "size": size})


@asynccontextmanager
async def gateway(
    *, tls: TlsSettings | None = None, cors_origins: Sequence[str] = ()
) -> AsyncIterator[Gateway]:
    routes: list[Route] = [api_route("/v1/who", who), api_route("/tokenize", who)]
    served = Gateway(
        "127.0.0.1:0",
        routes,
        open_routes=operator_routes(str, CollectorRegistry()),
        authenticate=authenticate,
        tls=tls,
        cors_origins=cors_origins,
    )
    await served.start()
    try:
        yield served
    finally:
        await served.stop()


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with (
        gateway(cors_origins=(ORIGIN,)) as served,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{served.port}") as client,
    ):
        yield client


KEY = {"authorization": "Bearer right"}


async def test_routes_ask_for_a_key_and_are_told_who_calls(http: httpx.AsyncClient) -> None:
    for path in ("/v1/who", "/tokenize"):
        answer = await http.post(path, headers=KEY, content=b"abc")
        assert (answer.status_code, answer.json()) == (200, {"caller": "team", "size": 3})
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic right"}):
            refused = await http.post(path, headers=headers)
            assert refused.status_code == 401
            assert refused.json()["error"]["type"] == "authentication_error"
            assert refused.headers["www-authenticate"] == "Bearer"


async def test_health_and_metrics_are_open_and_all_else_is_not(http: httpx.AsyncClient) -> None:
    for path in ("/health", "/health/live", "/health/ready", "/metrics"):
        assert (await http.get(path)).status_code == 200
    for path in ("/", "/health/live/", "/nothing", "//v1/who", "/v1/../metrics2"):
        assert (await http.get(path)).status_code == 401, path
    missing = await http.get("/nothing", headers=KEY)
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "invalid_request_error")
    wrong_method = await http.get("/v1/who", headers=KEY)
    assert (wrong_method.status_code, "error" in wrong_method.json()) == (405, True)


@pytest.mark.parametrize("path", ["/v1/who", "/health/live", "/nothing"])
async def test_every_answer_has_an_id(http: httpx.AsyncClient, path: str) -> None:
    given = {"x-request-id": "mine-1!"}
    assert (await http.get(path, headers=given)).headers["x-request-id"] == "mine-1!"
    ids = {(await http.get(path)).headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3
    for unfit in ("x" * 129, "two words", "tab\tbed", ""):
        answer = await http.get(path, headers={"x-request-id": unfit})
        assert len(answer.headers.get_list("x-request-id")) == 1
        assert answer.headers["x-request-id"] not in (unfit, "")


async def test_too_many_or_too_large_headers_are_refused(http: httpx.AsyncClient) -> None:
    for headers in ({"x-large": "x" * 17_000}, {f"x-{number}": "1" for number in range(101)}):
        answer = await http.get("/health/live", headers=headers)
        assert answer.status_code == 400
    assert (await http.get("/health/live", headers={"x-ok": "x" * 8000})).status_code == 200


async def test_headers_without_end_are_cut_off() -> None:
    async with gateway() as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(b"GET /health/live HTTP/1.1\r\nhost: a\r\n")
        for number in range(40):
            writer.write(b"x-%d: " % number + b"y" * 1000 + b"\r\n")
        async with asyncio.timeout(10):
            assert b" 400 " in await reader.readline()
        writer.close()


@pytest.mark.parametrize("before", ["nothing", "a request"])
async def test_a_caller_that_never_finishes_its_headers_is_let_go(
    before: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.05)
    async with gateway() as served, asyncio.timeout(10):
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        if before == "a request":
            writer.write(b"GET /health/live HTTP/1.1\r\nhost: a\r\n\r\n")
            assert b" 200 " in await reader.readline()
            await reader.readuntil(b'"live"}')
        writer.write(b"GET /health/live HTTP/1.1\r\n")
        assert await reader.read() == b""
        writer.close()


async def test_a_caller_that_never_finishes_its_body_is_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(middleware, "BODY_SECONDS", 0.05)
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.01)
    async with gateway() as served, asyncio.timeout(10):
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(
            b"POST /v1/who HTTP/1.1\r\nhost: a\r\nauthorization: Bearer right\r\n"
            b"content-length: 10\r\n\r\nabc"
        )
        assert b" 504 " in await reader.readline()
        writer.close()


async def test_a_stream_may_last_longer_than_a_body_may_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(middleware, "BODY_SECONDS", 0.02)

    async def wait(request: Request) -> Response:
        await request.body()
        loop = asyncio.get_running_loop()
        long = loop.create_future()
        loop.call_later(0.1, long.set_result, "done")
        return json_answer(request, {"waited": await while_connected(request, result_of(long))})

    served = Gateway("127.0.0.1:0", [api_route("/v1/wait", wait)])
    await served.start()
    async with httpx.AsyncClient() as client:
        answer = await client.post(f"http://127.0.0.1:{served.port}/v1/wait", content=b"abc")
        assert answer.json() == {"waited": "done"}
    await served.stop()


async def result_of(future: asyncio.Future[str]) -> str:
    return await future


async def test_a_body_that_is_too_large_is_refused_by_its_length() -> None:
    async with gateway() as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(
            b"POST /v1/who HTTP/1.1\r\nhost: a\r\nauthorization: Bearer right\r\n"
            b"content-length: %d\r\n\r\n" % (MAX_BODY_BYTES + 1)
        )
        # Nothing of the body has been sent.
        async with asyncio.timeout(10):
            assert b" 413 " in await reader.readline()
        writer.close()


async def test_a_body_without_a_length_is_counted(http: httpx.AsyncClient) -> None:

    async def pieces(size: int) -> AsyncIterator[bytes]:
        for _ in range(size // 2**16):
            yield b"x" * 2**16

    fits = await http.post("/v1/who", headers=KEY, content=pieces(MAX_BODY_BYTES))
    assert fits.json()["size"] == MAX_BODY_BYTES
    over = await http.post("/v1/who", headers=KEY, content=pieces(MAX_BODY_BYTES + 2**16))
    assert over.status_code == 413
    assert over.json()["error"]["code"] == "body_too_large"


async def test_browsers_may_call_from_the_listed_origins_alone(http: httpx.AsyncClient) -> None:
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "x-any"}
    leave = await http.options("/v1/who", headers={"origin": ORIGIN, **asks})
    assert leave.status_code == 200
    assert leave.headers["access-control-allow-origin"] == ORIGIN
    assert "access-control-allow-credentials" not in leave.headers
    answer = await http.post("/v1/who", headers={"origin": ORIGIN, **KEY})
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert "retry-after-ms" in answer.headers["access-control-expose-headers"]
    # A refusal can be read by the page too.
    refused = await http.post("/v1/who", headers={"origin": ORIGIN})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, ORIGIN)
    other = {"origin": "https://evil.example"}
    assert (await http.options("/v1/who", headers={**other, **asks})).status_code == 403
    answer = await http.post("/v1/who", headers={**other, **KEY})
    assert answer.status_code == 403
    assert "access-control-allow-origin" not in answer.headers


async def test_without_origins_nothing_is_allowed() -> None:
    async with gateway() as served, httpx.AsyncClient() as client:
        url = f"http://127.0.0.1:{served.port}/v1/who"
        answer = await client.post(url, headers={"origin": ORIGIN, **KEY})
        assert answer.status_code == 403
        assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("origin", ["*", "chat.example", "https://chat.example/", "null", ""])
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Gateway("127.0.0.1:0", [], cors_origins=(origin,))
    assert caught.value.field == "cors_origin"


def trusting(certificates: Certificates) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=certificates.ca)


async def test_tls(certificates: Certificates) -> None:
    tls = TlsSettings(None, certificates.server.certificate, certificates.server.key)
    async with gateway(tls=tls) as served:
        url = f"https://127.0.0.1:{served.port}/v1/who"
        async with httpx.AsyncClient(verify=trusting(certificates)) as client:
            assert (await client.post(url, headers=KEY)).json()["caller"] == "team"
            with pytest.raises(httpx.HTTPError):
                await client.post(url.replace("https", "http"), headers=KEY)
        async with httpx.AsyncClient(verify=ssl.create_default_context()) as client:
            with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                await client.post(url, headers=KEY)


async def test_mutual_tls(certificates: Certificates) -> None:
    tls = TlsSettings(certificates.ca, certificates.server.certificate, certificates.server.key)
    async with gateway(tls=tls) as served:
        url = f"https://127.0.0.1:{served.port}/v1/who"
        for identity, allowed in (
            (certificates.client, True),
            (certificates.stranger, False),
            (None, False),
        ):
            context = trusting(certificates)
            if identity is not None:
                context.load_cert_chain(identity.certificate, identity.key)
            async with httpx.AsyncClient(verify=context) as client:
                if allowed:
                    assert (await client.post(url, headers=KEY)).status_code == 200
                else:
                    with pytest.raises(httpx.HTTPError):
                        await client.post(url, headers=KEY)


async def test_with_tls_the_gateway_may_be_reached_from_elsewhere(
    certificates: Certificates,
) -> None:
    tls = TlsSettings(None, certificates.server.certificate, certificates.server.key)
    await Gateway("0.0.0.0:0", [], tls=tls).stop()


def test_certificates_that_are_none_are_said(certificates: Certificates, tmp_path: Path) -> None:
    server = certificates.server
    for tls in (
        TlsSettings(None, server.certificate, None),
        TlsSettings(None, server.certificate, tmp_path / "missing"),
        TlsSettings(None, server.certificate, certificates.client.key),
        TlsSettings(server.key, server.certificate, server.key),
    ):
        with pytest.raises(InvalidRequest) as caught:
            Gateway("127.0.0.1:0", [], tls=tls)
        assert caught.value.field == "tls"
