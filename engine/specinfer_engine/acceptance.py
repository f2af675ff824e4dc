"""Rule MATCH: the target draws every token, the tree is only a cache of guesses.

    v = root
    loop:
        y = draw(p(. | path to v))          one draw for each visited node
        c = child of v that carries y
        if there is none: return path, y    the same y, never a second draw
        v = c

(algorithms.md 1.6; SpecInfer, ASPLOS'24, section 4, with the target's own sampler as in SpecExec.)
The emitted tokens are literally a run of the plain sampler, so the law is the target's for any
tree, however it was made. This module knows nothing of models, sessions or how logits were made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from specinfer.errors import InternalError
from specinfer.tree import TokenTree
from specinfer_kernels import draw_row

Law = Callable[[int], Tensor]
"""p_at(node): processed logits of the law after the path to `node`, [vocab_size]."""


@dataclass(frozen=True)
class Walk:
    """What one walk through a tree confirmed.

    Attributes:
        path: accepted nodes below the root, in order.
        tail: the token after them; it becomes the next root.
    """

    path: tuple[int, ...]
    tail: int


def decided_position(base_len: int, depth: int) -> int:
    """Absolute position of the token that is decided at a node of `depth`.

    The node itself stands at base_len + depth; the token drawn from its law stands one further.
    This position, and nothing else of the pass, picks the noise.
    """
    return base_len + depth + 1


def draw_token(law: Tensor, seed: int, position: int, *, greedy: bool) -> int:
    """argmax_v(law_v + g(seed, position, v)), without the noise g when greedy.

    Args:
        law: processed logits, float32 or float64 [vocab_size]; the lowest id wins a tie.
        seed: the session's seed.
        position: absolute position of the token being decided.
        greedy: take the most probable token.

    Raises:
        InternalError: when the logits hold a NaN.
    """
    token_id = draw_row(law.contiguous(), seed, position, greedy=greedy)
    if token_id is None:
        raise InternalError(f"the model made a NaN where token {position} is decided")
    return token_id


def match_walk(tree: TokenTree, p_at: Law, *, base_len: int, seed: int, greedy: bool) -> Walk:
    """Follow the target's own draws down the tree as far as they were guessed.

    Args:
        tree: any tree; node 0 stands at position `base_len`.
        p_at: the law at a node, asked for visited nodes only.
        base_len: tokens before the root.
        seed: decides the noise together with the position.
        greedy: whether draws are without noise.
    """
    node = 0
    path: list[int] = []
    while True:
        position = decided_position(base_len, tree.depths[node])
        token_id = draw_token(p_at(node), seed, position, greedy=greedy)
        child = tree.children[node].get(token_id)
        if child is None:
            return Walk(tuple(path), token_id)
        path.append(child)
        node = child
