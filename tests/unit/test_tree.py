"""Token trees: what is derived, what is refused, and that a union keeps every path."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specinfer.errors import InvalidTree
from specinfer.tree import MAX_TREE_NODES, TokenTree, union


@st.composite
def trees(draw: st.DrawFn, root: int = 7, max_nodes: int = 24) -> TokenTree:
    """A random tree without equal siblings."""
    tokens, parents = [root], [-1]
    seen: set[tuple[int, int]] = set()
    for _ in range(draw(st.integers(0, max_nodes - 1))):
        parent = draw(st.integers(0, len(tokens) - 1))
        token = draw(st.integers(0, 5))
        if (parent, token) not in seen:
            seen.add((parent, token))
            tokens.append(token)
            parents.append(parent)
    return TokenTree(tuple(tokens), tuple(parents))


def paths(tree: TokenTree) -> set[tuple[int, ...]]:
    return {tree.path_token_ids(node) for node in range(len(tree))}


def test_derived_values_of_a_known_tree() -> None:
    tree = TokenTree((9, 1, 2, 3, 1), (-1, 0, 0, 1, 2))
    assert tree.depths == (0, 1, 1, 2, 2)
    assert tree.positions(100) == (100, 101, 101, 102, 102)
    assert tree.ancestors == (0b1, 0b11, 0b101, 0b1011, 0b10101)
    assert tree.path_token_ids(4) == (9, 2, 1)
    assert tree.children[0] == {1: 1, 2: 2}
    assert tree.num_draft_tokens == 4


def test_ancestor_sets_take_words_of_64_bits() -> None:
    tree = TokenTree.chain(range(130))
    words = tree.ancestor_words()
    assert tree.num_words == 3
    assert words[63] == (2**64 - 1, 0, 0)
    assert words[64] == (2**64 - 1, 1, 0)
    assert words[129] == (2**64 - 1, 2**64 - 1, 0b11)


@pytest.mark.parametrize(
    ("token_ids", "parents"),
    [
        ((), ()),
        ((1, 2), (-1,)),
        ((1, 2), (0, 0)),
        ((1, 2), (-1, 1)),
        ((1, 2, 3), (-1, 2, 0)),
        ((1, 2), (-1, -1)),
        ((1, -2), (-1, 0)),
        ((1, 2, 2), (-1, 0, 0)),
        (tuple(range(MAX_TREE_NODES + 1)), tuple(range(-1, MAX_TREE_NODES))),
    ],
)
def test_hostile_arrays_are_refused(token_ids: tuple[int, ...], parents: tuple[int, ...]) -> None:
    with pytest.raises(InvalidTree):
        TokenTree(token_ids, parents)


def test_parents_that_are_refused_are_refused_again() -> None:
    for _ in range(2):
        with pytest.raises(InvalidTree):
            TokenTree((1, 2, 3), (-1, 2, 1))


def test_trees_of_one_outline_are_checked_each_for_its_own_tokens() -> None:
    assert TokenTree((1, 2, 3), (-1, 0, 0)).depths == (0, 1, 1)
    with pytest.raises(InvalidTree):
        TokenTree((1, 2, 2), (-1, 0, 0))


def test_side_arrays_have_one_entry_a_node() -> None:
    with pytest.raises(InvalidTree, match="scores"):
        TokenTree((1, 2), (-1, 0), scores=(0.0,))


def test_tokens_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(InvalidTree, match="vocabulary"):
        TokenTree.chain([1, 2, 9]).check_vocabulary(9)
    TokenTree.chain([1, 2, 8]).check_vocabulary(9)


@given(trees(), trees(), trees())
def test_a_union_holds_every_path_once(a: TokenTree, b: TokenTree, c: TokenTree) -> None:
    merged = union([a, b, c])
    assert paths(merged) == paths(a) | paths(b) | paths(c)
    assert len(merged) == len(paths(merged))


def test_a_union_of_different_roots_is_refused() -> None:
    with pytest.raises(InvalidTree, match="root"):
        union([TokenTree.root_only(1), TokenTree.root_only(2)])
    with pytest.raises(InvalidTree, match="at least one"):
        union([])


def test_a_union_keeps_the_first_drafter_and_the_best_score() -> None:
    first = TokenTree((1, 2), (-1, 0), (0, 1), (0.0, -2.0))
    second = TokenTree((1, 2, 3), (-1, 0, 1), (0, 2, 2), (0.0, -1.0, -1.5))
    merged = union([first, second])
    assert merged.drafter_ids == (0, 1, 2)
    assert merged.scores == (0.0, -1.0, -1.5)


@given(trees(), st.integers(1, 30))
def test_a_truncated_tree_is_a_tree(tree: TokenTree, max_nodes: int) -> None:
    cut = tree.truncate(max_nodes)
    assert len(cut) == min(len(tree), max_nodes)
    assert paths(cut) <= paths(tree)


@given(trees())
def test_ancestors_are_the_path(tree: TokenTree) -> None:
    for node in range(len(tree)):
        assert tree.ancestors[node] == sum(1 << step for step in tree.path(node))
        assert len(tree.path(node)) == tree.depths[node] + 1
