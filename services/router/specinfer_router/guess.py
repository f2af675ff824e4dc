"""What a round got of a drafter, and what is believed of an answer.

This module knows nothing of links, deadlines or which drafter was asked.
"""

from __future__ import annotations

from typing import NamedTuple

from specinfer.errors import InvalidTree, StaleEpoch
from specinfer.messages import DraftResult, ShapeQuery
from specinfer.tree import TokenTree


class Guess(NamedTuple):
    """What came of asking a drafter.

    Attributes:
        tree: the tree to verify; the root alone when there is no guess.
        root_only_reason: why there is none: "disabled", "budget", "no_drafter", "circuit_open",
            "deadline", "draft_error" or "no_guess"; "" when there is one.
        seconds: time the round waited for it; less than the round trip where that began earlier.
        queue_seconds: waiting inside the worker.
        compute_seconds: the worker's compute.
        round_trip_seconds: from asking to the answer; 0 when nobody answered.
        num_draft_nodes: nodes of the tree that the drafter brought, the root included; they come
            first.
        draft_depth: depth of the drafter's part of the tree.
        after_prefill: whether the drafter read the whole session first, which takes its time.
        hedged: whether a second drafter was asked too.
        drafter: name of the model that guessed, or "" when nobody answered.
        worker: address of its worker.
    """

    tree: TokenTree
    root_only_reason: str = ""
    seconds: float = 0.0
    queue_seconds: float = 0.0
    compute_seconds: float = 0.0
    round_trip_seconds: float = 0.0
    num_draft_nodes: int = 1
    draft_depth: int = 0
    after_prefill: bool = False
    hedged: bool = False
    drafter: str = ""
    worker: str = ""


def usable_tree(
    result: DraftResult, root: int, epoch: int, shape: ShapeQuery, vocab_size: int
) -> TokenTree:
    """The drafter's tree when it answers what was asked; raises InvalidTree or StaleEpoch.

    A tree with too many nodes is cut, which is lossless where the target draws every token.
    """
    if result.epoch != epoch:
        raise StaleEpoch(f"a tree for epoch {result.epoch}, asked for {epoch}")
    tree = result.tree
    if tree.token_ids[0] != root:
        raise InvalidTree(f"a tree below token {tree.token_ids[0]}, asked below {root}")
    tree.check_vocabulary(vocab_size)
    tree = tree.truncate(shape.max_nodes + 1)
    if tree.max_depth > shape.max_depth:
        raise InvalidTree(f"a tree of depth {tree.max_depth}, asked for {shape.max_depth}")
    return tree
