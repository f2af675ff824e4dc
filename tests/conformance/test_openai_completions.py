"""Completions with the real `openai` client, and what tells tokens from text."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from openai import AsyncOpenAI

from tests.kit.fake_workers import continuation
from tests.kit.gateway import GatewayBench, completion_body, running_gateway
from tests.kit.tokenizers import byte_level_tokenizer

TOKENIZER = byte_level_tokenizer()


@pytest.fixture
async def gateway() -> AsyncIterator[GatewayBench]:
    async with running_gateway() as built:
        yield built


@pytest.fixture
async def client(gateway: GatewayBench) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=gateway.url + "/v1", api_key="none", max_retries=0) as built:
        yield built


def plain_text(prompt_ids: list[int], num_tokens: int, seed: int) -> str:
    """What plain decoding of the table says after a prompt."""
    text = TOKENIZER.decode(list(continuation(prompt_ids, num_tokens, seed)))
    assert isinstance(text, str)
    return text


async def test_text_and_tokens_are_continued_alike(client: AsyncOpenAI) -> None:
    prompt_ids = TOKENIZER.encode("words").ids
    expected = plain_text(prompt_ids, 24, 3)
    for prompt in ("words", prompt_ids):
        answer = await client.completions.create(**completion_body(prompt=prompt))
        assert answer.object == "text_completion"
        assert answer.choices[0].text == expected
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(prompt_ids)


async def test_several_prompts_with_n_choices_each(client: AsyncOpenAI) -> None:
    prompts = ["words", "text"]
    answer = await client.completions.create(**completion_body(prompt=prompts, n=2))
    expected = [
        plain_text(TOKENIZER.encode(prompt).ids, 24, seed) for prompt in prompts for seed in (3, 4)
    ]
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(len(TOKENIZER.encode(text).ids) for text in prompts)
    assert answer.usage.completion_tokens == 96
    ids = [TOKENIZER.encode(prompt).ids for prompt in prompts]
    tokens = await client.completions.create(**completion_body(prompt=ids, n=2))
    assert [choice.text for choice in tokens.choices] == expected


async def test_sixteen_tokens_are_made_when_nobody_says(client: AsyncOpenAI) -> None:
    body = completion_body()
    del body["max_tokens"]
    usage = (await client.completions.create(**body)).usage
    assert usage is not None
    assert usage.completion_tokens == 16


async def test_echo_says_the_prompt_first(client: AsyncOpenAI) -> None:
    plain = await client.completions.create(**completion_body())
    echoed = await client.completions.create(**completion_body(echo=True))
    assert echoed.choices[0].text == "words" + plain.choices[0].text
    stream = await client.completions.create(**completion_body(echo=True), stream=True)
    text = "".join([chunk.choices[0].text async for chunk in stream])
    assert text == echoed.choices[0].text


async def test_legacy_logprobs_are_parallel_lists(client: AsyncOpenAI) -> None:
    answer = await client.completions.create(**completion_body(logprobs=2))
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    tokens = logprobs.tokens or []
    # Tokens without text, here a mark of the template, are left out.
    token_ids = continuation(TOKENIZER.encode("words").ids, 24, 3)
    number = sum(TOKENIZER.decode([token_id]) != "" for token_id in token_ids)
    assert len(tokens) == number == 23
    assert logprobs.token_logprobs == [-0.5] * number
    assert logprobs.top_logprobs == [{token: -0.5} for token in tokens]
    offsets = [sum(len(token) for token in tokens[:index]) for index in range(number)]
    assert logprobs.text_offset == offsets
    stream = await client.completions.create(**completion_body(logprobs=2), stream=True)
    streamed: list[int] = []
    async for chunk in stream:
        part = chunk.choices[0].logprobs
        streamed += (part.text_offset or []) if part else []
    assert streamed == offsets


async def test_a_stream_adds_up_and_ends_with_usage(client: AsyncOpenAI) -> None:
    whole = await client.completions.create(**completion_body(n=2))
    stream = await client.completions.create(
        **completion_body(n=2), stream=True, stream_options={"include_usage": True}
    )
    texts = ["", ""]
    *chunks, last = [chunk async for chunk in stream]
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 48


async def test_stop_tokens_end_the_text_and_are_named(gateway: GatewayBench) -> None:
    prompt_ids = TOKENIZER.encode("words").ids
    stop = continuation(prompt_ids, 24, 3)[9]
    choice = (await gateway.complete(stop_token_ids=[stop])).json()["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", str(stop))


@pytest.mark.parametrize("prefix", ["", "/v1"])
async def test_tokenize_and_back(gateway: GatewayBench, prefix: str) -> None:
    body = {"prompt": "words words 🙂", "return_token_strs": True}
    found = (await gateway.http.post(f"{prefix}/tokenize", json=body)).json()
    assert found["tokens"] == TOKENIZER.encode("words words 🙂").ids
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == 512
    back = await gateway.http.post(f"{prefix}/detokenize", json={"tokens": found["tokens"]})
    assert back.json() == {"prompt": "words words 🙂"}


async def test_conversations_are_tokenized_as_chat_does(gateway: GatewayBench) -> None:
    messages = [{"role": "user", "content": "words"}]
    found = (await gateway.http.post("/tokenize", json={"messages": messages})).json()
    assert found["tokens"] == TOKENIZER.encode("<|user|>words<|assistant|>").ids
    usage = (await gateway.chat(messages=messages)).json()["usage"]
    assert usage["prompt_tokens"] == found["count"]


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, 400, "messages"),
        ("/tokenize", {"prompt": "a" * 100_001}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "model"),
        ("/detokenize", {"tokens": [356]}, 400, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, 400, "tokens[0]"),
        ("/detokenize", {"tokens": [1], "model": "other"}, 404, "model"),
    ],
)
async def test_tokenize_refuses_by_name(
    gateway: GatewayBench, path: str, body: dict[str, object], status: int, param: str
) -> None:
    response = await gateway.http.post(path, json=body)
    assert response.status_code == status
    assert response.json()["error"]["param"] == param
