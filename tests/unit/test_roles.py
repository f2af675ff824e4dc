"""Every RPC and every HTTP route, with the role that it needs: nothing is left out by accident."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest
from google.protobuf import message_factory
from prometheus_client import CollectorRegistry

import specinfer.v1
from specinfer.rpc import TlsSettings, open_channel
from specinfer.server import build_server
from specinfer_router.access import OPERATOR, USER, KeyLimits
from specinfer_router.admin import Administration, Identity
from specinfer_router.admin_servicer import SERVICE as ADMIN
from specinfer_router.admin_servicer import add_administration
from specinfer_router.gateway.app import api_routes
from specinfer_router.gateway.operator import operator_routes
from specinfer_router.gateway.page import page_routes
from specinfer_router.gateway.server import Gateway
from specinfer_router.keys.control import AccessControl
from specinfer_router.keys.file import KeyFile
from specinfer_router.keys.record import new_key
from specinfer_router.router import Router
from specinfer_router.servicer import SERVICE as GENERATION
from specinfer_router.servicer import add_generation
from tests.kit.certificates import Certificates
from tests.kit.router import running_router

ANYONE = "anyone"
# Another process of the cluster: who it is, its certificate says.
PEER = "peer"

RPCS = {
    "specinfer.v1.GenerationService/Generate": USER,
    "specinfer.v1.GenerationService/Resume": USER,
    "specinfer.v1.GenerationService/Multiplex": USER,
    "specinfer.v1.GenerationService/Cancel": USER,
    "specinfer.v1.GenerationService/Explain": USER,
    "specinfer.v1.GenerationService/GetCapabilities": USER,
    "specinfer.v1.AdminService/GetCluster": OPERATOR,
    "specinfer.v1.AdminService/ListSessions": OPERATOR,
    "specinfer.v1.AdminService/GetSession": OPERATOR,
    "specinfer.v1.AdminService/CancelSession": OPERATOR,
    "specinfer.v1.AdminService/Diagnose": OPERATOR,
    "specinfer.v1.DraftService/Draft": PEER,
    "specinfer.v1.DraftService/GetInfo": PEER,
    "specinfer.v1.VerifyService/Verify": PEER,
    "specinfer.v1.VerifyService/GetInfo": PEER,
    "specinfer.v1.VerifyService/GetTokenizer": PEER,
}

ROUTES = {
    "POST /v1/chat/completions": USER,
    "POST /v1/completions": USER,
    "GET /v1/models": USER,
    "GET /v1/models/{model:path}": USER,
    "POST /tokenize": USER,
    "POST /detokenize": USER,
    "POST /v1/tokenize": USER,
    "POST /v1/detokenize": USER,
    "POST /v1/responses": USER,
    "GET /v1/responses/{response_id}": USER,
    "DELETE /v1/responses/{response_id}": USER,
    "POST /v1/responses/{response_id}/cancel": USER,
    "GET /v1/responses/{response_id}/input_items": USER,
    "GET /openapi.json": USER,
    "GET /health": ANYONE,
    "GET /health/live": ANYONE,
    "GET /health/ready": ANYONE,
    "GET /metrics": ANYONE,
}


@dataclass
class Doors:
    """A router with keys, and everything that can be knocked at."""

    grpc: grpc.aio.Channel
    gateway: Gateway
    keys: dict[str, str]


async def keys_in(path: Path) -> dict[str, str]:
    """A key of each role, by role."""
    keys = {}
    for role in (USER, OPERATOR):
        text, record = new_key(role, limits=KeyLimits(), now=datetime.now(UTC), role=role)
        await KeyFile(path).add(record)
        keys[role] = text
    return keys


@asynccontextmanager
async def doors(folder: Path) -> AsyncIterator[Doors]:
    keys = await keys_in(folder / "keys")
    access = AccessControl(KeyFile(folder / "keys"))
    await access.start()
    async with running_router() as bench:
        server = build_server("127.0.0.1:0", [GENERATION, ADMIN])
        add_generation(server, bench.router, access)
        administration = Administration(
            Identity("router-1", "test"),
            cluster=bench.cluster,
            store=bench.store,
            get_router=lambda: bench.router,
            registry=bench.registry,
        )
        add_administration(server, administration, access)
        await server.start()
        gateway = Gateway(
            "127.0.0.1:0",
            api_routes(lambda: bench.router),
            open_routes=[*operator_routes(str, CollectorRegistry()), *page_routes()],
            authenticate=access.authenticate,
        )
        await gateway.start()
        async with open_channel(f"127.0.0.1:{server.port}") as channel:
            yield Doors(channel, gateway, keys)
        await gateway.stop()
        await server.server.stop(0)
    await access.close()


def methods() -> dict[str, Any]:
    """Every method of every service in specinfer.v1, by its name."""
    found: dict[str, Any] = {}
    for module in pkgutil.iter_modules(specinfer.v1.__path__):
        if module.name.endswith("_pb2"):
            descriptor = importlib.import_module(f"specinfer.v1.{module.name}").DESCRIPTOR
            for service in descriptor.services_by_name.values():
                found |= {
                    f"{service.full_name}/{method.name}": method for method in service.methods
                }
    return found


def routes() -> set[str]:
    """Every route but the chat page's files, as "METHOD path"."""

    def no_router() -> Router:
        raise AssertionError("nobody calls")

    served = [*api_routes(no_router), *operator_routes(str, CollectorRegistry())]
    return {
        f"{method} {route.path}"
        for route in served
        for method in (route.methods or ())
        if method != "HEAD"
    }


