"""What is refused: every parameter by its name, before any work is done for the request."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.kit.gateway import GatewayBench, running_gateway

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway() -> AsyncIterator[GatewayBench]:
    """One for all: a refused request leaves nothing behind."""
    async with running_gateway() as built:
        yield built


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"foo": 1}, "foo", "unknown_parameter"),
    ({"top_k": "3"}, "top_k", "invalid_request"),
    ({"n": 0}, "n", "invalid_request"),
    ({"n": 9}, "n", "invalid_request"),
    ({"temperature": -1}, "temperature", "invalid_request"),
    ({"temperature": "hot"}, "temperature", "invalid_request"),
    ({"top_p": 0}, "top_p", "invalid_request"),
    ({"stop": ["a"] * 17}, "stop", "invalid_request"),
    ({"stop": [3]}, "stop[0]", "invalid_request"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_request"),
    ({"logit_bias": {"7": 101}}, "logit_bias", "invalid_request"),
    ({"logit_bias": {"999": 1}}, "logit_bias", "invalid_request"),
    ({"max_tokens": 0}, "max_tokens", "invalid_request"),
    ({"max_tokens": 10**400}, "max_tokens", "invalid_request"),
    ({"top_k": -(10**400)}, "top_k", "invalid_request"),
    ({"temperature": 10**400}, "temperature", "invalid_request"),
    ({"logit_bias": {"7": 10**400}}, "logit_bias", "invalid_request"),
    ({"max_completion_tokens": 5}, "max_tokens", "invalid_request"),
    ({"messages": []}, "messages", "invalid_request"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "invalid_request"),
    ({"messages": [{"role": "god", "content": ""}]}, "messages[0]", "invalid_request"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0].type",
        "unsupported_value",
    ),
    ({"top_logprobs": 3}, "top_logprobs", "invalid_request"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_request"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_request"),
    ({"response_format": {"type": "xml"}}, "response_format", "invalid_request"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
        "response_format.json_schema.schema",
        "invalid_request",
    ),
    (
        {"structured_outputs": {"regex": "a", "choice": ["a"]}},
        "structured_outputs",
        "invalid_request",
    ),
    (
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        "structured_outputs",
        "invalid_request",
    ),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": {"type": "nonsense"}},
            }
        },
        "response_format",
        "invalid_request",
    ),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs", "invalid_request"),
    (
        {"structured_outputs": {"grammar": "start: nothing"}},
        "structured_outputs",
        "invalid_request",
    ),
    ({"structured_outputs": {}}, "structured_outputs", "invalid_request"),
    (
        {"structured_outputs": {"regex": "a"}, "ignore_eos": True},
        "ignore_eos",
        "invalid_request",
    ),
    ({"speculation": {"widths": [0]}}, "speculation.widths[0]", "invalid_request"),
    ({"speculation": {"widths": [31, 31]}}, "speculation.widths", "invalid_request"),
    ({"speculation": {"depth": 1}}, "speculation.depth", "unknown_parameter"),
    ({"audio": {"voice": "x"}}, "audio", "unsupported_parameter"),
    ({"web_search_options": {}}, "web_search_options", "unsupported_parameter"),
    ({"functions": []}, "functions", "unsupported_parameter"),
    ({"prompt_cache_retention": "24h"}, "prompt_cache_retention", "unsupported_parameter"),
    ({"prompt_cache_options": {}}, "prompt_cache_options", "unsupported_parameter"),
    ({"store": True}, "store", "unsupported_value"),
    ({"store": 1}, "store", "invalid_request"),
    ({"reasoning_effort": "high"}, "reasoning_effort", "unsupported_value"),
    ({"reasoning_effort": "hihg"}, "reasoning_effort", "invalid_request"),
    ({"modalities": ["text", "audio"]}, "modalities", "invalid_request"),
    ({"modalities": ["audio"]}, "modalities[0]", "unsupported_value"),
    ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0].type", "unsupported_value"),
    ({"tool_choice": {"type": "custom"}}, "tool_choice", "unsupported_value"),
    (
        {"messages": [{"role": "function", "name": "f", "content": ""}]},
        "messages[0]",
        "unsupported_value",
    ),
    (
        {"messages": [{"role": "assistant", "function_call": {"name": "f"}}]},
        "messages[0].function_call",
        "unsupported_parameter",
    ),
    ({"include_stop_str_in_output": True}, "include_stop_str_in_output", "unknown_parameter"),
    ({"min_tokens": 3}, "min_tokens", "unknown_parameter"),
    ({"priority": 1, "service_tier": "flex"}, "priority", "invalid_request"),
    ({"metadata": {"a" * 65: "b"}}, "metadata", "invalid_request"),
    ({"user": "a" * 513}, "user", "invalid_request"),
    ({"tool_choice": "required"}, "tool_choice", "invalid_request"),
]


@pytest.mark.parametrize(("changes", "param", "code"), REFUSED, ids=lambda value: str(value)[:40])
async def test_what_cannot_be_served_is_refused_by_name(
    gateway: GatewayBench, changes: dict[str, Any], param: str, code: str
) -> None:
    response = await gateway.chat(**changes)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == code
    # What is wrong deep inside may be named by the parameter around it.
    assert error["param"].startswith(param)
    assert error["type"] == "invalid_request_error"
    assert gateway.bench.verifiers[0].num_steps == 0


COMPLETION_REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [[999]]}, "prompt"),
    ({"prompt": ["a"] * 17}, "prompt"),
    ({"prompt": ["a"] * 3, "n": 8}, "n"),
    ({"suffix": "end"}, "suffix"),
    ({"best_of": 3}, "best_of"),
    ({"echo": True, "logprobs": 1}, "echo"),
    ({"logprobs": 6}, "logprobs"),
    ({"messages": []}, "messages"),
]


@pytest.mark.parametrize(("changes", "param"), COMPLETION_REFUSED, ids=str)
async def test_completions_refuse_by_name_too(
    gateway: GatewayBench, changes: dict[str, Any], param: str
) -> None:
    response = await gateway.complete(**changes)
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith(param)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"suffix": "end"}, "unsupported_parameter"),
        ({"best_of": 3}, "unsupported_value"),
        ({"echo": True, "logprobs": 1}, "unsupported_value"),
        ({"echo": True, "prompt": [7]}, "unsupported_value"),
    ],
    ids=str,
)
async def test_completions_tell_what_is_unsupported(
    gateway: GatewayBench, changes: dict[str, Any], code: str
) -> None:
    assert (await gateway.complete(**changes)).json()["error"]["code"] == code


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"temperature": NaN}',
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"max_tokens": ' + b"9" * 5000 + b"}",
        b"\xff\xfe",
        b'{"\\ud800": 1}',
        b'{"model": "table", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "table", "temperature": 1e999, "messages": [{"role":"user","content":"a"}]}',
        b'{"model": "table", "messages": [{"role": "user", "content": "\xed\xa0\x80"}]}',
        '{"model": "table", "messages": [{"role": "user", "content": "a"}]}'.encode("utf-16"),
        b'{"model": "table", "messages": [{"role": "user", "content": "a"}], "structured_outputs":'
        b' {"json": {"maximum": 1e999}}}',
        b'{"model": "table", "messages": [{"role": "assistant", "parsed": '
        + b"[" * 70
        + b"]" * 70
        + b"}]}",
    ],
    ids=range(15),
)
async def test_bodies_that_are_none_are_refused(gateway: GatewayBench, content: bytes) -> None:
    response = await gateway.http.post("/v1/chat/completions", content=content)
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
