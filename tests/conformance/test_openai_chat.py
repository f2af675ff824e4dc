"""Chat completions with the real `openai` client, without streams."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletion
from pydantic import BaseModel

from tests.kit.fake_workers import continuation
from tests.kit.gateway import TOOLS_TEMPLATE, GatewayBench, chat_body, running_gateway, saying
from tests.kit.tokenizers import byte_level_tokenizer

MESSAGES = [{"role": "user", "content": "words"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}


@pytest.fixture
async def gateway() -> AsyncIterator[GatewayBench]:
    async with running_gateway() as built:
        yield built


@pytest.fixture
async def client(gateway: GatewayBench) -> AsyncIterator[AsyncOpenAI]:
    async with client_of(gateway) as built:
        yield built


def client_of(gateway: GatewayBench) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=gateway.url + "/v1", api_key="none", max_retries=0)


def plain_text(prompt: str, num_tokens: int, seed: int) -> str:
    """What plain decoding of the table says after a prompt."""
    tokenizer = byte_level_tokenizer()
    prompt_ids = tokenizer.encode(prompt).ids
    text = tokenizer.decode(list(continuation(prompt_ids, num_tokens, seed)))
    assert isinstance(text, str)
    return text


async def test_an_answer_is_what_plain_decoding_gives(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(**chat_body())
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model) == ("chat.completion", "table")
    assert answer.system_fingerprint
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == plain_text("<|user|>words<|assistant|>", 24, 3)
    assert choice.finish_reason == "length"


async def test_usage_counts_prompt_completion_cached_and_guessed_tokens(
    client: AsyncOpenAI,
) -> None:
    usage = (await client.chat.completions.create(**chat_body())).usage
    assert usage is not None
    prompt_ids = byte_level_tokenizer().encode("<|user|>words<|assistant|>").ids
    assert usage.prompt_tokens == len(prompt_ids)
    assert usage.completion_tokens == 24
    assert usage.total_tokens == len(prompt_ids) + 24
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 2
    details = usage.completion_tokens_details
    assert details is not None
    assert details.accepted_prediction_tokens
    assert details.rejected_prediction_tokens is not None
    assert details.reasoning_tokens == 0


async def test_speculation_off_gives_the_same_text_and_no_guesses(client: AsyncOpenAI) -> None:
    fast = await client.chat.completions.create(**chat_body())
    off = {"speculation": {"enabled": False}}
    slow = await client.chat.completions.create(**chat_body(), extra_body=off)
    assert slow.choices[0].message.content == fast.choices[0].message.content
    assert slow.usage is not None
    assert slow.usage.completion_tokens_details is not None
    assert slow.usage.completion_tokens_details.accepted_prediction_tokens == 0


async def test_the_sync_client_reads_the_same(gateway: GatewayBench, client: AsyncOpenAI) -> None:
    def ask() -> str | None:
        with OpenAI(base_url=gateway.url + "/v1", api_key="none", max_retries=0) as sync:
            answer: ChatCompletion = sync.chat.completions.create(**chat_body())
            return answer.choices[0].message.content

    answer = await client.chat.completions.create(**chat_body())
    assert await asyncio.to_thread(ask) == answer.choices[0].message.content


async def test_n_choices_have_seeds_counted_up(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(**chat_body(n=3))
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    expected = [plain_text("<|user|>words<|assistant|>", 24, seed) for seed in (3, 4, 5)]
    assert [choice.message.content for choice in answer.choices] == expected
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 72
    assert answer.usage.prompt_tokens < 30


async def test_stop_cuts_the_text_before_the_string(client: AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(**chat_body())
    text = whole.choices[0].message.content or ""
    stop = text[8:10]
    for form in (stop, ["never said", stop]):
        cut = (await client.chat.completions.create(**chat_body(stop=form))).choices[0]
        assert cut.message.content == text[: text.index(stop)]
        assert cut.finish_reason == "stop"


async def test_a_seed_repeats_and_none_is_random(client: AsyncOpenAI) -> None:
    body = chat_body()
    del body["seed"]
    first = await client.chat.completions.create(**body)
    second = await client.chat.completions.create(**body)
    assert first.choices[0].message.content != second.choices[0].message.content
    seeds = first.to_dict()["seeds"]
    assert isinstance(seeds, list)
    again = await client.chat.completions.create(**body, seed=seeds[0])
    assert again.choices[0].message.content == first.choices[0].message.content


async def test_negative_seeds_are_seeds_too(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(**chat_body(seed=-1))
    same = await client.chat.completions.create(**chat_body(seed=-1))
    assert answer.choices[0].message.content == same.choices[0].message.content


async def test_logprobs_have_tokens_bytes_and_alternatives(client: AsyncOpenAI) -> None:
    body = chat_body(logprobs=True, top_logprobs=2, max_tokens=9)
    choice = (await client.chat.completions.create(**body)).choices[0]
    assert choice.logprobs is not None
    content = choice.logprobs.content
    assert content is not None
    assert len(content) == 9
    joined = b"".join(bytes(item.bytes or ()) for item in content)
    assert joined.decode(errors="replace") == choice.message.content
    assert [item.logprob for item in content] == [-0.5] * 9
    assert all(len(item.top_logprobs) == 2 for item in content)
    # A piece of a character is replaced in the text and exact in the bytes.
    for item in content:
        assert bytes(item.bytes or ()).decode(errors="replace") == item.token


async def test_sampling_fields_reach_the_verify_worker() -> None:
    opened = []
    verifier = saying("words")
    inner = verifier._do

    def spy(item):  # type: ignore[no-untyped-def]
        if item.WhichOneof("action") == "open":
            opened.append(item.open)
        return inner(item)

    verifier._do = spy  # type: ignore[method-assign]
    async with running_gateway(verifiers=[verifier]) as gateway, client_of(gateway) as client:
        await client.chat.completions.create(
            **chat_body(
                temperature=0.5,
                top_p=0.75,
                presence_penalty=0.25,
                frequency_penalty=-0.5,
                logit_bias={"17": -100, "18": 3.5},
            ),
            extra_body={"top_k": 9, "min_p": 0.125, "repetition_penalty": 1.5},
        )
    (sampling,) = [each.sampling for each in opened]
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.75, 9)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.25, -0.5)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.125, 1.5)
    assert dict(sampling.logit_bias) == {17: -100.0, 18: 3.5}
    assert sampling.seed == 3


async def test_both_names_of_the_most_tokens_count(client: AsyncOpenAI) -> None:
    body = chat_body(max_completion_tokens=5)
    del body["max_tokens"]
    answer = await client.chat.completions.create(**body)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5
    assert answer.choices[0].finish_reason == "length"


async def test_every_field_of_a_cautious_client_is_taken(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        **chat_body(
            messages=[
                {"role": "developer", "content": "be brief"},
                {"role": "user", "content": [{"type": "text", "text": "wor"}], "name": "ann"},
                {"role": "assistant", "content": "words", "refusal": None},
                {"role": "user", "content": "words"},
            ],
            user="ann",
            metadata={"trace": "7"},
            service_tier="auto",
            store=False,
            modalities=["text"],
            parallel_tool_calls=True,
            prompt_cache_key="ann",
            safety_identifier="ann",
            prediction={"type": "content", "content": "words words"},
            response_format={"type": "text"},
            temperature=None,
            audio=None,
            functions=None,
        )
    )
    assert answer.service_tier == "default"


async def test_vllm_metrics_are_where_benchmarks_look_for_them(client: AsyncOpenAI) -> None:
    body = chat_body(n=2)
    detail = {"speculation": {"detail": True}}
    answer = await client.chat.completions.create(**body, extra_body=detail)
    stats = answer.to_dict()["metrics"]["speculative_decoding"]
    histogram = stats["acceptance_histogram"]
    assert sum(histogram) == stats["num_spec_steps"]
    accepted = sum(index * count for index, count in enumerate(histogram))
    assert accepted == stats["num_accepted_draft_tokens"] > 0
    assert stats["num_accepted_draft_tokens"] <= stats["num_draft_tokens"]
    mean = 1 + stats["num_accepted_draft_tokens"] / stats["num_spec_steps"]
    assert stats["mean_acceptance_length"] == pytest.approx(mean)
    assert len(histogram) == stats["num_spec_tokens"] + 1
    assert sum(stats["per_step_accepted"]) == accepted
    assert sum(stats["per_step_drafted"]) == stats["num_draft_tokens"]
    assert answer.usage is not None
    details = answer.usage.completion_tokens_details
    assert details is not None
    assert details.accepted_prediction_tokens == accepted


class Point(BaseModel):
    """What `parse` makes of an answer."""

    x: int
    label: str


async def test_parse_makes_a_model_of_the_answer() -> None:
    async with (
        running_gateway(verifiers=[saying('{"x": 4, "label": "words"}')]) as gateway,
        client_of(gateway) as client,
    ):
        answer = await client.chat.completions.parse(
            **chat_body(max_tokens=60), response_format=Point
        )
        assert answer.choices[0].message.parsed == Point(x=4, label="words")
        assert answer.choices[0].finish_reason == "stop"


async def test_calls_of_tools_come_as_calls() -> None:
    said = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    verifier = saying(said, chat_template=TOOLS_TEMPLATE)
    async with running_gateway(verifiers=[verifier]) as gateway, client_of(gateway) as client:
        body = chat_body(max_tokens=120, tools=[WEATHER])
        choice = (await client.chat.completions.create(**body)).choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        assert choice.message.tool_calls is not None
        (call,) = choice.message.tool_calls
        assert call.type == "function"
        assert call.function.name == "weather"
        assert json.loads(call.function.arguments) == {"city": "Oslo"}
        again = [
            *MESSAGES,
            choice.message.model_dump(),
            {"role": "tool", "tool_call_id": call.id, "content": "rain"},
        ]
        body["messages"] = again
        await client.chat.completions.create(**body)


async def test_models_are_listed_and_found(client: AsyncOpenAI) -> None:
    models = [model async for model in client.models.list()]
    assert [model.id for model in models] == ["table"]
    found = await client.models.retrieve("table")
    assert found.to_dict()["specinfer"]["row_invariant"] is True  # type: ignore[index]


async def test_raw_and_streaming_responses_have_headers(client: AsyncOpenAI) -> None:
    raw = await client.chat.completions.with_raw_response.create(
        **chat_body(), extra_headers={"x-request-id": "mine-7"}
    )
    assert raw.headers["x-request-id"]
    answer = raw.parse()
    assert answer.choices[0].message.content
    assert answer._request_id == raw.headers["x-request-id"]
    async with client.chat.completions.with_streaming_response.create(
        **chat_body(stream=True)
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line async for line in response.iter_lines()]
    assert "data: [DONE]" in lines
