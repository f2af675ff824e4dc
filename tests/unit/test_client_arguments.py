"""Bad arguments are named before anything is sent; good ones become one request."""

from __future__ import annotations

from typing import Any

import pytest

from specinfer import AsyncClient, ChatMessage, Client, InvalidRequest, SpeculationOptions
from specinfer.options import GenerateOptions, build_request

BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": 7}, "prompt"),
    ({"prompt": "\ud800"}, "prompt"),
    ({"prompt": "x", "token_ids": [1]}, "prompt"),
    ({"prompt": "x", "messages": [ChatMessage("user", "hi")]}, "prompt"),
    ({"token_ids": []}, "token_ids"),
    ({"token_ids": [-1]}, "token_ids"),
    ({"token_ids": [2**31]}, "token_ids"),
    ({"token_ids": [1.5]}, "token_ids"),
    ({"token_ids": "12"}, "token_ids"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": ["hi"]}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages"),
    ({"messages": [{"role": "", "content": "hi"}]}, "messages"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages"),
    ({"prompt": "x", "model": 3}, "model"),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "x", "max_tokens": True}, "max_tokens"),
    ({"prompt": "x", "temperature": -0.1}, "temperature"),
    ({"prompt": "x", "temperature": float("nan")}, "temperature"),
    ({"prompt": "x", "top_k": -1}, "top_k"),
    ({"prompt": "x", "top_k": 1.5}, "top_k"),
    ({"prompt": "x", "top_p": 0}, "top_p"),
    ({"prompt": "x", "min_p": 1.5}, "min_p"),
    ({"prompt": "x", "repetition_penalty": 0}, "repetition_penalty"),
    ({"prompt": "x", "presence_penalty": 3}, "presence_penalty"),
    ({"prompt": "x", "frequency_penalty": float("inf")}, "frequency_penalty"),
    ({"prompt": "x", "logit_bias": {-1: 1.0}}, "logit_bias"),
    ({"prompt": "x", "logit_bias": {1: 1e9}}, "logit_bias"),
    ({"prompt": "x", "logit_bias": [1]}, "logit_bias"),
    ({"prompt": "x", "seed": -1}, "seed"),
    ({"prompt": "x", "seed": 2**63}, "seed"),
    ({"prompt": "x", "stop": [""]}, "stop"),
    ({"prompt": "x", "stop": ["a"] * 17}, "stop"),
    ({"prompt": "x", "stop": [3]}, "stop"),
    ({"prompt": "x", "stop_token_ids": [-1]}, "stop_token_ids"),
    ({"prompt": "x", "stop_token_ids": 5}, "stop_token_ids"),
    ({"prompt": "x", "ignore_eos": "yes"}, "ignore_eos"),
    ({"prompt": "x", "logprobs": 21}, "logprobs"),
    ({"prompt": "x", "logprobs": True}, "logprobs"),
    ({"prompt": "x", "speculation": "off"}, "speculation"),
    ({"prompt": "x", "speculation": SpeculationOptions(max_nodes=-1)}, "speculation.max_nodes"),
    ({"prompt": "x", "speculation": SpeculationOptions(max_depth=1024)}, "speculation.max_depth"),
    ({"prompt": "x", "speculation": SpeculationOptions(widths=(0,))}, "speculation.widths"),
    ({"prompt": "x", "timeout": 0}, "timeout"),
    ({"prompt": "x", "timeout": -1}, "timeout"),
    ({"prompt": "x", "timeout": "5"}, "timeout"),
    ({"prompt": "x", "request_id": 5}, "request_id"),
    ({"prompt": "x", "request_id": "a\nb"}, "request_id"),
    ({"prompt": "x", "request_id": "a" * 129}, "request_id"),
]


@pytest.mark.parametrize(("arguments", "field"), BAD)
async def test_bad_arguments_are_named_without_a_network(
    arguments: dict[str, Any], field: str
) -> None:
    client = AsyncClient("127.0.0.1:1")
    with pytest.raises(InvalidRequest) as caught:
        client.stream(**arguments)
    assert caught.value.field == field
    with pytest.raises(InvalidRequest):
        await client.generate(**arguments)
    assert not client._connection.opened
    await client.close()


def test_an_unknown_option_is_a_type_error() -> None:
    options: Any = {"temprature": 1}
    with pytest.raises(TypeError, match="temprature"):
        build_request("hello", options)


@pytest.mark.parametrize("kind", [AsyncClient, Client])
def test_bad_clients_are_refused(kind: Any) -> None:
    with pytest.raises(InvalidRequest, match="address"):
        kind("")
    with pytest.raises(InvalidRequest, match="timeout"):
        kind(timeout=0)


def test_none_is_the_default() -> None:
    options: GenerateOptions = {
        "max_tokens": None,
        "seed": None,
        "logprobs": None,
        "timeout": None,
    }
    assert build_request("hello", {"request_id": "r"}) == build_request(
        "hello", {**options, "request_id": "r"}
    )
