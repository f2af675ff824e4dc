"""Rule MATCH: walks, one draw a node, the position that picks the noise."""

from __future__ import annotations

import math

import pytest
import torch

from specinfer.errors import InternalError
from specinfer.tree import TokenTree
from specinfer_engine.acceptance import Walk, decided_position, draw_token, match_walk
from specinfer_kernels import gumbel_noise

TREE = TokenTree((0, 1, 2, 1, 3, 2), (-1, 0, 0, 2, 3, 1))
"""0 -> 1 -> 2 and 0 -> 2 -> 1 -> 3."""


def one_hot(token_id: int, vocab_size: int = 5) -> torch.Tensor:
    row = torch.full((vocab_size,), -math.inf)
    row[token_id] = 0.0
    return row


def walk_choices(choices: dict[int, int], *, greedy: bool = True) -> tuple[Walk, list[int]]:
    """Walk TREE where the law at a node is one token; also the nodes asked for."""
    asked: list[int] = []

    def p_at(node: int) -> torch.Tensor:
        asked.append(node)
        return one_hot(choices[node])

    return match_walk(TREE, p_at, base_len=7, seed=1, greedy=greedy), asked


@pytest.mark.parametrize("greedy", [True, False])
def test_walks_end_where_nothing_was_guessed(greedy: bool) -> None:
    assert walk_choices({0: 4}, greedy=greedy) == (Walk((), 4), [0])
    assert walk_choices({0: 1, 1: 4}, greedy=greedy) == (Walk((1,), 4), [0, 1])
    walk, asked = walk_choices({0: 2, 2: 1, 3: 3, 4: 0}, greedy=greedy)
    assert walk == Walk((2, 3, 4), 0)
    assert asked == [0, 2, 3, 4], "each visited node is asked for once and no other"


def test_a_token_elsewhere_in_the_tree_is_not_a_child() -> None:
    assert walk_choices({0: 1, 1: 1})[0] == Walk((1,), 1)


def test_the_decided_token_stands_one_behind_its_node() -> None:
    assert decided_position(10, 0) == 11
    assert decided_position(10, 3) == decided_position(13, 0)


def test_a_draw_is_the_argmax_of_law_and_noise() -> None:
    law = torch.randn(40, generator=torch.Generator().manual_seed(3))
    for position in range(30):
        noise = gumbel_noise(torch.tensor([9]), torch.tensor([position]), 40)[0]
        expected = int((law.double() + noise).argmax())
        assert draw_token(law, 9, position, greedy=False) == expected
    assert draw_token(law, 9, 0, greedy=True) == int(law.argmax())


def test_greedy_ties_go_to_the_lowest_id() -> None:
    assert draw_token(torch.tensor([0.0, 2.0, 2.0]), 0, 0, greedy=True) == 1


@pytest.mark.parametrize("greedy", [True, False])
def test_a_nan_is_never_a_token(greedy: bool) -> None:
    with pytest.raises(InternalError, match="NaN"):
        draw_token(torch.tensor([0.0, math.nan]), 0, 0, greedy=greedy)