async def grpc_outcome(channel: grpc.aio.Channel, name: str, key: str | None) -> str:
    """The status that an empty request of this method ends with."""
    method = methods()[name]
    make = message_factory.GetMessageClass(method.input_type)
    read = message_factory.GetMessageClass(method.output_type)
    kind = "unary_stream" if method.server_streaming else "unary_unary"
    call = getattr(channel, kind)(
        f"/{name}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=read.FromString,
    )
    metadata = (("authorization", f"Bearer {key}"),) if key else ()
    try:
        answer = call(make(), metadata=metadata, timeout=20)
        if method.server_streaming:
            async for _ in answer:
                pass
        else:
            await answer
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


def test_every_rpc_is_listed() -> None:
    assert set(methods()) == set(RPCS)


def test_every_route_is_listed() -> None:
    assert routes() == set(ROUTES)


async def test_every_rpc_asks_for_its_role(tmp_path: Path) -> None:
    refused = {"UNAUTHENTICATED", "PERMISSION_DENIED"}
    async with doors(tmp_path) as built:
        for name, role in RPCS.items():
            if role == PEER:
                continue
            assert await grpc_outcome(built.grpc, name, None) == "UNAUTHENTICATED", name
            assert await grpc_outcome(built.grpc, name, "sk-wrong") == "UNAUTHENTICATED", name
            as_user = await grpc_outcome(built.grpc, name, built.keys[USER])
            assert (as_user in refused) == (role == OPERATOR), (name, as_user)
            as_operator = await grpc_outcome(built.grpc, name, built.keys[OPERATOR])
            assert as_operator not in refused, (name, as_operator)


async def test_every_route_asks_for_its_role(tmp_path: Path) -> None:
    async with doors(tmp_path) as built:
        base = f"http://127.0.0.1:{built.gateway.port}"
        async with httpx.AsyncClient(base_url=base, timeout=20) as client:
            for route, role in ROUTES.items():
                method, _, path = route.partition(" ")
                path = path.replace("{model:path}", "m").replace("{response_id}", "resp_a")
                bare = await client.request(method, path)
                assert (bare.status_code == 401) == (role == USER), (route, bare.status_code)
                for key in built.keys.values():
                    headers = {"authorization": f"Bearer {key}"}
                    answer = await client.request(method, path, headers=headers)
                    assert answer.status_code not in (401, 403), (route, answer.status_code)


@pytest.mark.parametrize("name", sorted(name for name, role in RPCS.items() if role == PEER))
async def test_workers_that_ask_for_certificates_answer_nobody_without_one(
    name: str, certificates: Certificates
) -> None:
    known, ca = certificates.client, certificates.ca
    tls = TlsSettings(ca, certificates.server.certificate, certificates.server.key)
    service, _, method = name.partition("/")
    server = build_server("127.0.0.1:0", [service], tls=tls)

    async def answer(request: bytes, context: Any) -> bytes:
        return b""

    handler = grpc.method_handlers_generic_handler(
        service, {method: grpc.unary_unary_rpc_method_handler(answer)}
    )
    server.server.add_generic_rpc_handlers((handler,))
    await server.start()
    address = f"localhost:{server.port}"
    codes = []
    for mine in (TlsSettings(ca, known.certificate, known.key), TlsSettings(ca)):
        async with open_channel(address, tls=mine) as channel:
            try:
                call: Any = channel.unary_unary(f"/{name}")
                await call(b"", timeout=20)
                codes.append("OK")
            except grpc.aio.AioRpcError as error:
                codes.append(error.code().name)
    await server.server.stop(0)
    assert codes == ["OK", "UNAVAILABLE"]
