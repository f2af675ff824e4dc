"""Grammars at the drafter: guesses stay within them and are right where the target's are."""

from __future__ import annotations

import pytest
import torch

from specinfer.grammar import CompiledGrammar
from specinfer.messages import Grammar, ShapeQuery
from specinfer.sampling import SamplingParams
from specinfer_draft.drafters.forecast import DrawForecast
from tests.kit.draft_driver import SHAPE, Target, table_drafter
from tests.kit.grammars import letters_compiler, token_ids_of
from tests.unit.test_draft_model import CHAIN, IDS, PROMPT, SAMPLINGS

LETTERS = ("<|end|>", *"abcdefghij")
PATTERN = "([b-d][aegi]{1,3}){12,40}"


def compile_regex(pattern: str) -> CompiledGrammar:
    return letters_compiler(LETTERS).compile(Grammar("regex", pattern))


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=IDS)
@pytest.mark.parametrize("shape", [CHAIN, SHAPE], ids=["chain", "best-first"])
def test_a_drafter_that_is_the_target_is_always_right_within_a_grammar(
    sampling: SamplingParams, shape: ShapeQuery
) -> None:
    bench, compiled = table_drafter(), compile_regex(PATTERN)
    target = Target(bench.model, sampling, list(PROMPT), compiled.start())
    bench.drafter.open("a", 0, PROMPT, sampling, grammar=compiled.start())
    known, new = len(PROMPT), list[int]()
    check = compiled.start()
    for epoch in range(6):
        tree = bench.tree("a", known, new, shape=shape, epoch=epoch)
        output = target.tokens[len(PROMPT) :]
        for node in range(1, len(tree)):
            *before, token_id = tree.path_token_ids(node)[1:]
            allowed = token_ids_of(check.mask_after([*output, *before]))
            assert allowed is not None, "a guess below an end token"
            assert token_id in allowed, "a guess that no text can have"
        known = len(target.tokens)
        new = target.commit(tree)
        assert len(new) >= (5 if shape is CHAIN else 2)


def test_without_the_mask_guesses_are_wasted() -> None:
    """Negative control: the same drafter that is not told of the grammar."""
    bench, compiled = table_drafter(), compile_regex(PATTERN)
    target = Target(bench.model, SAMPLINGS[0], list(PROMPT), compiled.start())
    bench.drafter.open("a", 0, PROMPT, SAMPLINGS[0])
    known, new, num_accepted = len(PROMPT), list[int](), 0
    for epoch in range(6):
        tree = bench.tree("a", known, new, shape=CHAIN, epoch=epoch)
        known = len(target.tokens)
        new = target.commit(tree)
        num_accepted += len(new) - 1
    assert num_accepted < 18


def test_a_session_opened_in_the_middle_of_its_output_guesses_on_from_there() -> None:
    bench, compiled = table_drafter(), compile_regex("b(ac){3}d{9}")
    tokens = [*PROMPT, 2, 1, 3, 1, 3, 1]
    bench.drafter.open("a", 4, tokens, SAMPLINGS[1], len(PROMPT), grammar=compiled.start())
    tree = bench.tree("a", len(tokens), shape=CHAIN, epoch=4)
    assert tree.token_ids[1:] == (3, 4, 4, 4)


def test_nothing_is_guessed_where_the_text_is_over_or_cannot_go_on() -> None:
    for pattern, output in (("a", [1, 0]), ("a|bx", [2]), ("a", [5])):
        compiled = compile_regex(pattern)
        bench = table_drafter()
        bench.drafter.open("other", 0, PROMPT, SAMPLINGS[0])
        tokens = [*PROMPT, *output]
        bench.drafter.open("a", 0, tokens, SAMPLINGS[1], len(PROMPT), grammar=compiled.start())
        waiting = bench.propose("other", len(PROMPT), shape=CHAIN)
        assert bench.tree("a", len(tokens), shape=SHAPE).num_draft_tokens == 0
        assert waiting.result(0).tree.num_draft_tokens == 4, "others do not notice"


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=IDS)
def test_a_forecast_is_of_the_allowed_tokens(sampling: SamplingParams) -> None:
    forecast = DrawForecast(sampling, 11, 2, grammar=compile_regex("[ace]{2}b").start())
    forecast.begin([7, 8, 1])
    logits = torch.linspace(-2.0, 2.0, 22).reshape(2, 11)
    z = forecast.forecast(logits, [[], [3]], [3, 4])
    drawable = [row.isfinite().nonzero().flatten().tolist() for row in z]
    assert set(drawable[0]) <= {1, 3, 5}
    assert drawable[0]
    assert drawable[1] == [2]
