"""The token tree: guesses about what comes next, as two flat arrays.

Node 0 is the root, the last token whose keys and values do not exist yet. Parents stand before
their children, so one pass over the arrays derives everything else. This module knows nothing of
tensors, models, the wire or sessions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from operator import lt

from specinfer.errors import InvalidTree

WORD_BITS = 64
MAX_TREE_NODES = 1024


@dataclass(frozen=True)
class TokenTree:
    """A tree of guessed tokens below one root (SpecInfer, ASPLOS'24, section 3).

    Attributes:
        token_ids: token of each node, node 0 being the root.
        parents: index of each node's parent, smaller than the node's own index; -1 for the root.
        drafter_ids: which drafter guessed each node, or empty when nobody needs to know.
        scores: cumulative log score of each node, or empty. For budgets only, never for acceptance.

    Raises:
        InvalidTree: when the arrays do not describe one tree with parents before children.
    """

    token_ids: tuple[int, ...]
    parents: tuple[int, ...]
    drafter_ids: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _check_shape(self)
        outline = _outline_of(self.parents)
        if outline.branches:
            _check_siblings(self.token_ids, self.parents)
        # Kept here: left to the property's first use, it would take a third of making a tree.
        self.__dict__["_outline"] = outline

    @classmethod
    def root_only(cls, token_id: int) -> TokenTree:
        """The tree of plain decoding: a root and no guess."""
        return cls(token_ids=(token_id,), parents=(-1,))

    @classmethod
    def chain(cls, token_ids: Sequence[int]) -> TokenTree:
        """A tree with one path; the first token is the root."""
        return cls(tuple(token_ids), tuple(range(-1, len(token_ids) - 1)))

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_draft_tokens(self) -> int:
        """Nodes below the root: what a drafter guessed."""
        return len(self.token_ids) - 1

    @cached_property
    def _outline(self) -> _Outline:
        return _outline_of(self.parents)

    @property
    def depths(self) -> tuple[int, ...]:
        """Distance of each node from the root, [num_nodes]."""
        return self._outline.depths

    @property
    def max_depth(self) -> int:
        """Depth of the deepest node."""
        return self._outline.max_depth

    def positions(self, base_len: int) -> tuple[int, ...]:
        """Absolute position of each node when `base_len` tokens stand before the root.

        The depth decides, never the index: siblings share a position.
        """
        return tuple(base_len + depth for depth in self.depths)

    @cached_property
    def ancestors(self) -> tuple[int, ...]:
        """Bit j of entry i is set when node i may see node j: its ancestors and itself."""
        bits = [0] * len(self.parents)
        for node, parent in enumerate(self.parents):
            bits[node] = (bits[parent] if parent >= 0 else 0) | (1 << node)
        return tuple(bits)

    @property
    def num_words(self) -> int:
        """Words of 64 bits that one node's ancestor set takes."""
        return -(-len(self.token_ids) // WORD_BITS)

    def ancestor_words(self) -> tuple[tuple[int, ...], ...]:
        """`ancestors` cut into unsigned 64-bit words, lowest first, [num_nodes][num_words]."""
        mask = (1 << WORD_BITS) - 1
        shifts = [WORD_BITS * word for word in range(self.num_words)]
        return tuple(tuple((bits >> shift) & mask for shift in shifts) for bits in self.ancestors)

    @cached_property
    def children(self) -> tuple[dict[int, int], ...]:
        """For each node, its children as token -> node."""
        children: list[dict[int, int]] = [{} for _ in self.parents]
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                children[parent][self.token_ids[node]] = node
        return tuple(children)

    def path(self, node: int) -> tuple[int, ...]:
        """Nodes from the root down to `node`, both included."""
        nodes = []
        while node >= 0:
            nodes.append(node)
            node = self.parents[node]
        return tuple(reversed(nodes))

    def path_token_ids(self, node: int) -> tuple[int, ...]:
        """Tokens from the root down to `node`, both included."""
        return tuple(self.token_ids[step] for step in self.path(node))

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise InvalidTree unless every token lies in [0, vocab_size)."""
        # None is negative, or there would be no tree.
        token_id = max(self.token_ids)
        if token_id >= vocab_size:
            node = self.token_ids.index(token_id)
            raise InvalidTree(
                f"node {node} has token {token_id}, outside the vocabulary of {vocab_size}"
            )

    def truncate(self, max_nodes: int) -> TokenTree:
        """The first `max_nodes` nodes; a prefix of a topological order is a tree again.

        Lossless under MATCH, where the target decides every token whatever was guessed.
        """
        if max_nodes < 1:
            raise InvalidTree(f"a tree keeps at least its root, got max_nodes {max_nodes}")
        if len(self) <= max_nodes:
            return self
        return TokenTree(
            self.token_ids[:max_nodes],
            self.parents[:max_nodes],
            self.drafter_ids[:max_nodes],
            self.scores[:max_nodes],
        )


def union(trees: Iterable[TokenTree]) -> TokenTree:
    """The smallest tree that holds every path of every given tree (SpecInfer section 3.2).

    One node for each (parent, token); the first drafter to guess a node keeps the credit and the
    best score stays. Scores and drafter ids survive only when every tree brings them.

    Raises:
        InvalidTree: when no tree is given or the roots differ.
    """
    given = list(trees)
    if not given:
        raise InvalidTree("a union needs at least one tree")
    if len({tree.token_ids[0] for tree in given}) > 1:
        raise InvalidTree("trees of a union must share their root token")
    with_drafters = all(tree.drafter_ids for tree in given)
    with_scores = all(tree.scores for tree in given)
    token_ids, parents, drafters, scores = [given[0].token_ids[0]], [-1], [0], [0.0]
    children: list[dict[int, int]] = [{}]
    for tree in given:
        merged = {0: 0}
        for node in range(1, len(tree)):
            parent, token_id = merged[tree.parents[node]], tree.token_ids[node]
            found = children[parent].get(token_id)
            if found is None:
                found = children[parent][token_id] = len(token_ids)
                token_ids.append(token_id)
                parents.append(parent)
                children.append({})
                drafters.append(tree.drafter_ids[node] if with_drafters else 0)
                scores.append(tree.scores[node] if with_scores else 0.0)
            elif with_scores:
                scores[found] = max(scores[found], tree.scores[node])
            merged[node] = found
    return TokenTree(
        tuple(token_ids),
        tuple(parents),
        tuple(drafters) if with_drafters else (),
        tuple(scores) if with_scores else (),
    )


@dataclass(frozen=True)
class _Outline:
    """What the parents of a tree say by themselves.

    Attributes:
        depths: distance of each node from the root.
        max_depth: the largest of them.
        branches: whether any node has more than one child.
    """

    depths: tuple[int, ...]
    max_depth: int
    branches: bool


@lru_cache(maxsize=256)
def _outline_of(parents: tuple[int, ...]) -> _Outline:
    """Raises InvalidTree. Trees are of few outlines: a round's was nearly always seen before."""
    _check_parents(parents)
    depths = [0] * len(parents)
    for node, parent in enumerate(parents[1:], start=1):
        depths[node] = depths[parent] + 1
    return _Outline(tuple(depths), max(depths), len(set(parents)) < len(parents))


def _check_shape(tree: TokenTree) -> None:
    num_nodes = len(tree.token_ids)
    if not 1 <= num_nodes <= MAX_TREE_NODES:
        raise InvalidTree(f"a tree has 1 to {MAX_TREE_NODES} nodes, got {num_nodes}")
    if len(tree.parents) != num_nodes:
        raise InvalidTree(f"{num_nodes} tokens but {len(tree.parents)} parents")
    if tree.drafter_ids and len(tree.drafter_ids) != num_nodes:
        raise InvalidTree(f"{num_nodes} tokens but {len(tree.drafter_ids)} drafter_ids")
    if tree.scores and len(tree.scores) != num_nodes:
        raise InvalidTree(f"{num_nodes} tokens but {len(tree.scores)} scores")
    if min(tree.token_ids) < 0:
        raise InvalidTree("token ids are not negative")


def _check_parents(parents: tuple[int, ...]) -> None:
    if parents[0] != -1:
        raise InvalidTree(f"the root's parent is -1, got {parents[0]}")
    if min(parents[1:], default=0) >= 0 and all(map(lt, parents, range(len(parents)))):
        return
    node = next(node for node in range(1, len(parents)) if not 0 <= parents[node] < node)
    raise InvalidTree(
        f"node {node} has parent {parents[node]}; parents stand before their children"
    )


def _check_siblings(token_ids: tuple[int, ...], parents: tuple[int, ...]) -> None:
    if len(set(zip(parents, token_ids, strict=True))) != len(token_ids):
        raise InvalidTree("two siblings carry the same token; merge them into one node")
