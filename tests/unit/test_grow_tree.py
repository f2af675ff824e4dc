"""Growing trees over table models: widths, best-first against brute force, bounds, early stops."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specinfer.errors import InvalidRequest
from specinfer.messages import ShapeQuery
from specinfer.tree import MAX_TREE_NODES
from specinfer_draft.grow import (
    Candidates,
    GrowingTree,
    Thrift,
    Wave,
    check_shape,
    expand,
    expand_best_first,
    expand_widths,
    grow,
)

Table = Callable[[tuple[int, ...]], list[float]]


def random_table(seed: int, vocab_size: int) -> Table:
    """Log probabilities of the next token after a path, the same for every call."""

    def table(path: tuple[int, ...]) -> list[float]:
        rng = random.Random(f"{seed} {path}")
        weights = [rng.expovariate(1.0) ** 2 + 1e-6 for _ in range(vocab_size)]
        return [math.log(weight / sum(weights)) for weight in weights]

    return table


class Looker:
    """Answers waves from a table and remembers them."""

    def __init__(self, tree: GrowingTree, table: Table) -> None:
        self.tree = tree
        self.table = table
        self.waves: list[Wave] = []

    def __call__(self, wave: Wave) -> Sequence[Candidates]:
        self.waves.append(wave)
        return [self._look(node, wave.branch) for node in wave.nodes]

    def _look(self, node: int, branch: int) -> Candidates:
        row = self.table(tuple(self.tree.path_token_ids(node)))
        best = sorted(range(len(row)), key=lambda token_id: -row[token_id])[:branch]
        return Candidates(best, [row[token_id] for token_id in best])


def paths(tree: GrowingTree, nodes: Sequence[int]) -> set[tuple[int, ...]]:
    return {tuple(tree.path_token_ids(node)) for node in nodes}


def brute_force(
    table: Table, vocab_size: int, max_nodes: int, max_depth: int, branch: int
) -> set[tuple[int, ...]]:
    """The best prefixes of at most `max_depth` tokens, by summing every path's scores."""
    scored: dict[tuple[int, ...], float] = {}
    for depth in range(1, max_depth + 1):
        for path in itertools.product(range(vocab_size), repeat=depth):
            score = 0.0
            for end in range(depth):
                row = table(path[:end])
                allowed = sorted(row, reverse=True)[:branch]
                score += row[path[end]] if row[path[end]] in allowed else -math.inf
            if score > -math.inf:
                scored[path] = score
    return set(sorted(scored, key=lambda path: -scored[path])[:max_nodes])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    vocab_size=st.integers(1, 4),
    max_nodes=st.integers(0, 20),
    max_depth=st.integers(0, 4),
    branch=st.integers(1, 4),
    max_beams=st.sampled_from([1, 2, 1000]),
)
def test_best_first_finds_the_most_probable_prefixes(
    seed: int, vocab_size: int, max_nodes: int, max_depth: int, branch: int, max_beams: int
) -> None:
    table = random_table(seed, vocab_size)
    tree = GrowingTree(0)
    shape = ShapeQuery(max_nodes, max_depth, (), branch)
    look = Looker(tree, table)
    grow(expand_best_first(tree, shape, Thrift(), max_beams), look)
    expected = brute_force(table, vocab_size, max_nodes, max_depth, min(branch, max(max_nodes, 1)))
    assert paths(tree, tree.best_nodes(max_nodes)) == expected
    if max_beams == 1000:
        assert len(look.waves) <= max_depth


def test_best_first_looks_at_no_node_that_cannot_help() -> None:
    """A node whose best child could at most equal the last of the N best is not looked at."""
    tree = GrowingTree(0)
    look = Looker(tree, lambda path: [math.log(0.5), math.log(0.3), math.log(0.2)])
    grow(expand_best_first(tree, ShapeQuery(3, 8, (), 3)), look)
    # .5, .3 and then .25 = .5 * .5; nothing below .3, .2 or .25 can enter.
    assert [wave.nodes for wave in look.waves] == [(0,), (1, 2)]
    assert paths(tree, tree.best_nodes(3)) == {(0,), (1,), (0, 0)}


@pytest.mark.parametrize(
    ("widths", "max_nodes", "levels"),
    [
        ((1, 1, 3, 1, 1, 1, 1, 1), 63, (1, 1, 3, 3, 3, 3, 3, 3)),  # SpecInfer's default: 20 nodes
        ((2, 2), 63, (2, 4)),
        ((4,), 63, (4,)),
        ((2, 3), 5, (2, 3)),
        ((3, 3), 2, (2,)),
        ((1, 1), 0, ()),
        ((), 8, ()),
    ],
)
def test_widths_give_each_level_its_nodes(
    widths: tuple[int, ...], max_nodes: int, levels: tuple[int, ...]
) -> None:
    tree = GrowingTree(9)
    look = Looker(tree, random_table(0, 5))
    grow(expand_widths(tree, widths, max_nodes), look)
    counts = [tree.depths.count(depth) for depth in range(1, max(tree.depths) + 1)]
    assert tuple(counts) == levels
    assert len(look.waves) == len(levels)
    assert len(tree.cut(max_nodes)) == 1 + sum(levels)


