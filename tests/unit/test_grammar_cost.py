"""Grammars and what they cost: what engines never have to do, and what is refused for it."""

from __future__ import annotations

import json
import threading
import time

import pytest
from llguidance import LLMatcher

from specinfer.errors import InvalidRequest
from specinfer.grammar import GrammarCompiler
from specinfer.messages import Grammar
from tests.kit.grammars import LETTERS, token_ids_of
from tests.kit.tokenizers import byte_level_tokenizer, letters_tokenizer


def byte_compiler() -> GrammarCompiler:
    tokenizer = byte_level_tokenizer()
    content = tokenizer.to_str().encode()
    return GrammarCompiler(content, tokenizer.get_vocab_size(), (0,))


def few_states() -> GrammarCompiler:
    content = letters_tokenizer(*LETTERS).to_str().encode()
    return GrammarCompiler(content, len(LETTERS), (0, 4), max_states=60)


def test_sessions_do_not_use_up_each_others_states() -> None:
    """A session needs some 45 states here, and those of an edition are counted together."""
    compiled = few_states().compile(Grammar("regex", "a(a|b){40}|b(a|b){41}"))
    compiled.make_spares()
    states = [compiled.start() for _ in range(2)]
    for length in range(39):
        for number, state in enumerate(states):
            compiled.make_spares()  # as each session that begins does
            path = [1 + number, *([1] * length)]
            assert token_ids_of(state.mask_after(path)) == [1, 2, 3], path
    assert compiled.start().mask_after([1] * 41) is not None


def test_one_session_that_needs_too_many_states_is_refused_alone() -> None:
    compiled = few_states().compile(Grammar("regex", "(a|b){200}"))
    compiled.make_spares()
    state, other = compiled.start(), compiled.start()
    assert other.mask_after([1] * 5)
    for length in range(20):
        state.mask_after([1] * length)
    with pytest.raises(InvalidRequest, match="too much work") as caught:
        state.mask_after([1] * 60)
    assert caught.value.field == "grammar"
    for usable in (state, other, compiled.start()):
        assert token_ids_of(usable.mask_after([1] * 5)) == [1, 2, 3]


def test_no_session_that_asks_ever_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = few_states()
    compiled = compiler.compile(Grammar("regex", "(a|b){200}"))
    compiled.make_spares()
    state = compiled.start()
    monkeypatch.setattr(compiler, "_make_matcher", lambda grammar: pytest.fail("compiled"))
    for _ in range(5):
        with pytest.raises(InvalidRequest, match="too much work"):
            state.mask_after([1] * 60)
    with pytest.raises(InvalidRequest, match="too much work"):
        compiled.start().mask_after([1])


def test_a_grammar_that_was_too_much_work_is_not_compiled_again() -> None:
    compiler = byte_compiler()
    letters = byte_level_tokenizer().get_vocab()
    # Where the first masks do not come to it.
    grammar = Grammar("regex", "[ab]{9}" + "c?" * 900)
    state = compiler.compile(grammar).start()
    with pytest.raises(InvalidRequest, match="too much work"):
        state.mask_after([letters["a"]] * 9 + [letters["c"]])
    with pytest.raises(InvalidRequest, match="too much work"):
        compiler.compile(grammar)


