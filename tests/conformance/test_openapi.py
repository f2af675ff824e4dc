"""The OpenAPI document is one, names every route, and holds every answer that the API gives."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from typing import Any

import pytest
import requests
from jsonschema import Draft202012Validator
from starlette.routing import Route

from specinfer_router.gateway.app import api_routes
from tests.kit.fake_drafter import FakeDrafter
from tests.kit.fake_workers import FakeVerifier, info_of
from tests.kit.fuzz import fuzz
from tests.kit.gateway import GatewayBench, running_gateway

# 2,000 take a minute: SPECINFER_FUZZ_CASES=2000 pytest tests/conformance/test_openapi.py
NUM_CASES = int(os.environ.get("SPECINFER_FUZZ_CASES", "150"))


@pytest.fixture
async def gateway() -> AsyncIterator[GatewayBench]:
    # A short model, so that calls which ask for all they can get stay short.
    verifier = FakeVerifier(info_of("verify", max_model_len=96))
    drafter = FakeDrafter(info_of("draft", max_model_len=96))
    async with running_gateway(verifiers=[verifier], drafters=[drafter]) as built:
        yield built


@pytest.fixture
async def document(gateway: GatewayBench) -> dict[str, Any]:
    answer = await gateway.http.get("/openapi.json")
    assert answer.status_code == 200
    found: dict[str, Any] = answer.json()
    return found


def test_every_route_is_in_the_document(document: dict[str, Any]) -> None:
    def no_router() -> Any:
        raise AssertionError("no route is called")

    served = {
        (route.path.replace(":path}", "}"), method.lower())
        for route in api_routes(no_router)
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }
    described = {(path, method) for path, item in document["paths"].items() for method in item}
    assert described == served


def test_schemas_are_schemas_and_refer_to_each_other(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)
    text = json.dumps(document)
    for reference in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert reference in schemas


async def test_bodies_say_what_the_served_model_takes(document: dict[str, Any]) -> None:
    properties = document["components"]["schemas"]["ChatBody"]["properties"]
    assert properties["model"]["enum"] == ["table", ""]
    assert properties["max_tokens"]["anyOf"][0]["maximum"] == 95


async def run(gateway: GatewayBench, document: dict[str, Any], num_cases: int = NUM_CASES) -> Any:
    def known(session: requests.Session) -> dict[str, str]:
        body: Any = {"input": "words", "max_output_tokens": 2}
        made = session.post(f"{gateway.url}/v1/responses", json=body, timeout=30).json()
        return {"response_id": made["id"], "model": "table"}

    return await asyncio.to_thread(fuzz, gateway.url, document, num_cases, known)


@pytest.mark.timeout(900)
async def test_no_answer_is_a_fault_or_undeclared(
    gateway: GatewayBench, document: dict[str, Any]
) -> None:
    report = await run(gateway, document)
    assert report.num_cases >= NUM_CASES
    assert report.failures == []
    fine = {operation for operation, status in report.statuses if status == 200}
    assert len(fine) >= 10, report.statuses


async def test_the_fuzzer_sees_what_is_undeclared(
    gateway: GatewayBench, document: dict[str, Any]
) -> None:
    """A control: a document that leaves something out, or is wrong about it, fails."""
    document["paths"] = {"/tokenize": document["paths"]["/tokenize"]}
    del document["paths"]["/tokenize"]["post"]["responses"]["400"]
    document["components"]["schemas"]["Tokenized"]["required"].append("nonsense")
    report = await run(gateway, document, 20)
    assert any("UndefinedStatusCode" in failure for failure in report.failures)
    assert any("nonsense" in failure for failure in report.failures)
