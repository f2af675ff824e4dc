"""Text comes out in whole characters and is the text of decoding everything at once."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from specinfer_router.text import CONTEXT_TOKENS, Detokenizer, StopMatcher, Vocabulary
from tests.kit.tokenizers import byte_level_tokenizer, sentencepiece_tokenizer

BYTE_LEVEL = Vocabulary.of(byte_level_tokenizer())
SENTENCEPIECE = Vocabulary.of(sentencepiece_tokenizer())
KINDS = pytest.mark.parametrize("vocabulary", [BYTE_LEVEL, SENTENCEPIECE], ids=["bytes", "window"])


def pieces_of(detokenizer: Detokenizer, token_ids: Sequence[int]) -> list[str]:
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.flush()]


def at_once(tokenizer: Tokenizer, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> str:
    before: str = tokenizer.decode(list(prompt_ids))
    whole: str = tokenizer.decode([*prompt_ids, *token_ids])
    return whole[len(before) :]


def byte_tokens(vocabulary: Vocabulary, data: bytes) -> list[int]:
    """One token for each byte."""
    if vocabulary is SENTENCEPIECE:
        found = [vocabulary.tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in data]
    else:
        letters = {byte: letter for letter, byte in _alphabet().items()}
        found = [vocabulary.tokenizer.token_to_id(letters[byte]) for byte in data]
    assert None not in found
    return [token_id for token_id in found if token_id is not None]


def _alphabet() -> dict[str, int]:
    from specinfer_router.text import _byte_alphabet

    return _byte_alphabet()


def test_the_kinds_are_recognised() -> None:
    assert BYTE_LEVEL.byte_level
    assert not SENTENCEPIECE.byte_level
    assert len(SENTENCEPIECE.byte_ids) == 256
    assert BYTE_LEVEL.special_ids == {0, 1, 2}


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, BYTE_LEVEL.tokenizer.get_vocab_size() + 3), max_size=60))
def test_any_tokens_of_a_byte_level_vocabulary(token_ids: list[int]) -> None:
    text = "".join(pieces_of(BYTE_LEVEL.detokenizer(()), token_ids))
    assert text == BYTE_LEVEL.tokenizer.decode(token_ids)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(0, 268), max_size=8),
    st.lists(st.one_of(st.integers(258, 268), st.integers(0, 268)), max_size=40),
)
def test_any_tokens_of_a_sentencepiece_vocabulary(prompt: list[int], token_ids: list[int]) -> None:
    prompt = [*prompt, 260]
    text = "".join(pieces_of(SENTENCEPIECE.detokenizer(prompt), token_ids))
    assert text == at_once(SENTENCEPIECE.tokenizer, prompt, token_ids)


@KINDS
@pytest.mark.parametrize("text", ["é", "日本", "🙂🙃", "a🙂b"])
def test_a_character_comes_whole(vocabulary: Vocabulary, text: str) -> None:
    token_ids = byte_tokens(vocabulary, text.encode())
    pieces = pieces_of(vocabulary.detokenizer([259]), token_ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_become_text_as_soon_as_a_character_is_whole() -> None:
    pieces = pieces_of(BYTE_LEVEL.detokenizer(()), byte_tokens(BYTE_LEVEL, "é🙂".encode()))
    assert pieces == ["", "é", "", "", "", "🙂", ""]


@KINDS
@pytest.mark.parametrize("data", [b"\xe2\x82", b"\xff", b"a\xf0\x9f", b"\xe2\x82\xac\xff"])
def test_what_never_becomes_a_character_is_marked(vocabulary: Vocabulary, data: bytes) -> None:
    token_ids = byte_tokens(vocabulary, data)
    text = "".join(pieces_of(vocabulary.detokenizer(()), token_ids))
    assert text == vocabulary.tokenizer.decode(token_ids)
    assert "\ufffd" in text


def test_the_first_word_keeps_its_space() -> None:
    the, cat = (SENTENCEPIECE.tokenizer.token_to_id(word) for word in ("▁the", "▁cat"))
    assert the is not None
    assert cat is not None
    detokenizer = SENTENCEPIECE.detokenizer([the] * (CONTEXT_TOKENS + 3))
    assert pieces_of(detokenizer, [cat]) == [" cat", ""]


@KINDS
def test_special_tokens_have_no_text(vocabulary: Vocabulary) -> None:
    assert pieces_of(vocabulary.detokenizer(()), sorted(vocabulary.special_ids)) == [""] * 4


@pytest.mark.parametrize("data", ["🙂".encode(), b"\xff", b"a"], ids=["emoji", "invalid", "letter"])
@KINDS
def test_a_token_costs_the_same_however_many_came_before(
    vocabulary: Vocabulary, data: bytes
) -> None:
    """Twenty times the tokens may cost twenty times the time, not four hundred times."""

    def seconds(num_tokens: int) -> float:
        token_ids = byte_tokens(vocabulary, data * (num_tokens // len(data)))
        start = time.perf_counter()
        pieces_of(vocabulary.detokenizer(()), token_ids)
        return time.perf_counter() - start

    few = min(seconds(500) for _ in range(5))
    many = min(seconds(10_000) for _ in range(3))
    assert many < 100 * few


def by_characters(stops: Sequence[str], text: str) -> tuple[str, str]:
    """What a stop matcher should do, the slow way: look at every prefix of the text."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, ""


