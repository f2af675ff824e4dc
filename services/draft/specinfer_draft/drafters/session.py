"""One session as a model drafter sees it, and the tree that grows for it.

Plain state, owned by the engine's thread. This module knows nothing of passes, pools or gRPC.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

from specinfer.errors import InvalidRequest, StaleEpoch
from specinfer.messages import DraftResult, ShapeQuery
from specinfer.tree import TokenTree
from specinfer_draft.drafters.forecast import DrawForecast
from specinfer_draft.grow import Candidates, Expansion, GrowingTree, Thrift, Wave, expand
from specinfer_engine.batch import SequenceRows
from specinfer_engine.sequence import SequenceState


@dataclass(frozen=True)
class ProposeQuery:
    """What one propose item asks.

    Attributes:
        epoch: commits that the session has seen.
        known_len: tokens that the drafter is expected to hold; it drops what it holds beyond.
        new_token_ids: tokens committed after those; the last one is the root.
        shape: which tree to grow.
        arrival: when the item came, in seconds of the engine's clock.
        deadline: when the tree is of no use any more, on the same clock.
    """

    epoch: int
    known_len: int
    new_token_ids: tuple[int, ...]
    shape: ShapeQuery
    arrival: float
    deadline: float


class Growth:
    """A tree on its way: the search, and which of its nodes lie in which scratch slot.

    Scratch node j of a session with n committed tokens lies at logical slot n + j. Nodes get their
    scratch index in the order in which they are looked at; leaves never get one.

    Attributes:
        query: what was asked.
        future: takes the answer.
        tree: what was found so far.
        wave: nodes to look at in the next pass; None when the search is over.
        first_pass: when the first pass that carried it began, or None.
        compute_seconds: time in passes that carried it.
    """

    def __init__(
        self,
        query: ProposeQuery,
        future: Future[DraftResult],
        root_token_id: int,
        shape: ShapeQuery,
        thrift: Thrift,
    ) -> None:
        self.query = query
        self.future = future
        self.first_pass: float | None = None
        self.compute_seconds = 0.0
        self._root_token_id = root_token_id
        self._shape = shape
        self._thrift = thrift
        self.restart()

    def restart(self) -> None:
        """Search from the root again, because the keys and values of the nodes are gone."""
        self.tree = GrowingTree(self._root_token_id)
        self._expansion: Expansion = expand(self.tree, self._shape, self._thrift)
        self._scratch: dict[int, int] = {}
        self._ancestors: list[int] = []
        self.wave: Wave | None = next(self._expansion, None)

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
            above = self._scratch.get(self.tree.parents[node])
            bits = 0 if above is None else self._ancestors[above]
            self._scratch[node] = len(self._ancestors)
            self._ancestors.append(bits | (1 << len(self._ancestors)))
        return SequenceRows(
            token_ids=tuple(self.tree.token_ids[node] for node in nodes),
            context_len=len(state),
            first_node=first_node,
            # The root stands at len(state) - 1, so depth 1 stands where the context ends.
            depths=tuple(self.tree.depths[node] - 1 for node in nodes),
            ancestors=tuple(self._ancestors[first_node:]),
            block_table=tuple(state.block_table),
            logit_rows=tuple(range(len(nodes))),
        )

    def take(self, candidates: Sequence[Candidates]) -> None:
        """Give the search what the wave's pass has shown."""
        try:
            self.wave = self._expansion.send(candidates)
        except StopIteration:
            self.wave = None

    def result(self) -> TokenTree:
        """The best of what was found."""
        return self.tree.cut(self._shape.max_nodes)


@dataclass(eq=False)
class DraftSession:
    """One session's place in the drafter.

    Attributes:
        session_id: the router's name for it.
        epoch: highest epoch that a query named.
        state: committed tokens and where their keys and values lie.
        forecast: how the target draws.
        growth: the proposal that is being worked on, or None.
        prefill_eagerly: whether the prompt is computed before a query asks for it.
        owner: how often the session was claimed when it was opened.
        stream: the stream that opened it last, or None.
    """

    session_id: str
    epoch: int
    state: SequenceState
    forecast: DrawForecast
    growth: Growth | None = None
    prefill_eagerly: bool = True
    owner: int = 0
    stream: object | None = None

    def check(self, query: ProposeQuery) -> None:
        """Change nothing, and say whether the query can be answered.

        Raises:
            StaleEpoch: when the query is older than the session, or speaks of tokens that are not
                held.
            InvalidRequest: when no token is left.
        """
        num_held = len(self.state.token_ids)
        if query.epoch < self.epoch:
            raise StaleEpoch(f"session {self.session_id[:256]} is at epoch {self.epoch}")
        if query.known_len > num_held:
            raise StaleEpoch(
                f"session {self.session_id[:256]} holds {num_held} tokens, not {query.known_len}; "
                "open it again"
            )
        if query.known_len + len(query.new_token_ids) < 1:
            raise InvalidRequest("a session keeps at least its root", field="known_len")

    def advance(self, query: ProposeQuery) -> None:
        """Move to the tokens that the query tells of, keeping what agrees with them.

        The root always ends up without keys and values, since the pass over it begins the tree.
        Accepted nodes are computed again instead of being moved: they ride in the root's pass,
        which has to be made anyway, and no slot is held between rounds.

        Raises as `check` does.
        """
        self.check(query)
        held = self.state.token_ids
        new = query.new_token_ids
        total = query.known_len + len(new)
        agreed = query.known_len
        while agreed < min(total, len(held)) and held[agreed] == new[agreed - query.known_len]:
            agreed += 1
        agreed = min(agreed, total - 1)
        rest = [*held[agreed : query.known_len], *new[max(agreed - query.known_len, 0) :]]
        self.state.truncate(agreed)
        self.state.append(rest)
        self.epoch = query.epoch

    def give_up_blocks(self) -> None:
        """Free everything in the pool; it is computed again when a query needs it."""
        self.state.free()
        self.prefill_eagerly = False
        if self.growth is not None:
            self.growth.restart()


def fit_shape(shape: ShapeQuery, *, max_nodes: int, max_depth: int) -> ShapeQuery:
    """The shape within the worker's tree size and the model's length."""
    return replace(
        shape,
        max_nodes=min(shape.max_nodes, max_nodes),
        max_depth=max(0, min(shape.max_depth, max_depth)),
    )
