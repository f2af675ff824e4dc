"""How a token tree grows: SpecInfer's widths and SpecExec's best-first search.

Both are generators. They yield a Wave, the nodes whose next tokens they want to see, and are sent
the candidates of each; whoever drives them decides how the waves of many sessions share a forward
pass, and may stop at any wave and take what is there. This module knows no model, tensor, session
or clock: a dictionary of probabilities drives it as well as a network does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from heapq import nlargest

from specinfer.errors import InvalidRequest
from specinfer.messages import ShapeQuery
from specinfer.tree import MAX_TREE_NODES, TokenTree


@dataclass(frozen=True)
class Wave:
    """Nodes to look at in one pass.

    Attributes:
        nodes: indices into the growing tree, all with their parents looked at before.
        branch: candidates wanted for each node.
    """

    nodes: tuple[int, ...]
    branch: int


@dataclass(frozen=True)
class Candidates:
    """The likely next tokens of one node, best first.

    Attributes:
        token_ids: distinct tokens.
        log_scores: natural logarithm of the probability that the target picks each, at most 0.
    """

    token_ids: Sequence[int]
    log_scores: Sequence[float]


Expansion = Generator[Wave, Sequence[Candidates], None]


class GrowingTree:
    """Nodes found so far, parents before children; node 0 is the root.

    Attributes:
        token_ids: token of each node.
        parents: index of each node's parent, -1 for the root.
        depths: distance of each node from the root.
        scores: cumulative log score of each node, 0 for the root.
    """

    def __init__(self, root_token_id: int) -> None:
        self.token_ids = [root_token_id]
        self.parents = [-1]
        self.depths = [0]
        self.scores = [0.0]
        self._children: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self.token_ids)

    def add(self, parent: int, token_id: int, score: float) -> int:
        """Add a child and return its index."""
        self.token_ids.append(token_id)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1)
        self.scores.append(score)
        self._children[(parent, token_id)] = len(self.token_ids) - 1
        return len(self.token_ids) - 1

    def child(self, parent: int, token_id: int) -> int | None:
        """The child of a node that carries a token, or None."""
        return self._children.get((parent, token_id))

    def path_token_ids(self, node: int) -> list[int]:
        """Tokens from below the root down to `node`, both ends included."""
        tokens: list[int] = []
        while node > 0:
            tokens.append(self.token_ids[node])
            node = self.parents[node]
        tokens.reverse()
        return tokens

    def best_nodes(self, max_nodes: int) -> list[int]:
        """The `max_nodes` best nodes below the root, best first, parents before children.

        A child never scores above its parent and is younger, so the set is closed under parents.
        """
        below = range(1, len(self))
        return nlargest(max_nodes, below, key=lambda node: (self.scores[node], -node))

    def cut(self, max_nodes: int) -> TokenTree:
        """The token tree of the best nodes, best first, so that any prefix of it is best too."""
        kept = [0, *self.best_nodes(max_nodes)]
        place = {node: index for index, node in enumerate(kept)}
        return TokenTree(
            token_ids=tuple(self.token_ids[node] for node in kept),
            parents=(-1, *(place[self.parents[node]] for node in kept[1:])),
            scores=tuple(self.scores[node] for node in kept),
        )


def check_shape(shape: ShapeQuery) -> None:
    """Raise InvalidRequest unless `shape` asks for a tree that somebody could want."""
    if not 0 <= shape.max_nodes < MAX_TREE_NODES:
        raise InvalidRequest(
            f"max_nodes is between 0 and {MAX_TREE_NODES - 1}, got {shape.max_nodes}",
            field="shape.max_nodes",
        )
    if not 0 <= shape.max_depth < MAX_TREE_NODES:
        raise InvalidRequest(
            f"max_depth is between 0 and {MAX_TREE_NODES - 1}, got {shape.max_depth}",
            field="shape.max_depth",
        )
    if len(shape.widths) >= MAX_TREE_NODES or any(width < 1 for width in shape.widths):
        raise InvalidRequest("widths are whole numbers of at least 1", field="shape.widths")
    if shape.branch < 1 and not shape.widths:
        raise InvalidRequest(f"branch is at least 1, got {shape.branch}", field="shape.branch")


@dataclass(frozen=True)
class Thrift:
    """When best-first growing is no longer worth its cost.

    Attributes:
        score_floor: lowest cumulative log score of a node: one that is less likely to be accepted
            costs the verifier more than it saves.
        least_reach: lowest probability that the target's walk comes to any node of a wave: it is
            the most tokens that the wave's pass can win.
    """

    score_floor: float = -math.inf
    least_reach: float = 0.0


NO_THRIFT = Thrift()


def expand(tree: GrowingTree, shape: ShapeQuery, thrift: Thrift) -> Expansion:
    """Grow `tree` in the shape asked for; thrift concerns best-first trees alone."""
    if shape.widths:
        return expand_widths(tree, shape.widths[: shape.max_depth], shape.max_nodes)
    return expand_best_first(tree, shape, thrift)


def expand_widths(tree: GrowingTree, widths: Sequence[int], max_nodes: int) -> Expansion:
    """The expansion <k1, ..., km> of SpecInfer (ASPLOS'24, section 3.1).

    Level i takes the k_i best next tokens of every node of level i - 1, one pass a level. When a
    level does not fit into `max_nodes` its best nodes stay.
    """
    frontier = [0]
    for width in widths:
        room = max_nodes + 1 - len(tree)
        if room < 1 or not frontier:
            return
        branch = min(width, room)
        found = _children(tree, frontier, (yield Wave(tuple(frontier), branch)), branch)
        kept = set(nlargest(room, range(len(found)), key=lambda place: (found[place][2], -place)))
        frontier = [tree.add(*child) for place, child in enumerate(found) if place in kept]


def expand_best_first(
    tree: GrowingTree,
    shape: ShapeQuery,
    thrift: Thrift = Thrift(),
    max_beams: int = MAX_TREE_NODES,
) -> Expansion:
    """The N = `max_nodes` most probable prefixes, by waves (SpecExec, arXiv 2406.02532).

    A node's score is the sum of its path's log scores. A wave looks at the best `max_beams` nodes
    among the N best that were not looked at yet; a child enters when it beats the N-th best score.
    It ends when no node that could still bring such a child is left, or earlier by `thrift`. With
    unlimited beams there is one wave for each level, and without thrift the N best nodes are
    exactly the N best prefixes of at most `max_depth` tokens with `branch` children each.
    """
    branch = min(shape.branch, max(shape.max_nodes, 1))
    seen: set[int] = set()
    while shape.max_nodes:
        best = tree.best_nodes(shape.max_nodes)
        bar = tree.scores[best[-1]] if len(best) == shape.max_nodes else -math.inf
        hopeful = [
            node
            for node in (0, *best)
            if node not in seen
            and tree.depths[node] < shape.max_depth
            and tree.scores[node] > bar
            and tree.scores[node] >= thrift.score_floor
        ][:max_beams]
        reach = sum(math.exp(tree.scores[node]) for node in hopeful)
        if not hopeful or reach < thrift.least_reach:
            return
        seen.update(hopeful)
        wave = Wave(tuple(hopeful), branch)
        for parent, token_id, score in _children(tree, hopeful, (yield wave), branch):
            if score > bar and score >= thrift.score_floor:
                tree.add(parent, token_id, score)


def grow(
    expansion: Expansion, look: Callable[[Wave], Sequence[Candidates]], max_waves: int | None = None
) -> None:
    """Drive one expansion alone: `look` answers a wave with the candidates of each of its nodes."""
    try:
        wave = next(expansion)
        while max_waves is None or max_waves > 0:
            wave = expansion.send(look(wave))
            max_waves = None if max_waves is None else max_waves - 1
    except StopIteration:
        return
    expansion.close()


def _children(
    tree: GrowingTree, nodes: Sequence[int], answers: Sequence[Candidates], branch: int
) -> list[tuple[int, int, float]]:
    """(parent, token, cumulative score) of every candidate, in the order of the nodes."""
    return [
        (node, token_id, tree.scores[node] + min(log_score, 0.0))
        for node, answer in zip(nodes, answers, strict=True)
        for token_id, log_score in zip(
            answer.token_ids[:branch], answer.log_scores[:branch], strict=True
        )
        if log_score > -math.inf
    ]