COSTLY = [
    Grammar("regex", "a?" * 8000),
    Grammar("regex", "a?" * 900),
    Grammar("regex", "a{100000}"),
    Grammar("regex", "((a{100}){30,}|b{100000}){10}"),
    Grammar(
        "lark",
        "start: X20\nX0: /a/\n" + "".join(f"X{n}: X{n - 1} X{n - 1}\n" for n in range(1, 21)),
    ),
    Grammar("lark", '%llguidance {"no_forcing": false}\nstart: "a"'),
    Grammar("lark", "start: " + "(A | B)? " * 220 + "\nA: /a+b?/\nB: /a?b+/\n"),
    Grammar("json_schema", json.dumps({"const": "x" * 60_000})),
    Grammar("json_schema", json.dumps({"type": "string", "pattern": "a?" * 8000})),
    Grammar("json_schema", json.dumps({"type": "string", "pattern": "a{99999}"})),
    Grammar("json_schema", '{"type":"integer","multipleOf":99999}'),
    Grammar("lark", 'start: a\na: %json {"type":"integer","multipleOf":99999}\n'),
    Grammar("lark", "start: a\na: %json " + json.dumps({"const": "x" * 9000})),
    Grammar("json_schema", '{"type":"integer","multipleOf":1e300}'),
    Grammar(
        "json_schema",
        json.dumps({"items": {"anyOf": [{"multipleOf": 997 + n} for n in range(4)]}}),
    ),
    Grammar("json_schema", json.dumps({"properties": {f"p{n}": {} for n in range(2000)}})),
    Grammar("json_schema", json.dumps({"patternProperties": {f"^a{n}": {} for n in range(300)}})),
]


@pytest.mark.parametrize("grammar", COSTLY, ids=range(len(COSTLY)))
def test_what_would_cost_an_engine_too_much_is_refused_soon(grammar: Grammar) -> None:
    compiler = byte_compiler()
    compiler.compile(Grammar("regex", "a"))
    before = time.thread_time()
    with pytest.raises(InvalidRequest) as caught:
        compiler.compile(grammar)
    assert caught.value.field == "grammar"
    assert time.thread_time() - before < 0.5


LARGE_TOOL = {
    "type": "object",
    "properties": {f"property_{n}": {"type": "string"} for n in range(100)},
}
ORDINARY = [
    Grammar("lark", f"start: a\na: %json {json.dumps(LARGE_TOOL)}\n"),
    Grammar("regex", r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"),
    Grammar("regex", r"(\w{1,20}[ ,.]){1,200}"),
    Grammar("regex", "|".join(f"word{n}" for n in range(200))),
    Grammar(
        "lark", 'start: e\ne: e "+" t | t\nt: NUMBER | "(" e ")"\nNUMBER: DIGIT+\nDIGIT: /[0-9]/\n'
    ),
    Grammar("choice", json.dumps([f"choice {n}" for n in range(1024)])),
    Grammar(
        "json_schema",
        json.dumps(
            {
                "description": "words " * 2000,
                "type": "object",
                "properties": {f"p{n}": {"type": "string", "maxLength": 99} for n in range(300)},
            }
        ),
    ),
    Grammar("json_schema", '{"type":"number","multipleOf":0.01}'),
    Grammar("json_schema", json.dumps({"items": {"anyOf": [{"multipleOf": n} for n in (5, 60)]}})),
    Grammar("json_schema", '{"properties":{"pattern":{"type":"string"},"const":{"enum":[1]}}}'),
]


@pytest.mark.parametrize("grammar", ORDINARY, ids=range(len(ORDINARY)))
def test_ordinary_grammars_are_taken(grammar: Grammar) -> None:
    assert byte_compiler().compile(grammar).start().mask_after(()) is not None


def test_requests_that_come_together_compile_a_grammar_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiler, held, begun = byte_compiler(), threading.Event(), threading.Event()
    compiled, make = list[object](), compiler._make_matcher
    num_made = 0

    def slow(grammar: Grammar) -> LLMatcher:
        nonlocal num_made
        num_made += 1
        begun.set()
        assert held.wait(20)
        return make(grammar)

    monkeypatch.setattr(compiler, "_make_matcher", slow)
    grammar = Grammar("regex", "a+b")
    threads = [
        threading.Thread(target=lambda: compiled.append(compiler.compile(grammar)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    assert begun.wait(20)
    held.set()
    for thread in threads:
        thread.join(20)
    assert num_made == 1
    assert len(compiled) == 4
    assert len(set(map(id, compiled))) == 1
