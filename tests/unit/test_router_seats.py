"""What is believed of a drafter's tree and of a verifier's result."""

from __future__ import annotations

import pytest

from specinfer.errors import InternalError, InvalidTree, StaleEpoch
from specinfer.messages import DraftResult, ShapeQuery, VerifyResult
from specinfer.tree import TokenTree
from specinfer_router.seats import check_result, usable_tree

TREE = TokenTree((7, 1, 2, 3), (-1, 0, 0, 1))
SHAPE = ShapeQuery(max_nodes=3, max_depth=2)


def test_a_tree_that_answers_is_taken_as_it_is() -> None:
    assert usable_tree(DraftResult(4, TREE), 7, 4, SHAPE, 10) is TREE


@pytest.mark.parametrize("epoch", [3, 5])
def test_a_tree_for_another_epoch_is_stale(epoch: int) -> None:
    with pytest.raises(StaleEpoch):
        usable_tree(DraftResult(epoch, TREE), 7, 4, SHAPE, 10)


@pytest.mark.parametrize(
    ("root", "vocab_size", "shape"),
    [(8, 10, SHAPE), (7, 7, SHAPE), (7, 10, ShapeQuery(max_nodes=3, max_depth=1))],
    ids=["another root", "outside the vocabulary", "too deep"],
)
def test_a_tree_that_was_not_asked_for_is_refused(
    root: int, vocab_size: int, shape: ShapeQuery
) -> None:
    with pytest.raises(InvalidTree):
        usable_tree(DraftResult(4, TREE), root, 4, shape, vocab_size)


def test_nodes_beyond_the_budget_are_cut() -> None:
    shape = ShapeQuery(max_nodes=2, max_depth=1)
    assert usable_tree(DraftResult(4, TREE), 7, 4, shape, 10) == TREE.truncate(3)


def test_a_path_and_a_tail_are_believed() -> None:
    check_result(VerifyResult(5, (1, 3), (1, 3, 9)), TREE, 4, 10)
    check_result(VerifyResult(5, (), (9,)), TREE, 4, 10)


@pytest.mark.parametrize(
    "result",
    [
        VerifyResult(4, (), (9,)),
        VerifyResult(6, (), (9,)),
        VerifyResult(5, (), ()),
        VerifyResult(5, (), (8, 9)),
        VerifyResult(5, (1, 2), (1, 2, 9)),
        VerifyResult(5, (3,), (3, 9)),
        VerifyResult(5, (0,), (7, 9)),
        VerifyResult(5, (9,), (9, 9)),
        VerifyResult(5, (1,), (2, 9)),
        VerifyResult(5, (), (10,)),
    ],
    ids=[
        "epoch",
        "epoch",
        "none",
        "many",
        "sibling",
        "skip",
        "root",
        "beyond",
        "token",
        "vocabulary",
    ],
)
def test_anything_else_is_not(result: VerifyResult) -> None:
    with pytest.raises(InternalError):
        check_result(result, TREE, 4, 10)
