"""The caller's predicted text as a branch of the tree."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from specinfer.tree import TokenTree
from specinfer_router.prediction import FIRST_LENGTH, MAX_LENGTH, Prediction

PREDICTED = tuple(range(100, 300))


def branch(prediction: Prediction, output: list[int], root: int = 1) -> tuple[int, ...]:
    """What is guessed below a root alone."""
    tree = prediction.graft(TokenTree.root_only(root), output, max_nodes=128, max_depth=100)
    return tree.token_ids[1:]


def test_the_first_guess_is_how_the_prediction_begins() -> None:
    assert branch(Prediction(PREDICTED), []) == PREDICTED[:FIRST_LENGTH]


def test_guesses_grow_while_all_of_them_are_right_and_shrink_when_not() -> None:
    prediction = Prediction(PREDICTED)
    output: list[int] = []
    lengths = []
    for _ in range(5):
        guess = branch(prediction, output)
        lengths.append(len(guess))
        output.extend(guess)
    assert lengths == [8, 16, 32, MAX_LENGTH, MAX_LENGTH]
    prediction = Prediction(PREDICTED)
    branch(prediction, [])
    assert len(branch(prediction, [100, 7, 100, 101])) == FIRST_LENGTH // 2


def test_the_place_is_found_again_after_an_insertion_and_a_deletion() -> None:
    prediction = Prediction(PREDICTED)
    assert branch(prediction, [100, 101, 7, 8]) == ()
    assert branch(prediction, [100, 101, 7, 8, 102, 103])[:2] == (104, 105)
    assert branch(prediction, [100, 101, 7, 8, 102, 103, 150, 151])[:2] == (152, 153)


def test_of_two_equal_places_the_next_one_is_taken() -> None:
    prediction = Prediction((1, 2, 10, 11, 1, 2, 20, 21))
    assert branch(prediction, [5, 1, 2])[:2] == (10, 11)
    assert branch(prediction, [5, 1, 2, 10, 11, 9, 1, 2])[:2] == (20, 21)


def test_the_drafters_tree_stays_first_and_whole() -> None:
    drafted = TokenTree((1, 100, 50, 51), (-1, 0, 0, 2))
    tree = Prediction(PREDICTED).graft(drafted, [], max_nodes=6, max_depth=100)
    assert tree.token_ids[:4] == drafted.token_ids
    assert tree.parents[:4] == drafted.parents
    # Node 1 is the prediction's first token already; two more fit.
    assert (tree.token_ids[4:], tree.parents[4:]) == ((101, 102), (1, 4))
    small = Prediction(PREDICTED).graft(drafted, [], max_nodes=2, max_depth=100)
    assert small == drafted


def test_an_output_that_is_known_already_is_followed_from_the_start() -> None:
    assert branch(Prediction(PREDICTED, PREDICTED[:40]), list(PREDICTED[:40]))[:1] == (140,)


@given(
    predicted=st.lists(st.integers(0, 3), max_size=30),
    rounds=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), max_size=12),
    max_depth=st.integers(0, 9),
)
def test_any_output_gives_a_tree_within_its_bounds(
    predicted: list[int], rounds: list[list[int]], max_depth: int
) -> None:
    prediction = Prediction(predicted)
    output: list[int] = []
    for new in rounds:
        output.extend(new)
        root = TokenTree.root_only(output[-1])
        tree = prediction.graft(root, output, max_nodes=7, max_depth=max_depth)
        assert len(tree) <= 7
        assert tree.max_depth <= max_depth
        assert set(tree.token_ids[1:]) <= set(predicted)
