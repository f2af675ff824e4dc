"""What is refused, and how the real `openai` client takes it: classes, parameters and retries."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from specinfer.errors import (
    DeadlineExceeded,
    InternalError,
    PermissionDenied,
    ResourceExhausted,
    SpecinferError,
    StaleEpoch,
    Unauthenticated,
    Unavailable,
)
from specinfer_router.admission import AdmissionLimits
from specinfer_router.gateway.sse import StreamSettings
from specinfer_router.router import RouterLimits
from tests.kit.gateway import GatewayBench, chat_body, completion_body, running_gateway


@pytest.fixture
async def gateway() -> AsyncIterator[GatewayBench]:
    async with running_gateway() as built:
        yield built


def client_of(gateway: GatewayBench, max_retries: int = 0, **options: Any) -> AsyncOpenAI:
    return AsyncOpenAI(
        base_url=gateway.url + "/v1", api_key="none", max_retries=max_retries, **options
    )


CLASSES = [
    (Unauthenticated("no key"), openai.AuthenticationError, "authentication_error"),
    (PermissionDenied("not yours"), openai.PermissionDeniedError, "permission_error"),
    (StaleEpoch("taken over"), openai.ConflictError, "invalid_request_error"),
    (ResourceExhausted("full"), openai.RateLimitError, "rate_limit_error"),
    (InternalError("ours"), openai.InternalServerError, "server_error"),
    (Unavailable("nobody"), openai.InternalServerError, "server_error"),
    (DeadlineExceeded("late"), openai.InternalServerError, "server_error"),
]


@pytest.mark.parametrize(("error", "kind", "type_"), CLASSES, ids=lambda value: str(value)[:20])
async def test_each_error_is_the_class_that_clients_expect(
    gateway: GatewayBench, error: SpecinferError, kind: type[openai.APIStatusError], type_: str
) -> None:
    gateway.failures.append(error)
    async with client_of(gateway) as client:
        with pytest.raises(kind) as caught:
            await client.chat.completions.create(**chat_body())
    assert caught.value.code == error.reason.lower()
    assert caught.value.type == type_
    assert caught.value.request_id
    assert error.message in caught.value.message


async def test_retries_follow_the_hint(gateway: GatewayBench) -> None:
    gateway.failures.append(ResourceExhausted("full", retry_after=0.01))
    gateway.failures.append(Unavailable("nobody", retry_after=0.01))
    start = time.monotonic()
    async with client_of(gateway, max_retries=2) as client:
        answer = await client.chat.completions.create(**chat_body())
    assert answer.choices[0].message.content
    assert gateway.failures == []
    # Without the hint the client waits for more than a second in all.
    assert time.monotonic() - start < 0.9


async def test_what_a_retry_cannot_help_is_not_retried(gateway: GatewayBench) -> None:
    gateway.failures += [InternalError("ours"), InternalError("ours again")]
    async with client_of(gateway, max_retries=2) as client:
        with pytest.raises(openai.InternalServerError):
            await client.chat.completions.create(**chat_body())
    assert len(gateway.failures) == 1


async def test_a_full_router_says_when_to_come_back() -> None:
    admission = AdmissionLimits(max_streams=1, max_waiting=0)
    limits = RouterLimits(max_tree_nodes=32, admission=admission)
    async with running_gateway(limits=limits) as gateway, client_of(gateway) as client:
        (verifier,) = gateway.bench.verifiers
        verifier.gate.clear()
        stream = await client.chat.completions.create(**chat_body(), stream=True)
        assert await anext(stream)
        with pytest.raises(openai.RateLimitError) as caught:
            await client.chat.completions.create(**chat_body(), stream=True)
        assert int(caught.value.response.headers["retry-after-ms"]) > 0
        verifier.gate.set()
        assert [chunk async for chunk in stream]
        answer = await client.with_options(max_retries=2).chat.completions.create(**chat_body())
        assert answer.choices[0].finish_reason == "length"


async def test_a_stream_that_waits_for_a_place_is_kept_alive_until_it_is_refused() -> None:
    admission = AdmissionLimits(max_streams=1, max_wait_seconds=0.2)
    streams = StreamSettings(keep_alive_seconds=0.02)
    async with (
        running_gateway(limits=RouterLimits(admission=admission), streams=streams) as gateway,
        client_of(gateway) as client,
    ):
        (verifier,) = gateway.bench.verifiers
        verifier.gate.clear()
        async with await client.chat.completions.create(**chat_body(), stream=True):
            response = await gateway.chat(stream=True)
            assert response.status_code == 200
            assert response.content.startswith(b": keep-alive\n: keep-alive\n")
            assert response.content.endswith(b"data: [DONE]\n\n")
            with pytest.raises(openai.APIError) as caught:
                async for _ in await client.chat.completions.create(**chat_body(), stream=True):
                    pass
            assert caught.value.code == "resource_exhausted"
        verifier.gate.set()


async def test_hints_are_headers(gateway: GatewayBench) -> None:
    gateway.failures.append(ResourceExhausted("full", retry_after=1.25))
    response = await gateway.chat()
    assert response.status_code == 429
    assert response.headers["retry-after-ms"] == "1250"
    assert response.headers["retry-after"] == "2"
    assert response.headers["x-should-retry"] == "true"
    assert response.headers["x-request-id"]


async def test_a_client_that_runs_out_of_time_ends_its_session(gateway: GatewayBench) -> None:
    (verifier,) = gateway.bench.verifiers
    verifier.gate.clear()
    async with client_of(gateway, timeout=httpx.Timeout(0.2)) as client:
        with pytest.raises(openai.APITimeoutError):
            await client.chat.completions.create(**chat_body(max_tokens=400))
    verifier.gate.set()
    await verifier.wait_for("close", 1)


async def test_another_model_is_not_found(gateway: GatewayBench) -> None:
    async with client_of(gateway) as client:
        with pytest.raises(openai.NotFoundError) as caught:
            await client.chat.completions.create(**chat_body(model="other"))
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("other")


async def test_an_error_before_the_first_event_of_a_stream_has_its_status(
    gateway: GatewayBench,
) -> None:
    async with client_of(gateway) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(**chat_body(max_tokens=10_000), stream=True)
    assert caught.value.param == "max_tokens"


async def test_the_calls_own_id_comes_back_with_an_error_of_a_choice(
    gateway: GatewayBench,
) -> None:
    body, headers = chat_body(n=2, max_tokens=10_000), {"x-request-id": "mine-7"}
    response = await gateway.http.post("/v1/chat/completions", json=body, headers=headers)
    assert response.status_code == 400
    assert response.headers["x-request-id"] == "mine-7"


async def test_an_unforeseen_fault_leaks_nothing(gateway: GatewayBench) -> None:
    gateway.failures.append(ValueError("a secret"))  # type: ignore[arg-type]
    response = await gateway.http.post("/v1/completions", json=completion_body())
    assert response.status_code == 500
    assert "secret" not in response.text
    assert response.json()["error"]["code"] == "internal"
