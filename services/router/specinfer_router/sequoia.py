"""The best tree of every size and depth, from how often children are confirmed by rank and depth.

Sequoia's programme (arXiv 2402.12374, section 3) maximises the expected number of accepted tokens
of a tree of m nodes and at most l levels. Here it is solved exactly by best-first search: a node's
worth is the product of P along its path, so it is worth no more than its parent, and no more than
an elder sibling while P falls with the rank; the m worthiest nodes within the depth are therefore
a tree, and no other tree is worth more. Ranks that rise would need the recurrence itself, which
stands in the tests as the reference. Knows nothing of drafters, costs or sessions.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import pairwise

# F[l][m]: expected tokens of a round, for l levels and m nodes below the root.
TokenTable = tuple[tuple[float, ...], ...]


def expected_tokens(
    acceptance: Sequence[Sequence[float]], max_nodes: int, max_depth: int
) -> TokenTable:
    """F[l][m] for every depth 0..max_depth and size 0..max_nodes; F[l][0] is 1, the tail.

    Args:
        acceptance: P[d][r], the probability that the child of rank r is the one confirmed under a
            confirmed node at depth d; each row falls with the rank and sums to at most 1. The last
            row stands for all deeper levels.
        max_nodes: most nodes below the root.
        max_depth: most levels below the root.

    Raises:
        ValueError: when a row of `acceptance` rises with the rank.
    """
    if any(first < second for row in acceptance for first, second in pairwise(row)):
        raise ValueError("acceptance has to fall with the rank")
    return tuple(_by_size(acceptance, max_nodes, depth) for depth in range(max_depth + 1))


def _by_size(
    acceptance: Sequence[Sequence[float]], max_nodes: int, max_depth: int
) -> tuple[float, ...]:
    """Expected tokens by size within one depth, float [max_nodes + 1]."""
    tokens = [1.0]
    # (-worth, depth, rank, worth of the parent): a node opens its first child and next sibling.
    heap: list[tuple[float, int, int, float]] = []
    last = len(acceptance) - 1

    def offer(depth: int, rank: int, parent: float) -> None:
        row = acceptance[min(depth - 1, last)]
        if depth <= max_depth and rank < len(row):
            heappush(heap, (-parent * row[rank], depth, rank, parent))

    offer(1, 0, 1.0)
    while heap and len(tokens) <= max_nodes:
        worth, depth, rank, parent = heappop(heap)
        tokens.append(tokens[-1] - worth)
        offer(depth, rank + 1, parent)
        offer(depth + 1, 0, -worth)
    return (*tokens, *[tokens[-1]] * (max_nodes + 1 - len(tokens)))
