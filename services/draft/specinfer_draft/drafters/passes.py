"""Which rows of which sessions share the next pass, and who yields when blocks run out.

    waves      the next level of every tree that grows, and the few new tokens before its root
    prefill    chunks of longer prompts, proposals first, in what `prefill_rows` leaves them

    ahead      when there is nothing else to do: trees that nobody has asked for yet

so a long prompt slows the trees of others by one chunk a pass and never stops them. Trees are
served in the order in which their queries came. When blocks run out, what went ahead is dropped,
then sessions that grow nothing lose theirs, the least recently used first, then the youngest
proposal; the oldest always gets on.
This module knows nothing of tensors, models or clocks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from specinfer_draft.drafters.session import DraftSession
from specinfer_engine.batch import SequenceRows
from specinfer_engine.blocks import BlockManager
from specinfer_engine.sequence import Moves

# Tokens before a root that count as the last round's and not as a prompt.
SHORT_CHUNK = 32


@dataclass(frozen=True)
class Share:
    """What one session brings to a pass.

    Attributes:
        session: whose rows these are.
        rows: the rows; the logits of the last one or of all of them are wanted, or of none.
        num_chunk: committed tokens among them, which get their keys and values; 0 for a wave.
        copies: blocks to copy before the pass.
    """

    session: DraftSession
    rows: SequenceRows
    num_chunk: int
    copies: Moves


Plan = dict[str, Share]


class PassPlanner:
    """Plans passes over the open sessions.

    Attributes:
        sessions: open sessions, the least recently used first.
        stuck: growing sessions that do not fit into the pool even alone; whoever plans takes them.

    Args:
        blocks: the pool.
        max_rows: most rows of a pass.
        prefill_rows: most rows of prompts in a pass that carries waves too.
    """

    def __init__(self, blocks: BlockManager, *, max_rows: int, prefill_rows: int) -> None:
        self.sessions: OrderedDict[str, DraftSession] = OrderedDict()
        self.stuck: list[DraftSession] = []
        self._blocks = blocks
        self._max_rows = max_rows
        self._prefill_rows = prefill_rows
        self._growing: dict[str, DraftSession] = {}
        self._prefilling: dict[str, DraftSession] = {}
        self._ahead: dict[str, DraftSession] = {}

    @property
    def growing(self) -> list[DraftSession]:
        """Sessions with a proposal, the oldest proposal first."""
        return list(self._growing.values())

    def add(self, session: DraftSession) -> None:
        """Take a session; its prompt is computed in the background."""
        self.sessions[session.session_id] = session
        self._prefilling[session.session_id] = session

    def remove(self, session_id: str) -> DraftSession:
        """Let a session go and free its blocks."""
        session = self.sessions.pop(session_id)
        self.stop_growing(session)
        self._prefilling.pop(session_id, None)
        self._ahead.pop(session_id, None)
        session.state.free()
        return session

    def start_growing(self, session: DraftSession) -> None:
        """A query came: the session is the most recently used and its proposal the youngest."""
        self.sessions.move_to_end(session.session_id)
        self._ahead.pop(session.session_id, None)
        self._growing[session.session_id] = session

    def stop_growing(self, session: DraftSession) -> None:
        """The proposal has been answered; scratch slots are given back.

        A prompt that the proposal did not get through is computed on in the background.
        """
        session.growth = None
        session.state.release_scratch()
        if self._growing.pop(session.session_id, None) and session.state.num_missing > SHORT_CHUNK:
            session.prefill_eagerly = True
            self._prefilling[session.session_id] = session

    def start_ahead(self, session: DraftSession) -> None:
        """The session's next tree is looked for whenever there is nothing else to do."""
        self._prefilling.pop(session.session_id, None)
        self._ahead[session.session_id] = session

    def plan_ahead(self) -> Plan:
        """A pass for trees that nobody has asked for; takes no blocks from anybody.

        It is short, as a proposal that comes meanwhile has to wait for its end.
        """
        plan: Plan = {}
        for session in list(self._ahead.values()):
            search, state = session.ahead, session.state
            if search is None or search.wave is None:
                del self._ahead[session.session_id]
                continue
            num_rows = state.num_missing if search.at_root else len(search.wave.nodes)
            num_slots = num_rows if search.at_root else search.num_scratch
            if _num_rows(plan) + num_rows > (self._prefill_rows if plan else self._max_rows):
                continue
            if state.blocks_needed(num_slots) > self._blocks.num_free_blocks:
                session.drop_ahead()
                continue
            copies = state.reserve(num_slots)
            if search.at_root:
                plan[session.session_id] = _chunk(session, num_rows, copies, (num_rows - 1,))
            else:
                plan[session.session_id] = Share(session, search.wave_rows(state), 0, copies)
        return plan

    def plan(self) -> Plan:
        """The next pass; empty when there is nothing to do or nothing fits."""
        plan: Plan = {}
        waiting = [session for session in self._growing.values() if session.growth]
        short = [session for session in waiting if session.state.num_missing <= SHORT_CHUNK]
        for session in short:
            self._plan_tree(plan, session)
        room = self._max_rows - _num_rows(plan)
        budget = _num_rows(plan) + min(room, self._prefill_rows if plan else self._max_rows)
        for session in (*(item for item in waiting if item not in short), *self._background()):
            self._plan_chunk(plan, session, budget - _num_rows(plan))
        return plan

    def _background(self) -> Iterator[DraftSession]:
        """Sessions without a proposal whose prompt is still to be computed."""
        for session in list(self._prefilling.values()):
            if session.growth is not None:
                continue
            if session.prefill_eagerly and session.state.num_missing > 1:
                yield session
            else:
                del self._prefilling[session.session_id]

    def _plan_tree(self, plan: Plan, session: DraftSession) -> None:
        """Rows of a session whose prompt is done: what is new up to the root, or a wave below."""
        search, state = session.search, session.state
        assert search is not None
        if search.at_root:
            self._plan_chunk(plan, session, self._max_rows - _num_rows(plan))
            return
        wave = search.wave
        if wave is None or _num_rows(plan) + len(wave.nodes) > self._max_rows:
            return
        if self._make_room(plan, session, search.num_scratch):
            copies = state.reserve(search.num_scratch)
            plan[session.session_id] = Share(session, search.wave_rows(state), 0, copies)

    def _plan_chunk(self, plan: Plan, session: DraftSession, max_rows: int) -> None:
        """Committed tokens without keys and values; in the background all but the root."""
        state = session.state
        if not state.block_table:
            state.share_prefix()
        missing = state.num_missing - (0 if session.growth else 1)
        count = min(missing, max_rows)
        if count < 1 or not self._make_room(plan, session, count):
            return
        copies = state.reserve(count)
        wanted = (count - 1,) if session.growth and count == state.num_missing else ()
        plan[session.session_id] = _chunk(session, count, copies, wanted)

    def _make_room(self, plan: Plan, session: DraftSession, num_slots: int) -> bool:
        """Free blocks until `num_slots` fit, taking them from those who have to yield."""
        while session.state.blocks_needed(num_slots) > self._blocks.num_free_blocks:
            if self._ahead:
                self._ahead.popitem()[1].drop_ahead()
                continue
            victim = next(self._victims(session), None)
            if victim is None:
                if session.growth and not self._others_hold(session):
                    self.stuck.append(session)
                return False
            plan.pop(victim.session_id, None)
            victim.give_up_blocks()
        return True

    def _victims(self, session: DraftSession) -> Iterator[DraftSession]:
        """Who yields to `session`: those that grow nothing, then younger proposals."""
        for other in self.sessions.values():
            if other is session:
                if session.growth is None:
                    return  # background work takes from less recently used sessions alone
            elif other.state.block_table and other.growth is None:
                yield other
        for other in reversed(self._growing.values()):
            if other is session:
                return
            if other.state.block_table:
                yield other

    def _others_hold(self, session: DraftSession) -> bool:
        return any(
            other.state.block_table for other in self.sessions.values() if other is not session
        )


def _chunk(session: DraftSession, count: int, copies: Moves, wanted: tuple[int, ...]) -> Share:
    """The next `count` tokens without keys and values; their slots are reserved."""
    state = session.state
    start = state.num_cached
    tokens = state.token_ids[start : start + count]
    return Share(
        session, SequenceRows.chain(tokens, start, state.block_table, wanted), count, copies
    )


def _num_rows(plan: Plan) -> int:
    return sum(len(share.rows.token_ids) for share in plan.values())