def test_widths_keep_the_best_nodes_of_a_level_that_does_not_fit() -> None:
    tree = GrowingTree(0)
    table = random_table(3, 6)
    grow(expand_widths(tree, (3, 3), 5), Looker(tree, table))
    whole = GrowingTree(0)
    grow(expand_widths(whole, (3, 3), 100), Looker(whole, table))
    second = [node for node in range(len(whole)) if whole.depths[node] == 2]
    best = sorted(second, key=lambda node: -whole.scores[node])[:2]
    found = [node for node in range(len(tree)) if tree.depths[node] == 2]
    assert paths(tree, found) == paths(whole, best)


def test_a_vocabulary_smaller_than_a_width_gives_what_there_is() -> None:
    tree = GrowingTree(0)
    grow(expand_widths(tree, (4, 4), 100), Looker(tree, random_table(1, 2)))
    assert [tree.depths.count(depth) for depth in (1, 2)] == [2, 4]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), max_nodes=st.integers(1, 40), widths=st.lists(st.integers(1, 4)))
def test_every_prefix_of_a_cut_tree_holds_its_best_nodes(
    seed: int, max_nodes: int, widths: list[int]
) -> None:
    tree = GrowingTree(7)
    shape = ShapeQuery(max_nodes, 5, tuple(widths), 3)
    grow(expand(tree, shape, Thrift()), Looker(tree, random_table(seed, 5)))
    cut = tree.cut(max_nodes)
    assert len(cut) <= 1 + max_nodes
    assert cut.token_ids[0] == 7
    assert cut.max_depth <= 5
    assert list(cut.scores) == sorted(cut.scores, reverse=True)
    assert len(cut.truncate(2)) <= 2


def test_the_floor_keeps_hopeless_nodes_out_and_saves_their_waves() -> None:
    table = random_table(5, 4)
    tree = GrowingTree(0)
    look = Looker(tree, table)
    grow(expand(tree, ShapeQuery(40, 6, (), 4), Thrift(math.log(0.2))), look)
    free = GrowingTree(0)
    free_look = Looker(free, table)
    grow(expand(free, ShapeQuery(40, 6, (), 4), Thrift()), free_look)
    kept = [node for node in free.best_nodes(40) if free.scores[node] >= math.log(0.2)]
    assert paths(tree, range(1, len(tree))) == paths(free, kept)
    assert 0 < len(kept) < 40
    assert len(look.waves) < len(free_look.waves)


def test_a_wave_that_is_hardly_ever_reached_is_not_made() -> None:
    """Three children of .4, .3, .2: together they are reached with probability .9, then .36."""
    table = [math.log(0.4), math.log(0.3), math.log(0.2)]
    for least_reach, num_waves in ((0.95, 1), (0.85, 2), (0.0, 3)):
        tree = GrowingTree(0)
        look = Looker(tree, lambda path: table)
        grow(expand(tree, ShapeQuery(100, 3, (), 3), Thrift(least_reach=least_reach)), look)
        assert len(look.waves) == num_waves


def test_stopping_after_any_wave_leaves_a_tree() -> None:
    for num_waves in range(4):
        tree = GrowingTree(0)
        expansion = expand(tree, ShapeQuery(10, 6, (), 3), Thrift())
        grow(expansion, Looker(tree, random_table(2, 5)), max_waves=num_waves)
        cut = tree.cut(10)
        assert cut.max_depth == num_waves
        assert (len(cut) > 1) == (num_waves > 0)


def test_candidates_that_cannot_be_drawn_or_are_no_numbers_are_left_out() -> None:
    tree = GrowingTree(0)
    answer = Candidates([4, 5, 6], [-0.5, -math.inf, math.nan])
    grow(expand_widths(tree, (3,), 10), lambda wave: [answer])
    assert tree.token_ids == [0, 4]


@pytest.mark.parametrize(
    ("shape", "field"),
    [
        (ShapeQuery(max_nodes=-1), "shape.max_nodes"),
        (ShapeQuery(max_nodes=MAX_TREE_NODES), "shape.max_nodes"),
        (ShapeQuery(max_depth=-1), "shape.max_depth"),
        (ShapeQuery(max_depth=MAX_TREE_NODES), "shape.max_depth"),
        (ShapeQuery(widths=(1, 0)), "shape.widths"),
        (ShapeQuery(widths=(1,) * MAX_TREE_NODES), "shape.widths"),
        (ShapeQuery(branch=0), "shape.branch"),
    ],
)
def test_an_absurd_shape_is_refused(shape: ShapeQuery, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_shape(shape)
    assert caught.value.field == field


def test_the_largest_shape_is_accepted() -> None:
    check_shape(ShapeQuery(MAX_TREE_NODES - 1, MAX_TREE_NODES - 1, (1, 2), 0))
