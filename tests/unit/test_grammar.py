"""Grammars over tokens: what they allow, whatever was asked before, and what is refused."""

from __future__ import annotations

import asyncio
import json
import random
import re
import threading
from collections.abc import Iterator

import pytest
from tokenizers import Tokenizer

from specinfer.errors import InvalidRequest, Mismatch, ResourceExhausted
from specinfer.grammar import (
    GrammarChecker,
    GrammarCompiler,
)
from specinfer.grammar_bounds import (
    MAX_CHOICES,
    MAX_JSON_DEPTH,
    MAX_PATTERN_BYTES,
    MAX_SCHEMA_BYTES,
)
from specinfer.messages import Grammar
from tests.kit.grammars import (
    LETTERS,
    HeldCompiler,
    letters_compiler,
    regex_state,
    token_ids_of,
)
from tests.kit.tokenizers import byte_level_tokenizer, letters_tokenizer, sentencepiece_tokenizer

PATTERNS = ("(ab)*a?", "a{2,5}b?", "(a|bb)+", "ab|ba|aab", "b*(ab)?b")


def byte_compiler(**options: int) -> GrammarCompiler:
    tokenizer = byte_level_tokenizer()
    content = tokenizer.to_str().encode()
    return GrammarCompiler(content, tokenizer.get_vocab_size(), (0,), **options)


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return byte_compiler()


def prefixes(pattern: str, longest: int = 7) -> Iterator[str]:
    """Every text of a and b up to a length that begins a match, found by trying all of them."""
    texts = [""]
    for _ in range(longest):
        texts += [text + letter for text in texts for letter in "ab"]
    matches = {text for text in set(texts) if re.fullmatch(pattern, text)}
    yield from {match[:end] for match in matches for end in range(len(match) + 1)}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_allowed_tokens_are_those_that_a_match_can_go_on_with(pattern: str) -> None:
    known = set(prefixes(pattern))
    state = regex_state(pattern)
    paths: list[tuple[int, ...]] = [()]
    for path in paths:
        text = "".join(LETTERS[token_id] for token_id in path)
        expected = [n for n, token in enumerate(LETTERS) if text + token in known]
        if re.fullmatch(pattern, text):
            expected = sorted([*expected, 0, 4])
        # Matches longer than those tried are not known here, so long paths are left out.
        if len(text) < 4:
            assert token_ids_of(state.mask_after(path)) == expected, (path, text)
            paths += [(*path, token_id) for token_id in expected if token_id not in (0, 4)]
    assert len(paths) > 3


def test_what_is_allowed_depends_on_the_output_alone(compiler: GrammarCompiler) -> None:
    """Questions in any order, back and forth over a tree: a fresh state says the same."""
    schema = '{"type":"object","properties":{"a":{"type":"array","items":{"type":"integer"}}}}'
    compiled = compiler.compile(Grammar("json_schema", schema))
    rng, state = random.Random(4), compiled.start()
    known: list[list[int]] = [[]]
    for _ in range(400):
        path = rng.choice(known)
        allowed = token_ids_of(state.mask_after(path))
        assert allowed == token_ids_of(compiled.start().mask_after(path)), path
        assert allowed
        token_id = rng.choice(allowed)
        if token_id == 0:
            assert state.mask_after([*path, token_id]) is None
        elif len(path) < 40:
            known.append([*path, token_id])
    assert max(map(len, known)) > 8


def test_end_tokens_are_allowed_exactly_where_the_text_may_end() -> None:
    state = regex_state("(ab)+")
    assert token_ids_of(state.mask_after((1,))) == [2]
    assert token_ids_of(state.mask_after((3,))) == [0, 1, 3, 4]
    only = regex_state("ab")
    assert token_ids_of(only.mask_after((1, 2))) == [0, 4], "nothing else is left"
    assert only.mask_after((1, 2, 4)) is None
    assert only.mask_after((1, 2, 0, 1, 1)) is None


def test_where_one_text_is_possible_the_tokenizers_own_tokens_are_allowed() -> None:
    tokenizer = byte_level_tokenizer()
    words = tokenizer.encode("whitespace", add_special_tokens=False).ids
    assert 1 < len(words) < len("whitespace")
    state = byte_compiler().compile(Grammar("regex", "whitespace|leading")).start()
    for index in range(1, len(words)):
        assert token_ids_of(state.mask_after(words[:index])) == [words[index]]
    assert token_ids_of(state.mask_after(words)) == [0]


