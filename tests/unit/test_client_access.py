"""Keys, tokens, certificates and interceptors of a client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc.aio
import pytest

from specinfer import (
    AsyncClient,
    Client,
    InvalidRequest,
    RetryPolicy,
    TlsSettings,
    Unauthenticated,
    Unavailable,
)
from specinfer.credentials import is_loopback
from specinfer.testing import FakeRouter
from tests.kit.certificates import Certificates

FAST = RetryPolicy(max_attempts=2, initial_backoff=0.001, max_backoff=0.01)


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("127.0.0.1:50051", True),
        ("127.8.0.1:1", True),
        ("localhost:50051", True),
        ("[::1]:50051", True),
        ("unix:/run/router", True),
        ("dns:///localhost:1", True),
        ("ipv4:127.0.0.1:1", True),
        ("127.evil.example:50051", False),
        ("localhost.evil.example:50051", False),
        ("10.0.0.1:50051", False),
        ("router:50051", False),
        ("ipv4:127.0.0.1:1,10.0.0.1:1", False),
        ("dns://8.8.8.8/localhost:1", False),
    ],
)
def test_loopback_is_what_surely_is(address: str, local: bool) -> None:
    assert is_loopback(address) is local


@pytest.mark.parametrize("kind", [AsyncClient, Client])
def test_a_key_does_not_leave_the_machine_in_plain_text(kind: Callable[..., Any]) -> None:
    with pytest.raises(InvalidRequest, match="plain text") as caught:
        kind(["127.0.0.1:1", "router.example:50051"], api_key="sk-secret")
    assert "sk-secret" not in str(caught.value)
    with pytest.raises(InvalidRequest, match="plain text"):
        kind("router.example:50051", token_provider=lambda: "t")


async def test_a_key_may_leave_it_by_tls_or_when_allowed() -> None:
    await AsyncClient("router.example:1", api_key="k", allow_insecure_key=True).close()
    await AsyncClient("router.example:1", api_key="k", tls=TlsSettings()).close()
    await AsyncClient("router.example:1").close()


@pytest.mark.parametrize("key", ["", "a b", "a\nb", "ä", 7, "k" * 5000])
def test_bad_keys_are_refused_and_not_repeated(key: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        AsyncClient(api_key=key)
    assert caught.value.field == "api_key"
    assert not key or str(key) not in caught.value.message.replace("1 to", "")
    with pytest.raises(InvalidRequest):
        AsyncClient(api_key="k", token_provider=lambda: "t")


async def test_each_call_carries_the_key() -> None:
    with FakeRouter("hello", api_keys=["right"]) as router:
        async with AsyncClient(router.address, api_key="right") as client:
            session_id = (await client.generate("hi")).session_id
            assert (await client.capabilities()).model == "fake"
            assert (await client.resume(session_id).collect()).text == "hello"
            assert (await client.explain(session_id)).session_id == session_id
            await client.cancel(session_id)
        for key in ("wrong", None):
            async with AsyncClient(router.address, api_key=key, retry=FAST) as client:
                with pytest.raises(Unauthenticated):
                    await client.generate("hi")
                with pytest.raises(Unauthenticated):
                    await client.capabilities()
    assert {one["authorization"] for one in router.metadata} == {"Bearer right"}


async def test_a_refused_token_is_renewed_once() -> None:
    tokens = iter(["old", "right", "old", "older", "right"])

    async def provide() -> str:
        await asyncio.sleep(0)
        return next(tokens)

    with FakeRouter("hello", api_keys=["right"]) as router:
        async with AsyncClient(router.address, token_provider=provide, retry=FAST) as client:
            assert (await client.generate("hi")).text == "hello"
            with pytest.raises(Unauthenticated):
                await client.capabilities()
            assert (await client.capabilities()).model == "fake"


def test_a_plain_function_provides_tokens_too() -> None:
    with FakeRouter("hello", api_keys=["right"]) as router:
        with Client(router.address, token_provider=lambda: "right") as client:
            assert client.generate("hi").text == "hello"
        with Client(router.address, token_provider=lambda: "a b") as client:
            with pytest.raises(InvalidRequest) as caught:
                client.generate("hi")
            assert caught.value.field == "token_provider"


async def test_mutual_tls_lets_in_whom_the_authority_signed(certificates: Certificates) -> None:
    ca, server, signed = certificates.ca, certificates.server, certificates.client
    served = TlsSettings(ca, server.certificate, server.key)
    known = TlsSettings(ca, signed.certificate, signed.key)
    with FakeRouter("hello", tls=served, api_keys=["k"]) as router:
        async with AsyncClient(router.address, tls=known, api_key="k", timeout=20) as client:
            assert (await client.generate("hi")).text == "hello"
        for stranger in (TlsSettings(ca), None):
            async with AsyncClient(router.address, tls=stranger, retry=FAST, timeout=20) as client:
                with pytest.raises(Unavailable):
                    await client.generate("hi")


async def test_the_servers_name_may_be_another(certificates: Certificates) -> None:
    ca, server = certificates.ca, certificates.server
    with FakeRouter("hello", tls=TlsSettings(None, server.certificate, server.key)) as router:
        for name, known in (("", True), ("localhost", True), ("router.example", False)):
            tls = TlsSettings(ca, server_name=name)
            async with AsyncClient(router.address, tls=tls, retry=FAST, timeout=20) as client:
                if known:
                    assert (await client.generate("hi")).text == "hello"
                    continue
                with pytest.raises(Unavailable):
                    await client.generate("hi")


class Streams(grpc.aio.UnaryStreamClientInterceptor):
    """Counts streams."""

    def __init__(self) -> None:
        self.methods: list[str] = []

    async def intercept_unary_stream(
        self, continuation: Any, client_call_details: Any, request: Any
    ) -> Any:
        self.methods.append(str(client_call_details.method))
        return await continuation(client_call_details, request)


async def test_interceptors_see_each_call() -> None:
    seen = Streams()
    with FakeRouter("hello there") as router:
        async with AsyncClient(router.address, interceptors=[seen]) as client:
            completion = await client.generate("hi")
            assert completion.text == "hello there"
            async with client.stream("hi") as stream:
                await anext(stream)
            await client.resume(completion.session_id, 1).collect()
    names = [method.rpartition("/")[2].strip("'") for method in seen.methods]
    assert names == ["Generate", "Generate", "Resume"]
