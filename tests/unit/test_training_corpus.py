"""The corpus says what the library says, in chats the template would write."""

from __future__ import annotations

import random

import pytest
from transformers import PreTrainedTokenizerFast

from specinfer_training.corpus import Card, build_cards, cards_of, sample_conversations
from specinfer_training.library import Item, read_library, summarise
from specinfer_training.tokenizer import (
    ASSISTANT,
    encode_chat,
    token_id,
    tokenizer_texts,
    train_tokenizer,
)


@pytest.fixture(scope="module")
def cards() -> list[Card]:
    return build_cards(read_library(("textwrap", "math", "heapq")))


@pytest.fixture(scope="module")
def tokenizer(cards: list[Card]) -> PreTrainedTokenizerFast:
    return train_tokenizer(tokenizer_texts(cards), 600)


def test_known_functions_are_described(cards: list[Card]) -> None:
    answers = {question: card.answer for card in cards for question in card.questions}
    assert answers["What does math.sqrt do?"] == (
        "The function math.sqrt(x): Return the square root of x."
    )
    assert "common leading whitespace" in answers["Explain textwrap.dedent."]
    assert "dedent" in answers["What is the textwrap module for?"]
    assert answers["What is the signature of heapq.merge?"].startswith("The signature is heapq.")


def test_private_names_stay_out() -> None:
    assert not [item for item in read_library(("textwrap",)) if "._" in item.name]


@pytest.mark.parametrize(
    ("doc", "expected"),
    [
        ("Return ``x``\n\nMore *text* here.", "Return x. More text here."),
        ("Use :func:`len` on it.\n\n>>> len(x)\n3", "Use len on it."),
        ("name(a, b) -- join the parts", "join the parts."),
        ("ALL CAPS ONLY", ""),
        ("short", ""),
    ],
)
def test_docstrings_become_prose(doc: str, expected: str) -> None:
    assert summarise(doc, "name") == expected


def test_long_docstrings_end_with_a_sentence() -> None:
    text = summarise("A sentence that is long enough. " * 40)
    assert text.endswith("enough.")
    assert len(text) <= 330


def test_modules_list_their_members() -> None:
    item = Item("box", "module", "", "Holds things.", members=tuple("abcdefghijklmnopq"))
    (card,) = cards_of(item)
    assert card.answer.startswith("The module box: Holds things. It provides a, b")
    assert card.answer.endswith("and more.")


def test_an_epoch_draws_each_card_by_its_weight() -> None:
    cards = [
        Card("often", "describe", ("a?",), "often", 3.0),
        Card("once", "describe", ("b?", "c?"), "once", 1.0),
        Card("rare", "describe", ("d?",), "rare", 0.0),
    ]
    turns = [turn for chat in sample_conversations(cards, random.Random(0)) for turn in chat]
    said = [answer for _, answer in turns]
    assert (said.count("often"), said.count("once"), said.count("rare")) == (3, 1, 0)


def test_encoding_equals_the_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = encode_chat(tokenizer, (("What?", "That."), ("And?", "No.")))
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "That."},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "No."},
    ]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    assert tokenizer.encode(text, add_special_tokens=False) == list(chat.ids)
    said = [token for token, marked in zip(chat.ids, chat.is_answer, strict=True) if marked]
    assert tokenizer.decode(said, skip_special_tokens=True) == "That.No."
    assert said[-1] == tokenizer.eos_token_id


def test_generation_prompt_ends_where_the_answer_starts(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    messages = [{"role": "user", "content": "What does math.sqrt do?"}]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids[-1] == token_id(tokenizer, ASSISTANT)
    assert tokenizer.decode(ids) == text


def test_a_saved_tokenizer_loads_again(
    tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    loaded = PreTrainedTokenizerFast.from_pretrained(folder)
    assert loaded.eos_token == "<|end|>"
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.encode("Größe?") == tokenizer.encode("Größe?")
    assert loaded.decode(loaded.encode("Größe?")) == "Größe?"
