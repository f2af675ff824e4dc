"""The exact law of rule MATCH over table models, by enumeration of its draws; planted biases.

Every draw of a walk is branched over the whole vocabulary and weighted by its probability, so the
law of what the rounds emit comes out exactly, for every tree (algorithms.md section 8, items 1, 3
and 4).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from specinfer.errors import InvalidRequest
from specinfer.grammar import CompiledGrammar
from specinfer.messages import Grammar
from specinfer.tree import TokenTree
from specinfer_engine import acceptance
from specinfer_engine.acceptance import Walk, match_walk
from specinfer_engine.grammar import constrain
from tests.kit.grammars import letters_compiler
from tests.kit.table_models import TableModel, tree_laws

VOCAB = 3
LENGTH = 3
Law = dict[tuple[int, ...], float]
WalkFunction = Callable[..., Walk]


class NeedsDraw(Exception):
    """The script is used up: the walk wants to draw from this law."""

    def __init__(self, law: torch.Tensor) -> None:
        super().__init__("a draw is needed")
        self.law = law


def enumerate_runs(run: Callable[[Callable[[torch.Tensor], int]], tuple[int, ...]]) -> Law:
    """The law of what `run(draw)` returns when every draw follows the law it is given."""
    total: Law = {}
    stack: list[tuple[list[int], float]] = [([], 1.0)]
    while stack:
        script, weight = stack.pop()
        rest = iter(script)

        def draw(law: torch.Tensor, rest: Iterator[int] = rest) -> int:
            for token_id in rest:
                return token_id
            raise NeedsDraw(law)

        try:
            outcome = run(draw)
        except NeedsDraw as need:
            chances = need.law.double().softmax(0).tolist()
            stack += [([*script, t], weight * p) for t, p in enumerate(chances) if p > 0]
        else:
            total[outcome] = total.get(outcome, 0.0) + weight
    return total


def target_law(model: TableModel, prompt: Sequence[int]) -> Law:
    """The law of the target's next LENGTH tokens, by the product rule."""
    law: Law = {}
    for tokens in itertools.product(range(VOCAB), repeat=LENGTH):
        chance = 1.0
        for index, token_id in enumerate(tokens):
            context = [*prompt, *tokens[:index]]
            if chance > 0:
                chance *= float(model.logits(context).double().softmax(0)[token_id])
        law[tokens] = chance
    return law


def rounds_law(
    model: TableModel,
    prompt: Sequence[int],
    draft: Callable[[Sequence[int]], TokenTree],
    walk: WalkFunction,
    monkeypatch: pytest.MonkeyPatch,
) -> Law:
    """The law of the first LENGTH tokens that rounds with a rule emit."""

    def run(draw: Callable[[torch.Tensor], int]) -> tuple[int, ...]:
        def scripted(law: torch.Tensor, seed: int, position: int, *, greedy: bool) -> int:
            return draw(law)

        monkeypatch.setattr(acceptance, "draw_token", scripted)
        tokens = list(prompt)
        while len(tokens) < len(prompt) + LENGTH:
            tree = draft(tokens)

            laws = tree_laws(model, tokens, tree)
            result = walk(tree, laws, base_len=len(tokens) - 1, seed=0, greedy=False)
            tokens += [*(tree.token_ids[node] for node in result.path), result.tail]
        return tuple(tokens[len(prompt) :][:LENGTH])

    return enumerate_runs(run)


def distance(first: Law, second: Law) -> float:
    """Total variation."""
    keys = first.keys() | second.keys()
    return sum(abs(first.get(key, 0.0) - second.get(key, 0.0)) for key in keys) / 2


