"""One session as a model drafter sees it, and what is known of its next tokens.

Plain state, owned by the engine's thread. This module knows nothing of passes, pools or gRPC.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

from specinfer.errors import InvalidRequest, StaleEpoch
from specinfer.messages import DraftResult, ShapeQuery
from specinfer_draft.drafters.forecast import DrawForecast
from specinfer_draft.drafters.search import TreeSearch
from specinfer_draft.grow import Thrift
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


@dataclass(eq=False)
class Growth:
    """A proposal that is being worked on.

    Attributes:
        query: what was asked.
        future: takes the answer.
        search: the tree that grows.
        first_pass: when the first pass that carried it began, or None.
        compute_seconds: time in passes that carried it.
    """

    query: ProposeQuery
    future: Future[DraftResult]
    search: TreeSearch
    first_pass: float | None = None
    compute_seconds: float = 0.0


@dataclass(eq=False)
class DraftSession:
    """One session's place in the drafter.

    Attributes:
        session_id: the router's name for it.
        epoch: highest epoch that a query named.
        state: committed tokens and where their keys and values lie.
        forecast: how the target draws.
        growth: the proposal that is being worked on, or None.
        ahead: the search for the next tree while the last one is verified, or None; `state` ends
            with the tokens that it takes for granted then, from index `num_told` on.
        num_told: tokens that the router has told of.
        prefill_eagerly: whether the prompt is computed before a query asks for it.
        owner: how often the session was claimed when it was opened.
        stream: the stream that opened it last, or None.
    """

    session_id: str
    epoch: int
    state: SequenceState
    forecast: DrawForecast
    growth: Growth | None = None
    ahead: TreeSearch | None = None
    num_told: int = 0
    prefill_eagerly: bool = True
    owner: int = 0
    stream: object | None = None

    def __post_init__(self) -> None:
        self.num_told = len(self.state)

    @property
    def search(self) -> TreeSearch | None:
        """The tree that grows, for a proposal or ahead of one."""
        return self.ahead if self.growth is None else self.growth.search

    def check(self, query: ProposeQuery) -> None:
        """Change nothing, and say whether the query can be answered.

        Raises:
            StaleEpoch: when the query is older than the session, or speaks of tokens that are not
                held.
            InvalidRequest: when no token is left.
        """
        if query.epoch < self.epoch:
            raise StaleEpoch(f"session {self.session_id[:256]} is at epoch {self.epoch}")
        if query.known_len > self.num_told:
            raise StaleEpoch(
                f"session {self.session_id[:256]} holds {self.num_told} tokens, "
                f"not {query.known_len}; open it again"
            )
        if query.known_len + len(query.new_token_ids) < 1:
            raise InvalidRequest("a session keeps at least its root", field="known_len")

    def advance(self, query: ProposeQuery) -> tuple[TreeSearch, int] | None:
        """Move to the tokens that the query tells of, keeping what agrees with them.

        The root always ends up without committed keys and values, since the pass over it begins the
        tree. Accepted nodes are computed again instead of being moved: they ride in the root's
        pass, which has to be made anyway.

        Returns:
            The search that went ahead and its node which is the root now, where it had come so far;
            its scratch slots are held then, and the root's keys and values are in one of them.

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
        ahead, self.ahead = self.ahead, None
        foreseen = ahead is not None and agreed == len(held) and self.state.num_missing == 0
        node = ahead.find(rest) if ahead is not None and foreseen else None
        self.state.truncate(agreed)
        if node is None:
            self.state.release_scratch()
        self.state.append(rest)
        self.num_told, self.epoch = total, query.epoch
        return None if ahead is None or node is None else (ahead, node)

    def go_ahead(self, token_ids: Sequence[int], shape: ShapeQuery, thrift: Thrift) -> None:
        """Take for granted that these tokens come next, and begin a tree below the last of them."""
        self.state.append(token_ids)
        self.ahead = TreeSearch(self.state.token_ids[-1], shape, thrift)
        self.forecast.begin(self.state.token_ids)

    def drop_ahead(self) -> None:
        """Take nothing for granted any more."""
        if self.ahead is not None:
            self.ahead = None
            self.state.truncate(self.num_told)
            self.state.release_scratch()

    def give_up_blocks(self) -> None:
        """Free everything in the pool; it is computed again when a query needs it."""
        self.drop_ahead()
        self.state.free()
        self.prefill_eagerly = False
        if self.growth is not None:
            self.growth.search.restart()


def fit_shape(shape: ShapeQuery, *, max_nodes: int, max_depth: int) -> ShapeQuery:
    """The shape within the worker's tree size and the model's length."""
    return replace(
        shape,
        max_nodes=min(shape.max_nodes, max_nodes),
        max_depth=max(0, min(shape.max_depth, max_depth)),
    )
