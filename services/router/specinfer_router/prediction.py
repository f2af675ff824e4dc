"""Guesses from a text that the caller expects: a free branch of the draft tree.

The output is followed through the predicted tokens; where it leaves them, the place is found again
by the last few tokens (prompt lookup, as in LLMA, arXiv 2304.04487, section 3). Under MATCH it
changes no token. This module knows nothing of drafters, workers or text.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import takewhile

from specinfer.tree import TokenTree, union

ANCHOR = 2
FIRST_LENGTH = 8
MIN_LENGTH = 2
MAX_LENGTH = 64


class Prediction:
    """Where one output stands in its prediction, and how far it is worth guessing.

    The length of a guess doubles when all of it was right and halves when less than half was.
    """

    def __init__(self, token_ids: Sequence[int], output_ids: Sequence[int] = ()) -> None:
        """Take the predicted tokens, and the output there is already."""
        self._token_ids = tuple(token_ids)
        self._places: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for end in range(ANCHOR, len(self._token_ids)):
            self._places[self._token_ids[end - ANCHOR : end]].append(end)
        self._place: int | None = 0
        self._last_place = 0
        self._num_seen = 0
        self._length = FIRST_LENGTH
        self._offered: tuple[int, ...] = ()
        self._follow(output_ids)

    def graft(
        self, tree: TokenTree, output_ids: Sequence[int], *, max_nodes: int, max_depth: int
    ) -> TokenTree:
        """The tree with the predicted continuation as one more path; the tree's nodes come first.

        Args:
            tree: guesses below the last token of prompt and output.
            output_ids: the output so far.
            max_nodes: largest tree, root included.
            max_depth: deepest guess.
        """
        self._follow(output_ids)
        room = max(0, min(self._length, max_depth))
        place = len(self._token_ids) if self._place is None else self._place
        self._offered = self._token_ids[place : place + room]
        if not self._offered:
            return tree
        chain = TokenTree.chain((tree.token_ids[0], *self._offered))
        plain = TokenTree(tree.token_ids, tree.parents)
        return union((plain, chain)).truncate(max(max_nodes, len(tree)))

    def _follow(self, output_ids: Sequence[int]) -> None:
        new = tuple(output_ids[self._num_seen :])
        self._num_seen = len(output_ids)
        if not new:
            return
        self._learn(new)
        if self._place is not None:
            num_right = _num_equal(self._token_ids[self._place : self._place + len(new)], new)
            self._place = self._last_place = self._place + num_right
            if num_right == len(new):
                return
        self._place = self._find(tuple(output_ids[-ANCHOR:]))
        self._last_place = self._last_place if self._place is None else self._place

    def _learn(self, new: tuple[int, ...]) -> None:
        offered, self._offered = self._offered, ()
        if not offered:
            return
        num_right = _num_equal(offered, new)
        if num_right == len(offered):
            self._length = min(MAX_LENGTH, 2 * self._length)
        elif num_right < len(offered) // 2:
            self._length = max(MIN_LENGTH, self._length // 2)

    def _find(self, anchor: tuple[int, ...]) -> int | None:
        """The first place after `anchor` from where the output was last, or else the nearest."""
        places = self._places.get(anchor, ())
        later = (place for place in places if place >= self._last_place)
        return next(later, max(places, default=None))


def _num_equal(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Length of the longest prefix that both share."""
    equal = takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False))
    return sum(1 for _ in equal)