def all_shapes(max_guesses: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Every tree of up to `max_guesses` guesses over VOCAB tokens, as guesses and parents."""
    for num_guesses in range(max_guesses + 1):
        choices = [range(node + 1) for node in range(num_guesses)]
        for parents in itertools.product(*choices):
            for tokens in itertools.product(range(VOCAB), repeat=num_guesses):
                if len(set(zip(parents, tokens, strict=True))) == num_guesses:
                    yield tokens, parents


def always(tokens: tuple[int, ...], parents: tuple[int, ...]) -> Callable[..., TokenTree]:
    """A drafter that guesses the same tree whatever came before."""
    return lambda context: TokenTree((context[-1], *tokens), (-1, *parents))


@pytest.mark.parametrize("seed", range(2))
def test_the_law_is_the_targets_for_every_tree(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TableModel(VOCAB, seed=seed)
    expected = target_law(model, (0, 1))
    shapes = list(all_shapes(3))
    assert len(shapes) > 100
    for tokens, parents in shapes[:: 1 + seed]:
        law = rounds_law(model, (0, 1), always(tokens, parents), match_walk, monkeypatch)
        assert distance(law, expected) < 1e-12


@pytest.mark.parametrize("adapted", [True, False])
def test_two_levels_of_width_two(adapted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TableModel(VOCAB, seed=5)

    def draft(context: Sequence[int]) -> TokenTree:
        """SpecInfer's <2,2>; an adapted one takes the target's own two best tokens."""
        tokens, parents = [context[-1]], [-1]
        for node in (0, 1, 2):
            path = TokenTree(tuple(tokens), tuple(parents)).path_token_ids(node)[1:]
            row = model.logits([*context, *path])
            best = row.topk(2).indices.tolist() if adapted else [0, 1]
            tokens += best
            parents += [node, node]
        return TokenTree(tuple(tokens), tuple(parents))

    law = rounds_law(model, (2, 0), draft, match_walk, monkeypatch)
    assert distance(law, target_law(model, (2, 0))) < 1e-12


def test_the_law_within_a_grammar_is_the_targets_over_the_allowed_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tokens are an end, a and b; every tree, guesses outside the grammar included."""
    compiled = letters_compiler(("<|end|>", "a", "b")).compile(Grammar("regex", "a(a|b)?|ba+"))
    prompt = (0, 1)
    for seed in range(2):
        model = ConstrainedModel(compiled, len(prompt), seed=seed)
        expected = target_law(model, prompt)
        assert abs(sum(expected.values()) - 1) < 1e-12
        assert {tokens[:2] for tokens in expected if expected[tokens] > 0} < set(
            itertools.product(range(VOCAB), repeat=2)
        )
        for tokens, parents in list(all_shapes(3))[seed::3]:
            law = rounds_law(model, prompt, always(tokens, parents), match_walk, monkeypatch)
            assert distance(law, expected) < 1e-12


class ConstrainedModel(TableModel):
    """A table model whose raw logits pass through the engine's mask for what came before."""

    def __init__(self, compiled: CompiledGrammar, num_prompt: int, *, seed: int) -> None:
        super().__init__(VOCAB, seed=seed)
        self._state = compiled.start()
        self._num_prompt = num_prompt

    def logits(self, context: Sequence[object]) -> torch.Tensor:
        output = [int(str(token_id)) for token_id in context[self._num_prompt :]]
        try:
            return constrain(super().logits(context), self._state, output)
        except InvalidRequest:
            # A text that the grammar does not allow has no law; no walk comes here.
            return torch.full((VOCAB,), -math.inf)


def draw_again_on_a_miss(tree: TokenTree, p_at: acceptance.Law, **options: object) -> Walk:
    """Planted bias: the tail is a second draw (as in REST and Medusa's nucleus mode)."""
    walk = match_walk(tree, p_at, base_len=0, seed=0, greedy=False)
    last = walk.path[-1] if walk.path else 0
    return Walk(walk.path, acceptance.draw_token(p_at(last), 0, 0, greedy=False))


def draw_for_each_child(tree: TokenTree, p_at: acceptance.Law, **options: object) -> Walk:
    """Planted bias: a draw for each path instead of one for each node."""
    node = 0
    path: list[int] = []
    while True:
        for token_id in tree.children[node]:
            if acceptance.draw_token(p_at(node), 0, 0, greedy=False) == token_id:
                break
        else:
            return Walk(tuple(path), acceptance.draw_token(p_at(node), 0, 0, greedy=False))
        node = tree.children[node][token_id]
        path.append(node)


def match_by_depth(tree: TokenTree, p_at: acceptance.Law, **options: object) -> Walk:
    """Planted bias: any node of the next depth with the token counts as the child."""
    node = 0
    path: list[int] = []
    while True:
        token_id = acceptance.draw_token(p_at(node), 0, 0, greedy=False)
        depth = tree.depths[node] + 1
        for child in range(len(tree)):
            if tree.depths[child] == depth and tree.token_ids[child] == token_id:
                break
        else:
            return Walk(tuple(path), token_id)
        path.append(child)
        node = child


@pytest.mark.parametrize("planted", [draw_again_on_a_miss, draw_for_each_child, match_by_depth])
def test_a_planted_bias_is_seen(planted: WalkFunction, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TableModel(VOCAB, seed=1)
    draft = always((0, 1, 2), (0, 0, 1))
    law = rounds_law(model, (0, 1), draft, planted, monkeypatch)
    assert distance(law, target_law(model, (0, 1))) > 1e-3
