"""Which rows share the next pass: trees first, prefill in what is left, blocks to the oldest.

    trees     sessions whose tree waits and whose prefix is computed, longest waiting first
    prefill   chunks of the others, oldest first; never fewer than `min_prefill_rows` rows in all,
              so that a stream of trees cannot starve a new session, and never a tree's rows

A chunk that reaches the root takes its tree along into the same pass. When blocks run out, the
youngest session gives its blocks up and is computed again later, so the oldest always gets on. A
step that has waited `starve_seconds` for blocks changes places with an older session that was
answered meanwhile, so that nobody waits for the end of another's text. This module knows nothing
of tensors, models or futures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from specinfer.tree import TokenTree
from specinfer_engine.blocks import BlockManager
from specinfer_engine.sequence import Moves
from specinfer_verify.session import Session


@dataclass(frozen=True)
class ScheduledRows:
    """One session's share of a pass: a chunk of its waiting tokens, then maybe its tree.

    Attributes:
        session: whose rows these are.
        num_chunk: tokens before the root that get their keys and values.
        tree: the tree below the chunk, or None while the prefix is incomplete.
        copies: blocks to copy before the pass.
    """

    session: Session
    num_chunk: int
    tree: TokenTree | None
    copies: Moves

    @property
    def num_rows(self) -> int:
        """Rows in the pass."""
        return self.num_chunk + (len(self.tree) if self.tree else 0)

    def row_tree(self) -> TokenTree:
        """Chunk and tree as one tree: a chain with the guesses below its end."""
        start = self.session.state.num_cached
        chunk = self.session.state.token_ids[start : start + self.num_chunk]
        if self.tree is None:
            return TokenTree.chain(chunk)
        if not chunk:
            return self.tree
        parents = (self.num_chunk + parent for parent in self.tree.parents)
        chain = range(-1, self.num_chunk - 1)
        return TokenTree((*chunk, *self.tree.token_ids), (*chain, *parents))


class Scheduler:
    """Holds the open sessions and plans passes for them.

    Args:
        blocks: the pool.
        max_rows: most rows of a pass, but for `min_prefill_rows`.
        min_prefill_rows: rows that prefill gets in every pass if it needs them.
        yield_seconds: how long a session without a step keeps its blocks from a younger one.
        starve_seconds: how long a step waits for blocks that older sessions use.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_rows: int,
        min_prefill_rows: int,
        yield_seconds: float,
        starve_seconds: float,
    ) -> None:
        self.blocks = blocks
        self.sessions: dict[str, Session] = {}
        self.num_preemptions = 0
        self._max_rows = max_rows
        self._min_prefill_rows = min_prefill_rows
        self._yield_seconds = yield_seconds
        self._starve_seconds = starve_seconds

    def add(self, session: Session) -> None:
        """Take a session; it joins the next pass."""
        self.sessions[session.session_id] = session

    def remove(self, session_id: str) -> Session:
        """Let a session go and free its blocks."""
        session = self.sessions.pop(session_id)
        session.state.free()
        return session

    @property
    def num_waiting(self) -> int:
        """Steps that wait for a pass."""
        return sum(session.pending is not None for session in list(self.sessions.values()))

    def schedule(self, now: float, ahead: Sequence[Session] = ()) -> list[ScheduledRows]:
        """Plan the next pass; empty when nothing can run.

        Args:
            now: the time, on the clock of the steps.
            ahead: sessions whose roots go along where there is room, though no step waits.
        """
        plan: dict[str, ScheduledRows] = {}
        for session in self._waiting_trees():
            self._plan_rows(plan, session, self._max_rows - _num_rows(plan), now)
        budget = max(self._max_rows - _num_rows(plan), self._min_prefill_rows)
        limit = _num_rows(plan) + budget
        for session in self._waiting_prefills():
            self._plan_rows(plan, session, limit - _num_rows(plan), now)
        for session in ahead:
            self._plan_root(plan, session)
        return list(plan.values())

    def _waiting_trees(self) -> list[Session]:
        ready = [s for s in self.sessions.values() if s.pending and not s.num_missing]
        return sorted(ready, key=_ready)

    def _waiting_prefills(self) -> list[Session]:
        return [
            session
            for session in self.sessions.values()
            if session.num_missing and (session.pending or session.prefill_eagerly)
        ]

    def _plan_rows(
        self, plan: dict[str, ScheduledRows], session: Session, max_rows: int, now: float
    ) -> None:
        """Add the session's rows to the plan if they fit in `max_rows` and in the pool."""
        if not session.state.block_table:
            self._take_prefix(session)
        num_chunk = min(session.num_missing, max_rows)
        tree = session.pending.tree if session.pending else None
        if num_chunk < session.num_missing or (tree and num_chunk + len(tree) > max_rows):
            tree = None
        num_rows = num_chunk + (len(tree) if tree else 0)
        if num_rows < 1 or not self._make_room(plan, session, num_rows, now):
            return
        copies = session.state.reserve(num_rows)
        plan[session.session_id] = ScheduledRows(session, num_chunk, tree, copies)

    def _plan_root(self, plan: dict[str, ScheduledRows], session: Session) -> None:
        """Add a root that no step waits for; it takes nobody's blocks."""
        state = session.state
        fits = _num_rows(plan) < self._max_rows
        if (
            fits
            and not session.num_missing
            and state.blocks_needed(1) <= self.blocks.num_free_blocks
        ):
            root = TokenTree.root_only(state.token_ids[-1])
            plan[session.session_id] = ScheduledRows(session, 0, root, state.reserve(1))

    def _take_prefix(self, session: Session) -> None:
        session.state.share_prefix()
        if session.num_cached_tokens is None:
            found = min(session.state.num_cached, session.num_prompt_tokens)
            session.num_cached_tokens = found

    def _make_room(
        self, plan: dict[str, ScheduledRows], session: Session, num_rows: int, now: float
    ) -> bool:
        """Free blocks until `num_rows` fit, taking them from those who have to yield."""
        while session.state.blocks_needed(num_rows) > self.blocks.num_free_blocks:
            victim = next(self._victims(session, now), None) if session.pending else None
            if victim is None:
                return False
            plan.pop(victim.session_id, None)
            victim.state.free()
            victim.prefill_eagerly = victim.answered = False
            if victim.age < session.age and victim.pending:
                # Otherwise it would take everything back before `session` was answered.
                victim.age, session.age = session.age, victim.age
            self.num_preemptions += 1
        return True

    def _victims(self, session: Session, now: float) -> Iterator[Session]:
        """Who yields to `session`: younger ones, the youngest first, then those long idle.

        Then, when it has waited too long, the youngest of those that were answered since they hold
        blocks: each turn does at least one round, so that sessions never merely chase each other.
        """
        holding = [other for other in self.sessions.values() if other.state.block_table]
        younger = [other for other in holding if other.age > session.age]
        yield from sorted(younger, key=lambda other: -other.age)
        idle = [
            other
            for other in holding
            if other.age < session.age
            and not other.pending
            and now - other.last_active >= self._yield_seconds
        ]
        yield from sorted(idle, key=lambda other: other.last_active)
        if session.pending and now - session.pending.arrival >= self._starve_seconds:
            stepping = [other for other in holding if other.age < session.age and other.answered]
            yield from sorted(stepping, key=lambda other: -other.age)


def _num_rows(plan: dict[str, ScheduledRows]) -> int:
    return sum(item.num_rows for item in plan.values())


def _ready(session: Session) -> float:
    return session.pending.ready if session.pending else 0.0