def test_tokens_without_a_text_are_never_allowed() -> None:
    state = letters_compiler(vocab_size=13).compile(Grammar("regex", "(a|b)*")).start()
    mask = state.mask_after(())
    assert token_ids_of(mask) == [0, 1, 2, 3, 4]
    assert mask is not None
    assert len(mask) == 2


def test_a_refused_output_leaves_the_state_usable() -> None:
    state = regex_state("(ab)*")
    for wrong in ((2,), (1, 1), (3, 2), (99,), (-1,)):
        with pytest.raises(InvalidRequest, match="output") as caught:
            state.mask_after(wrong)
        assert caught.value.field == "grammar"
        assert token_ids_of(state.mask_after((3,))) == [0, 1, 3, 4]


def test_a_place_where_no_token_may_follow_is_an_error() -> None:
    tokens = ("<|end|>", "a", "b")
    state = letters_compiler(tokens).compile(Grammar("regex", "a|bc")).start()
    assert token_ids_of(state.mask_after((1,))) == [0]
    # Only bc can follow b, and no token spells c.
    with pytest.raises(InvalidRequest, match="no token after 1 tokens"):
        state.mask_after((2,))


TEXTS = [
    ("json_object", "", '{"a": [1,{"b":null}], "é":"x"}', '{"a":1,}'),
    (
        "json_schema",
        '{"type":"object","properties":{"n":{"type":"integer"}}}',
        '{"n":-4}',
        '{"n":"',
    ),
    ("regex", r"\d{3}-(é|🙂)", "123-🙂", "12-"),
    ("choice", '["yes", "no", "a\\"b\\\\c\\n🙂"]', 'a"b\\c\n🙂', "yes "),
    ("lark", 'start: "(" start ")" | "x"', "((x))", "(x))"),
]


@pytest.mark.parametrize(("kind", "text", "right", "wrong"), TEXTS)
def test_each_kind_takes_what_it_should(kind: str, text: str, right: str, wrong: str) -> None:
    for tokenizer in (byte_level_tokenizer(), sentencepiece_tokenizer()):
        ends = [tokenizer.token_to_id(token) for token in ("<|end|>", "</s>")]
        end = next(number for number in ends if number is not None)
        content = tokenizer.to_str().encode()
        compiler = GrammarCompiler(content, tokenizer.get_vocab_size(), (end,))
        state = compiler.compile(Grammar(kind, text)).start()
        assert end in (token_ids_of(state.mask_after(byte_tokens(tokenizer, right))) or [])
        with pytest.raises(InvalidRequest, match="does not match"):
            state.mask_after(byte_tokens(tokenizer, wrong))


def byte_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """One token a byte."""
    vocabulary = tokenizer.get_vocab()
    if "<0x41>" in vocabulary:
        return [vocabulary[f"<0x{byte:02X}>"] for byte in text.encode()]
    return [vocabulary[_byte_letter(byte)] for byte in text.encode()]


