"""The best trees by size and depth, against every tree and against the recurrence of Sequoia."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import cache

import pytest

from specinfer_router.sequoia import expected_tokens

Shape = tuple["Shape", ...]
Acceptance = tuple[tuple[float, ...], ...]

MAX_NODES, MAX_DEPTH, NUM_RANKS = 8, 4, 3


@cache
def shapes(num_nodes: int, depth: int, num_children: int = NUM_RANKS) -> tuple[Shape, ...]:
    """Every ordered tree of so many nodes below its root, at most `depth` levels deep."""
    return tuple(_shapes(num_nodes, depth, num_children))


def _shapes(num_nodes: int, depth: int, num_children: int) -> Iterator[Shape]:
    if num_nodes == 0:
        yield ()
    elif depth and num_children:
        for below in range(num_nodes):
            for first in shapes(below, depth - 1):
                for rest in shapes(num_nodes - 1 - below, depth, num_children - 1):
                    yield (first, *rest)


def tokens_of(shape: Shape, acceptance: Acceptance, depth: int = 0) -> float:
    """Expected tokens of a round with this tree, by its definition."""
    row = acceptance[min(depth, len(acceptance) - 1)]
    below = (
        row[rank] * tokens_of(child, acceptance, depth + 1) for rank, child in enumerate(shape)
    )
    return 1.0 + sum(below)


def best_of_all(acceptance: Acceptance, num_nodes: int, depth: int) -> float:
    found = (
        tokens_of(shape, acceptance)
        for size in range(num_nodes + 1)
        for shape in shapes(size, depth)
    )
    return max(found)


def recurrence(acceptance: Acceptance, max_nodes: int, max_depth: int) -> list[list[float]]:
    """Sequoia's programme itself, O(m^2 l b), ranks in any order: F[l][m]."""

    @cache
    def best(num_nodes: int, depth: int, rank: int, level: int) -> float:
        """What `num_nodes` bring as the children of ranks `rank`.. of one node at a level."""
        row = acceptance[min(level, len(acceptance) - 1)]
        if not num_nodes or not depth or rank == len(row):
            return 0.0
        return max(
            0.0,
            *(
                row[rank] * (1.0 + best(below, depth - 1, 0, level + 1))
                + best(num_nodes - 1 - below, depth, rank + 1, level)
                for below in range(num_nodes)
            ),
        )

    return [
        [1.0 + best(num_nodes, depth, 0, 0) for num_nodes in range(max_nodes + 1)]
        for depth in range(max_depth + 1)
    ]


def falling(seed: int, num_levels: int, num_ranks: int = NUM_RANKS) -> Acceptance:
    draw = random.Random(seed)
    rows: list[tuple[float, ...]] = []
    for _ in range(num_levels):
        row = sorted((draw.random() for _ in range(num_ranks)), reverse=True)
        rows.append(tuple(chance * draw.uniform(0.5, 1.0) / sum(row) for chance in row))
    return tuple(tuple(sorted(row, reverse=True)) for row in rows)


def differences(table: Sequence[Sequence[float]], acceptance: Acceptance) -> list[float]:
    return [
        abs(table[depth][size] - best_of_all(acceptance, size, depth))
        for depth in range(MAX_DEPTH + 1)
        for size in range(MAX_NODES + 1)
    ]


@pytest.mark.parametrize("seed", range(3))
def test_no_tree_is_worth_more(seed: int) -> None:
    acceptance = falling(seed, num_levels=1 + seed)
    table = expected_tokens(acceptance, MAX_NODES, MAX_DEPTH)
    assert max(differences(table, acceptance)) < 1e-12
    assert max(differences(recurrence(acceptance, MAX_NODES, MAX_DEPTH), acceptance)) < 1e-12


def test_the_comparison_notices_a_depth_that_is_not_kept_to() -> None:
    acceptance = falling(1, num_levels=2)
    uncapped = expected_tokens(acceptance, MAX_NODES, MAX_DEPTH)[-1]
    assert max(differences([uncapped] * (MAX_DEPTH + 1), acceptance)) > 0.01
    assert max(differences([*expected_tokens(acceptance[:1], 8, 4)], acceptance)) > 0.001


@pytest.mark.parametrize("seed", range(4))
def test_large_trees_agree_with_the_recurrence(seed: int) -> None:
    acceptance = falling(seed, num_levels=3, num_ranks=4)
    table = expected_tokens(acceptance, 24, 6)
    for row, expected in zip(table, recurrence(acceptance, 24, 6), strict=True):
        assert row == pytest.approx(expected, abs=1e-12)


def test_ranks_that_rise_are_refused_because_the_search_would_miss_the_best() -> None:
    rising = ((0.1, 0.6),)
    with pytest.raises(ValueError, match="fall"):
        expected_tokens(rising, 2, 2)
    # The first child is worth little, and without it there is no second one.
    assert recurrence(rising, 2, 1)[1][2] == pytest.approx(1.7)


def test_a_chain_is_the_geometric_sum() -> None:
    table = expected_tokens(((0.5,),), 4, 4)
    assert table[4][4] == pytest.approx(sum(0.5**level for level in range(5)))
    assert table[2][4] == pytest.approx(1.75), "two levels of one child hold two nodes"
    assert table[0] == (1.0,) * 5
