"""Prompts and conversations become tokens within bounds, and templates stay in their sandbox."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import pytest

from specinfer.errors import InvalidRequest, Mismatch
from specinfer.messages import ChatMessage, GenerateRequest, ToolCall
from specinfer_router import chat_template as module
from specinfer_router.chat_template import ChatTemplate
from specinfer_router.checks import check_extras
from specinfer_router.tokenizer import ServedTokenizer
from tests.kit.fake_workers import CHAT_TEMPLATE, TOKENIZER_JSON
from tests.kit.tokenizers import sentencepiece_tokenizer

USER = (ChatMessage("user", "words"),)


def render(source: str, messages: Sequence[ChatMessage] = USER, *, most: int = 1000) -> str:
    return ChatTemplate(source, "<s>", "</s>", most).render(messages)


async def test_text_round_trips() -> None:
    served = ServedTokenizer(TOKENIZER_JSON)
    for text in ("words, words", "日本語 🙂", "x" * 5_000):
        token_ids = await served.encode(text)
        assert served.vocabulary.tokenizer.decode(token_ids) == text


async def test_the_tokenizer_puts_its_begin_token_before_prompts_only() -> None:
    json_ = sentencepiece_tokenizer().to_str().encode()
    served = ServedTokenizer(json_, chat_template="{{ bos_token }}the", bos_token="<s>")
    assert (await served.encode("the"))[0] == 1
    assert (await served.encode_chat(USER)).count(1) == 1


async def test_truncation_and_padding_of_the_file_are_switched_off() -> None:
    tokenizer = sentencepiece_tokenizer()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    served = ServedTokenizer(tokenizer.to_str().encode())
    assert len(await served.encode("the cat sat on the cat")) > 3
    assert len(await served.encode("the")) < 10


async def test_long_texts_do_not_hold_the_loop_up() -> None:
    served = ServedTokenizer(TOKENIZER_JSON)
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.001)

    ticking = asyncio.create_task(tick())
    await served.encode("many words " * 40_000)
    ticking.cancel()
    assert ticks > 5


async def test_length_is_checked_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    served = ServedTokenizer(
        TOKENIZER_JSON, chat_template=CHAT_TEMPLATE, max_prompt_characters=1000
    )
    monkeypatch.setattr(served, "_encode", None)
    monkeypatch.setattr(served._template, "render", None)
    with pytest.raises(InvalidRequest, match="1001 characters"):
        await served.encode("x" * 1001)
    with pytest.raises(InvalidRequest):
        await served.encode_chat([ChatMessage("user", "x" * 600)] * 2)
    with pytest.raises(InvalidRequest):
        await served.encode_chat([ChatMessage("user", "")] * 1001)
    with pytest.raises(InvalidRequest, match="empty"):
        await served.encode("")


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b'{"model": 1}'])
def test_what_is_no_tokenizer_is_refused(data: bytes) -> None:
    with pytest.raises(Mismatch):
        ServedTokenizer(data)


def test_a_template_sees_messages_and_tokens() -> None:
    source = """
{%- for message in messages %}
    {%- if message['role'] == 'system' %}{% continue %}{% endif %}
    {{- bos_token + message.role + ':' + message['content'] | trim + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'assistant:' }}{% endif %}"""
    messages = (ChatMessage("system", "be brief"), ChatMessage("user", " hi "))
    assert render(source, messages) == "<s>user:hi</s>assistant:"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[9].content.x }}",
        "{{ 1 // 0 }}",
        "{{ range(10000000) | list }}",
    ],
)
def test_what_a_template_refuses_is_the_callers_error(source: str) -> None:
    with pytest.raises(InvalidRequest):
        render(source)


def test_a_template_that_cannot_be_parsed_is_refused_at_start() -> None:
    with pytest.raises(Mismatch):
        ChatTemplate("{% for %}", "", "", 10)


def test_output_is_bounded_while_it_is_made() -> None:
    with pytest.raises(InvalidRequest, match="too long"):
        render("{% for i in range(100000) %}xxxxxxxxxx{% endfor %}", most=1000)


@pytest.mark.parametrize(
    "body", ["{% for j in range(100000) %}{% endfor %}", "{{ 'x' if j else '' }}"]
)
def test_time_is_bounded_with_or_without_output(body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TEMPLATE_SECONDS", 0.05)
    source = "{% for i in range(100000) %}{% for k in range(1000) %}" + body
    start = time.perf_counter()
    with pytest.raises(InvalidRequest, match="took more"):
        render(source + "{% endfor %}{% endfor %}", most=10**9)
    assert time.perf_counter() - start < 2


def called_with(arguments: str) -> tuple[ChatMessage, ...]:
    return (ChatMessage("assistant", "", tool_calls=(ToolCall("i", "n", arguments),)),)


HALF = "\ud800"
DEEP = "[" * 3000 + "]" * 3000
BAD_CONVERSATIONS = [
    (called_with(DEEP), (), "messages"),
    (called_with("[" * 60_000 + "]" * 60_000), (), "messages"),
    (called_with('{"a":"\\ud800"}'), (), "messages"),
    (called_with('{"\\udfff":1}'), (), "messages"),
    (called_with(HALF), (), "messages"),
    ((ChatMessage("user", HALF),), (), "messages"),
    ((ChatMessage(HALF, "hi"),), (), "messages"),
    (USER, (DEEP,), "tools"),
    (USER, ('{"a":' * 200 + "1" + "}" * 200,), "tools"),
    (USER, ('{"a":"\\ud800"}',), "tools"),
]


@pytest.mark.parametrize(("messages", "tools", "field"), BAD_CONVERSATIONS)
async def test_json_too_deep_and_half_characters_are_the_callers_error(
    messages: tuple[ChatMessage, ...], tools: tuple[str, ...], field: str
) -> None:
    source = "{{ messages | tojson }}{% if tools %}{{ tools | tojson }}{% endif %}"
    served = ServedTokenizer(TOKENIZER_JSON, chat_template=source)
    with pytest.raises(InvalidRequest) as caught:
        await served.encode_chat(messages, tools)
    assert caught.value.field == field


async def test_what_tools_are_called_with_may_be_nested() -> None:
    served = ServedTokenizer(TOKENIZER_JSON, chat_template="{{ messages | tojson }}")
    depth = module.MAX_JSON_DEPTH
    assert await served.encode_chat(called_with("[" * depth + "]" * depth))
    assert await served.encode_chat(called_with('{"a":"\\ud83d\\ude42"}')), "a pair is a character"


async def test_a_prompt_of_half_a_character_is_refused_by_its_field() -> None:
    served = ServedTokenizer(TOKENIZER_JSON)
    for field in ("prompt", "prediction"):
        with pytest.raises(InvalidRequest, match="Unicode") as caught:
            await served.encode("x" + HALF, field=field)
        assert caught.value.field == field


def test_an_affinity_key_of_half_a_character_is_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_extras(GenerateRequest(prompt="x", affinity_key=HALF))
    assert caught.value.field == "affinity_key"


async def test_content_is_data_and_never_a_template() -> None:
    text = "{{ 7 * 7 }}{% for %}"
    assert render(CHAT_TEMPLATE, (ChatMessage("user", text),)).count(text) == 1