def _byte_letter(byte: int) -> str:
    """GPT-2's letter for a byte."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [number for number in range(256) if number not in visible]
    return chr(byte) if byte in visible else chr(256 + hidden.index(byte))


REFUSED = [
    (Grammar("regex", "(abc"), "unclosed"),
    (Grammar("regex", ""), "needs a text"),
    (Grammar("regex", r"[^\s\S]"), "no token"),
    (Grammar("lark", "\x18Æ"), "defines nothing"),
    (Grammar("lark", "start: foo"), "foo"),
    (Grammar("json_object", "{}"), "no text"),
    (Grammar("json_schema", "{"), "not JSON"),
    (Grammar("json_schema", "[" * 60_000), "not JSON"),
    (Grammar("json_schema", "true"), "JSON object"),
    (Grammar("json_schema", '{"type":"strin"}'), "strin"),
    (Grammar("json_schema", '{"not":{}}'), "not"),
    (Grammar("json_schema", '{"type":"array","uniqueItems":true}'), "uniqueItems"),
    (Grammar("json_schema", '{"$ref":"http://example.com/s.json"}'), "example.com"),
    (Grammar("json_schema", '{"x-guidance":{"lenient":true}}'), "x-guidance"),
    (Grammar("json_schema", '{"oneOf":[{"type":"number"},{"type":"integer"}]}'), "oneOf"),
    (Grammar("json_schema", '{"a":' * 70 + "1" + "}" * 70), "levels"),
    (Grammar("choice", "[]"), "choices"),
    (Grammar("choice", '{"a": 1}'), "choices"),
    (Grammar("choice", '["a", 3]'), "string"),
    (Grammar("choice", '["a", ""]'), "string"),
    (Grammar("choice", json.dumps(["x"] * (MAX_CHOICES + 1))), "choices"),
    (Grammar("regex", "a" * (MAX_PATTERN_BYTES + 1)), "bytes"),
    (Grammar("json_schema", "{}" + " " * MAX_SCHEMA_BYTES), "bytes"),
    (Grammar("regex", "\ud800"), "surrogates"),
]


@pytest.mark.parametrize(("grammar", "reason"), REFUSED)
def test_a_bad_grammar_is_refused_by_name(
    grammar: Grammar, reason: str, compiler: GrammarCompiler
) -> None:
    with pytest.raises(InvalidRequest, match=reason) as caught:
        compiler.compile(grammar)
    assert caught.value.field == "grammar"
    assert len(caught.value.message) < 600


def test_the_deepest_json_is_taken() -> None:
    schema = '{"properties":{"a":' * (MAX_JSON_DEPTH // 2) + "{}" + "}}" * (MAX_JSON_DEPTH // 2)
    byte_compiler().compile(Grammar("json_schema", schema))


def test_a_tokenizer_that_is_none_is_a_mismatch() -> None:
    for content, ends in ((b"{}", (0,)), (letters_tokenizer("<|end|>").to_str().encode(), ())):
        with pytest.raises(Mismatch):
            GrammarCompiler(content, 5, ends).compile(Grammar("regex", "a"))


def test_the_last_few_grammars_are_kept() -> None:
    compiler = byte_compiler(max_kept=2)
    first = compiler.compile(Grammar("regex", "a+"))
    compiler.compile(Grammar("regex", "b+"))
    assert compiler.compile(Grammar("regex", "a+")) is first
    compiler.compile(Grammar("regex", "c+"))
    assert compiler.compile(Grammar("regex", "a+")) is first
    compiler.compile(Grammar("regex", "b+"))
    compiler.compile(Grammar("regex", "c+"))
    assert compiler.compile(Grammar("regex", "a+")) is not first


def test_states_of_one_grammar_may_be_used_on_many_threads(compiler: GrammarCompiler) -> None:
    compiled = compiler.compile(Grammar("json_object"))
    problems: list[object] = []

    def walk(seed: int) -> None:
        rng, state, path = random.Random(seed), compiled.start(), list[int]()
        for _ in range(150):
            allowed = token_ids_of(state.mask_after(path))
            if allowed is None:
                return
            path.append(rng.choice(allowed))
        if token_ids_of(compiled.start().mask_after(path)) != token_ids_of(state.mask_after(path)):
            problems.append(path)

    threads = [threading.Thread(target=walk, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not problems


async def test_the_checker_refuses_and_begins_off_the_loop(compiler: GrammarCompiler) -> None:
    checker = GrammarChecker(compiler)
    with pytest.raises(InvalidRequest, match="unclosed"):
        await checker.check(Grammar("regex", "(a"))
    await checker.check(Grammar("choice", '["a", "b"]'))
    letters = byte_level_tokenizer().get_vocab()
    state = await checker.begin(Grammar("regex", "ab"), [letters["a"]])
    assert token_ids_of(state.mask_after([letters["a"]])) == [letters["b"]]
    with pytest.raises(InvalidRequest, match="does not match"):
        await checker.begin(Grammar("regex", "ab"), [letters["b"]])
    checker.close()


async def test_a_slow_grammar_ends_at_the_bound_and_the_queue_is_bounded() -> None:
    compiler = HeldCompiler()
    checker = GrammarChecker(compiler, max_seconds=0.05, max_waiting=2, num_threads=1)
    grammar = Grammar("regex", "a")
    tasks = [asyncio.create_task(checker.check(grammar)) for _ in range(3)]
    first, second, third = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(first, InvalidRequest)
    assert "0.05 s" in first.message
    assert isinstance(second, ResourceExhausted), "it never had its turn"
    assert isinstance(third, ResourceExhausted), "no place to wait"
    compiler.gate.set()
    while True:
        try:
            await checker.check(grammar)
            break
        except ResourceExhausted:
            continue
    checker.close()