def run_matcher(stops: Sequence[str], pieces: Sequence[str]) -> tuple[str, str]:
    matcher, shown = StopMatcher(stops), ""
    for piece in pieces:
        free, match = matcher.push(piece)
        shown += free
        if match:
            return shown, match
    return shown + matcher.flush(), ""


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4),
    st.lists(st.text("abc", max_size=4), max_size=10),
)
def test_stop_strings_are_found_wherever_the_text_is_split(
    stops: list[str], pieces: list[str]
) -> None:
    assert run_matcher(stops, pieces) == by_characters(stops, "".join(pieces))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4),
    st.text("abc", max_size=20),
)
def test_exactly_what_may_begin_a_stop_string_is_held_back(stops: list[str], text: str) -> None:
    shown, match = StopMatcher(stops).push(text)
    if match:
        return
    beginnings = [stop[:size] for stop in stops for size in range(1, len(stop))]
    held = max((len(part) for part in beginnings if text.endswith(part)), default=0)
    assert shown == text[: len(text) - held]


@pytest.mark.parametrize(
    ("stops", "pieces", "expected"),
    [
        (["\n\n"], ["one\n", "\ntwo"], ("one", "\n\n")),
        (["END", "ND"], ["the E", "N", "D."], ("the ", "END")),
        (["aab"], ["aaa", "aab"], ("aaa", "aab")),
        (["🙂!"], ["hi 🙂", "!"], ("hi ", "🙂!")),
        (["xyz"], ["xy"], ("xy", "")),
    ],
)
def test_examples_of_stop_strings(
    stops: list[str], pieces: list[str], expected: tuple[str, str]
) -> None:
    assert run_matcher(stops, pieces) == expected


@KINDS
def test_the_bytes_of_tokens_put_together_are_the_text(vocabulary: Vocabulary) -> None:
    text = "the naïve cat 日本語 🙂"
    token_ids = vocabulary.tokenizer.encode(text, add_special_tokens=False).ids
    joined = b"".join(vocabulary.token_bytes(token_id) for token_id in token_ids).decode()
    assert joined.removeprefix(" ") == text


def test_a_token_that_is_part_of_a_character_has_a_text_that_can_be_shown() -> None:
    part = byte_tokens(BYTE_LEVEL, b"\xf0")[0]
    assert BYTE_LEVEL.token_bytes(part) == b"\xf0"
    assert BYTE_LEVEL.token_texts([part, 10**6]) == ("\ufffd", "")
