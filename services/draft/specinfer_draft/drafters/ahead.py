"""Where to go on while a tree is verified: the path that most likely is accepted, and what follows.

The target confirms a path and adds a token of its own, which by its nature is no child of the
path's end in the tree. So the next tree begins below a leaf, with the tail as its first level
(PEARL, arXiv 2408.11850; SSD, arXiv 2603.03251). Guesses only: nothing here reaches the output.
This module knows nothing of passes, pools or models.
"""

from __future__ import annotations

import math
from dataclasses import replace

from specinfer.messages import ShapeQuery
from specinfer.tree import TokenTree
from specinfer_draft.drafters.limits import DrafterLimits
from specinfer_draft.drafters.session import DraftSession, fit_shape


def go_ahead(
    session: DraftSession, tree: TokenTree, shape: ShapeQuery, limits: DrafterLimits
) -> bool:
    """Begin the tree after `tree`, which was just handed out; whether one was begun."""
    if not tree.num_draft_tokens:
        return False
    path, score = likely_path(tree)
    num_tokens = len(session.state) + len(path)
    room = limits.max_model_len - num_tokens
    if room < 0 or math.exp(score) < limits.thrift.least_reach:
        return False
    wanted = fit_shape(shape_ahead(shape), max_nodes=limits.max_tree_nodes - 1, max_depth=room + 1)
    session.go_ahead(path, wanted, limits.thrift)
    return True


def likely_path(tree: TokenTree) -> tuple[list[int], float]:
    """Tokens below the root down to the leaf of the best score, and that score."""
    inner = set(tree.parents)
    leaves = [node for node in range(1, len(tree)) if node not in inner]
    best = max(leaves, key=lambda node: (tree.scores[node], -node))
    return list(tree.path_token_ids(best)[1:]), tree.scores[best]


def shape_ahead(shape: ShapeQuery) -> ShapeQuery:
    """One level for the tail above a tree like the last one; best-first, it hedges over tails."""
    widths = (1, *shape.widths) if shape.widths else ()
    max_nodes = shape.max_nodes + 1 if shape.widths else 2 * shape.max_nodes
    return replace(shape, max_nodes=max_nodes, max_depth=shape.max_depth + 1, widths=widths)
