"""A tree's search and the scratch slots of its nodes; it may begin where an earlier one came to.

    scratch node j  lies at logical slot num_cached + j of its session

Nodes get their scratch index in the order in which they are looked at; leaves never get one. What
an earlier search has looked at below the node that is the root now is answered from memory, and the
keys and values stay where they are. So it finds what a search from scratch finds, with fewer
passes. This module knows nothing of passes, pools or who asked for the tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specinfer.messages import ShapeQuery
from specinfer.tree import TokenTree
from specinfer_draft.grow import Candidates, Expansion, GrowingTree, Thrift, Wave, expand
from specinfer_engine.batch import SequenceRows
from specinfer_engine.sequence import SequenceState


@dataclass(frozen=True)
class Looked:
    """What a pass has shown of a node.

    Attributes:
        branch: candidates that were wanted.
        candidates: those that came.
        scratch: the node's scratch index, or None for a root, which is a committed token.
    """

    branch: int
    candidates: Candidates
    scratch: int | None


class TreeSearch:
    """A tree on its way.

    Args:
        root_token_id: the last token of the session.
        shape: which tree to grow.
        thrift: when it is no longer worth its cost.
        earlier: a search whose scratch slots are still held, or None.
        node: the node of `earlier` that is the root here; it has been looked at.

    Attributes:
        tree: what was found so far.
        wave: nodes to look at in the next pass; None when the search is over.
    """

    def __init__(
        self,
        root_token_id: int,
        shape: ShapeQuery,
        thrift: Thrift,
        earlier: TreeSearch | None = None,
        node: int = 0,
    ) -> None:
        self.shape = shape
        self._root_token_id = root_token_id
        self._thrift = thrift
        self._begin(earlier, node)

    def restart(self) -> None:
        """Search from the root again, because the keys and values of the nodes are gone."""
        self._begin(None, 0)

    def _begin(self, earlier: TreeSearch | None, node: int) -> None:
        self.tree = GrowingTree(self._root_token_id)
        self._expansion: Expansion = expand(self.tree, self.shape, self._thrift)
        self._looked: dict[int, Looked] = {}
        self._earlier = earlier
        # Where nodes stand in the earlier search; nodes that it has not are not in here.
        self._origins: dict[int, int] = {} if earlier is None else {0: node}
        self._ancestors: list[int] = [] if earlier is None else list(earlier._ancestors)
        self._answers: list[Candidates | None] = []
        self.wave: Wave | None = None
        self._go_on(next(self._expansion, None))
        if earlier is not None and self.at_root:
            # The root is a committed token where a pass looks at it, and it would go where the
            # first scratch node lies.
            self._begin(None, 0)

    @property
    def at_root(self) -> bool:
        """Whether the root is what has to be looked at next."""
        return self.wave is not None and self.wave.nodes[0] == 0

    @property
    def num_scratch(self) -> int:
        """Scratch slots that the next wave takes together with the earlier ones."""
        return len(self._ancestors) + (len(self.wave.nodes) if self.wave else 0)

    def wave_rows(self, state: SequenceState) -> SequenceRows:
        """Rows of the next wave below the root, and a scratch slot for each of them."""
        assert self.wave is not None
        nodes, first_node = self.wave.nodes, len(self._ancestors)
        for node in nodes:
            above = self._looked[self.tree.parents[node]].scratch
            bits = 0 if above is None else self._ancestors[above]
            self._ancestors.append(bits | (1 << len(self._ancestors)))
        # The root stands at len(state) - 1, whether its keys and values are committed or scratch.
        first = len(state) - 1 - state.num_cached
        return SequenceRows(
            token_ids=tuple(self.tree.token_ids[node] for node in nodes),
            context_len=state.num_cached,
            first_node=first_node,
            depths=tuple(first + self.tree.depths[node] for node in nodes),
            ancestors=tuple(self._ancestors[first_node:]),
            block_table=tuple(state.block_table),
            logit_rows=tuple(range(len(nodes))),
        )

    def take(self, candidates: Sequence[Candidates]) -> None:
        """Give the search what the wave's pass has shown."""
        assert self.wave is not None
        first = len(self._ancestors) - len(self.wave.nodes)
        for place, (node, found) in enumerate(zip(self.wave.nodes, candidates, strict=True)):
            scratch = None if node == 0 else first + place
            self._looked[node] = Looked(self.wave.branch, found, scratch)
        fresh = iter(candidates)
        answers = [next(fresh) if known is None else known for known in self._answers]
        self._go_on(self._send(answers))

    def take_tree(self, levels: Sequence[Sequence[Candidates]]) -> None:
        """Give a search of stated widths what all of its waves would show, and so end it.

        Scratch slots count as given back.

        Args:
            levels: candidates of every node of each level, the root's first; the children of a
                node are those of its candidates in their order.
        """
        places = {0: 0}
        for level in levels:
            if self.wave is None:
                return
            answers = []
            for node in self.wave.nodes:
                place, parent = 0, self.tree.parents[node]
                if node:
                    above = self._looked[parent]
                    rank = above.candidates.token_ids.index(self.tree.token_ids[node])
                    place = places[parent] * above.branch + rank
                places[node] = place
                self._looked[node] = Looked(self.wave.branch, level[place], None)
                answers.append(level[place])
            self._go_on(self._send(answers))

    def find(self, token_ids: Sequence[int]) -> int | None:
        """The node that is reached from the root by these tokens, if it has been looked at."""
        node: int | None = 0
        for token_id in token_ids:
            node = None if node is None else self.tree.child(node, token_id)
        return node if node in self._looked else None

    def result(self) -> TokenTree:
        """The best of what was found."""
        return self.tree.cut(self.shape.max_nodes)

    def _go_on(self, wave: Wave | None) -> None:
        """Answer what is known already; what is left of the wave is for a pass."""
        while wave is not None:
            self._answers = [self._recall(node, wave.branch) for node in wave.nodes]
            unknown = zip(wave.nodes, self._answers, strict=True)
            nodes = tuple(node for node, known in unknown if known is None)
            if nodes:
                self.wave = Wave(nodes, wave.branch)
                return
            wave = self._send([known for known in self._answers if known is not None])
        self.wave = None

    def _send(self, answers: Sequence[Candidates]) -> Wave | None:
        try:
            return self._expansion.send(answers)
        except StopIteration:
            return None

    def _recall(self, node: int, branch: int) -> Candidates | None:
        """What the earlier search has seen at a node; None where a pass has to look."""
        if self._earlier is None:
            return None
        if node not in self._origins:
            above = self._origins.get(self.tree.parents[node])
            token_id = self.tree.token_ids[node]
            origin = None if above is None else self._earlier.tree.child(above, token_id)
            if origin is None:
                return None
            self._origins[node] = origin
        looked = self._earlier._looked.get(self._origins[node])
        if looked is None or looked.branch < branch:
            return None
        self._looked[node] = looked
        return looked.candidates
