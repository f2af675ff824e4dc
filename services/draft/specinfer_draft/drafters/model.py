"""The model drafter: a small model on the shared engine grows trees for many sessions at once.

Each pass carries the next level of every tree that grows, so a tree of depth d costs d passes and
many trees cost hardly more than one; sessions join and leave at any pass. The first pass of a tree
takes the tokens committed since the last one along with the root (algorithms.md 1.4). This module
knows nothing of gRPC or threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol

import torch
from torch import Tensor

from specinfer.errors import (
    Cancelled,
    InvalidRequest,
    LeaseLost,
    NotFound,
    ResourceExhausted,
    SpecinferError,
    StaleEpoch,
)
from specinfer.grammar import GrammarState
from specinfer.messages import DraftResult
from specinfer.metrics import DraftMetrics
from specinfer.sampling import SamplingParams
from specinfer_draft.drafters.ahead import go_ahead
from specinfer_draft.drafters.forecast import DrawForecast, NoiseCache
from specinfer_draft.drafters.limits import DrafterLimits, check_open, check_tokens
from specinfer_draft.drafters.looks import look
from specinfer_draft.drafters.passes import PassPlanner, Plan, Share
from specinfer_draft.drafters.search import TreeSearch
from specinfer_draft.drafters.session import DraftSession, Growth, ProposeQuery, fit_shape
from specinfer_draft.drafters.static_growth import StaticGrowths
from specinfer_draft.drafters.whole_trees import WholeTrees
from specinfer_draft.grow import Candidates, check_shape
from specinfer_engine.batch import SequenceRows
from specinfer_engine.blocks import BlockManager
from specinfer_engine.fence import OwnerFence
from specinfer_engine.sequence import SequenceState
from specinfer_engine.thread import set_exception, set_result


class DraftRunner(Protocol):
    """What the drafter needs of a model: passes over rows, and copies inside the KV pool."""

    def forward(self, rows: Sequence[SequenceRows]) -> list[Tensor]:
        """Raw logits of the rows asked for, float [len(logit_rows), vocab_size] a sequence."""
        ...

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy blocks to blocks; all sources are read first."""
        ...


class ModelDrafter:
    """Grows trees with a model; see the package for the four calls.

    Args:
        runner: the model and its KV pool.
        blocks: the pool's bookkeeping.
        limits: bounds and habits.
        clock: seconds, the clock of the queries' deadlines.
        device: where the runner's logits lie.
        growths: what grows whole trees of stated widths with the runner; None: level by level.
    """

    def __init__(
        self,
        runner: DraftRunner,
        blocks: BlockManager,
        limits: DrafterLimits,
        *,
        clock: Callable[[], float] = time.perf_counter,
        device: torch.device | str = "cpu",
        growths: StaticGrowths | None = None,
    ) -> None:
        self.limits = limits
        self._runner = runner
        self._blocks = blocks
        self._clock = clock
        self._device = device
        self._planner = PassPlanner(
            blocks, max_rows=limits.max_rows, prefill_rows=limits.prefill_rows
        )
        self._fence = OwnerFence()
        self._noise = NoiseCache(limits.vocab_size, device)
        self._whole: WholeTrees | None = None
        if growths is not None:
            self._whole = WholeTrees(growths, blocks, runner.copy_blocks, clock)
        self._wave_seconds = 0.0
        self._answers: list[tuple[Future[DraftResult], DraftResult]] = []
        self._counts: DraftMetrics | None = None

    def count_with(self, metrics: DraftMetrics) -> None:
        """Count passes and proposals, and show what is held; to be called before the first one."""
        self._counts = metrics
        metrics.watch_one("num_sessions", lambda: self.num_sessions)
        metrics.watch_one("num_steps_waiting", lambda: self.num_growing)
        metrics.watch_one("fenced_calls", lambda: self._fence.num_refused)
        metrics.watch_pool(self._blocks)

    @property
    def num_sessions(self) -> int:
        """Sessions open."""
        return len(self._planner.sessions)

    @property
    def num_growing(self) -> int:
        """Proposals that are being worked on."""
        return len(self._planner.growing)

    def open(
        self,
        session_id: str,
        epoch: int,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        num_prompt_tokens: int = 0,
        *,
        grammar: GrammarState | None = None,
        owner: int = 0,
        stream: object | None = None,
    ) -> None:
        """Start to follow a session; what was known under its name is replaced.

        The first `num_prompt_tokens` tokens are the prompt and the rest is output; 0 means that all
        are the prompt. Guesses stay within `grammar`, a state of this session alone. `owner` is
        how often the session was claimed; `stream` has it from now on, for `close_stream`.

        Raises:
            InvalidRequest: when the tokens or the sampling do not fit the model.
            LeaseLost: when somebody has claimed the session since.
            StaleEpoch: when the session is known here at a later epoch.
            ResourceExhausted: when every session here has a proposal going.
        """
        check_open(self.limits, session_id, token_ids, num_prompt_tokens)
        vocab_size, num_prompt = self.limits.vocab_size, num_prompt_tokens or len(token_ids)
        forecast = DrawForecast(
            sampling, vocab_size, num_prompt, self._device, grammar, self._noise
        )
        self._admit(session_id, owner)
        known = self._planner.sessions.get(session_id)
        if known is not None and epoch < known.epoch:
            raise StaleEpoch(f"session {session_id[:256]} is at epoch {known.epoch}, not {epoch}")
        self._end(session_id, Cancelled("the session was opened again"))
        self._make_place()
        state = SequenceState(self._blocks, token_ids)
        self._planner.add(
            DraftSession(session_id, epoch, state, forecast, owner=owner, stream=stream)
        )

    def propose(
        self,
        session_id: str,
        query: ProposeQuery,
        future: Future[DraftResult],
        *,
        owner: int = 0,
    ) -> None:
        """Take what was committed and begin to grow a tree below the root.

        Raises:
            LeaseLost: when somebody has claimed the session since.
            NotFound: when the session is not open here; open it again.
            StaleEpoch: when the query is older than the session or speaks of tokens not held.
            InvalidRequest: when the shape or a token is none.
        """
        self._admit(session_id, owner)
        session = self._planner.sessions.get(session_id)
        if session is None:
            raise NotFound(f"no session {session_id[:256]} here; open it again")
        check_shape(query.shape)
        check_tokens(self.limits, query.new_token_ids)
        num_tokens = query.known_len + len(query.new_token_ids)
        if num_tokens > self.limits.max_model_len:
            # The model has no such position, and a pass that fails ends the engine for everybody.
            raise InvalidRequest(
                f"{num_tokens} tokens are more than the drafter's {self.limits.max_model_len}",
                field="new_token_ids",
            )
        # Checked before anything changes: an error answers this call alone.
        session.check(query)
        self._drop_growth(session, Cancelled("a newer proposal for the session came"))
        ahead, known = session.ahead, session.advance(query)
        if ahead is not None and self._counts is not None:
            self._counts.observe_ahead("hit" if known else "miss")
        shape = fit_shape(
            query.shape,
            max_nodes=self.limits.max_tree_nodes - 1,
            # A node is looked at only where its own position fits; its children need none.
            max_depth=self.limits.max_model_len - num_tokens + 1,
        )
        root = session.state.token_ids[-1]
        earlier, node = known or (None, 0)
        search = TreeSearch(root, shape, self.limits.thrift, earlier, node)
        session.growth = Growth(query, future, search)
        session.forecast.begin(session.state.token_ids)
        self._planner.start_growing(session)
        if search.wave is None:
            self._finish(session)
            self._deliver()

    def close(self, session_id: str, *, owner: int = 0) -> None:
        """Forget a session; an unknown one is fine.

        Raises:
            LeaseLost: when somebody has claimed the session since.
        """
        self._admit(session_id, owner)
        self._end(session_id, Cancelled("the session was closed"))

    def close_stream(self, stream: object) -> None:
        """Forget the sessions that `stream` was the last one to open."""
        for session in list(self._planner.sessions.values()):
            if session.stream is stream:
                self._end(session.session_id, Cancelled("the session's stream ended"))

    @torch.inference_mode()
    def run_pass(self) -> bool:
        """Answer what is late, then one pass for the rest. Returns whether anything was done."""
        start = self._clock()
        num_late = self._finish_late(start)
        plan = self._planner.plan()
        num_stuck = self._finish_stuck()
        self._deliver()
        if not plan:
            return num_late + num_stuck > 0 or self._run_ahead()
        shares = list(plan.values())
        logits = self._forward(plan)
        num_whole = 0 if self._whole is None else self._whole.grow(shares, logits)
        candidates = look(shares, logits, self.limits.spread)
        end = self._clock()
        self._count_pass(shares, num_whole, end - start)
        if not any(share.num_chunk for share in shares):
            # Half new, half old: follows a changing load within a few passes.
            self._wave_seconds += 0.5 * (end - start - self._wave_seconds)
        for share, found in zip(shares, candidates, strict=True):
            self._take(share, found, start, end)
        self._deliver()
        return True

    def _run_ahead(self) -> bool:
        """One pass for trees that nobody has asked for yet; whether there was any."""
        plan = self._planner.plan_ahead()
        if not plan:
            return False
        shares = list(plan.values())
        candidates = look(shares, self._forward(plan), self.limits.spread)
        for share, found in zip(shares, candidates, strict=True):
            ahead = share.session.ahead
            assert ahead is not None
            ahead.take(found)
        if self._counts is not None:
            self._counts.observe_ahead_pass(sum(len(share.rows.token_ids) for share in shares))
        return True

    def _forward(self, plan: Plan) -> list[Tensor]:
        """Logits of the rows wanted, [num_wanted, vocab_size] a share; chunks are committed."""
        sources = [block for share in plan.values() for block in share.copies.sources]
        targets = [block for share in plan.values() for block in share.copies.targets]
        if sources:
            self._runner.copy_blocks(sources, targets)
        logits = self._runner.forward([share.rows for share in plan.values()])
        for share in plan.values():
            if share.num_chunk:
                share.session.state.commit(range(share.num_chunk))
        return logits

    def _take(
        self, share: Share, candidates: Sequence[Candidates], start: float, end: float
    ) -> None:
        """Book one share of a pass."""
        growth = share.session.growth
        if growth is None:
            return
        growth.compute_seconds += end - start
        if growth.first_pass is None:
            growth.first_pass = start
        if candidates:
            growth.search.take(candidates)
        if growth.search.wave is None:
            self._finish(share.session)

    def _count_pass(self, shares: Sequence[Share], num_whole: int, seconds: float) -> None:
        if self._counts is None:
            return
        chunks = [share for share in shares if share.num_chunk]
        # The last row of a chunk whose logits are wanted is the root.
        num_roots = sum(bool(share.rows.logit_rows) for share in chunks)
        self._counts.observe_pass(
            seconds,
            num_sessions=len(shares),
            num_prefill=sum(share.num_chunk for share in chunks) - num_roots,
            num_roots=num_roots,
            num_rows=num_whole + sum(len(share.rows.token_ids) for share in shares),
        )

    def _finish_late(self, now: float) -> int:
        """Answer proposals whose next pass would end past their deadline; how many there were.

        A proposal that had no pass yet gets one as long as there is any time left.
        """
        num_late = 0
        for session in self._planner.growing:
            growth = session.growth
            if growth is None:
                continue
            expected = 0.0 if growth.first_pass is None else self._wave_seconds
            if now + expected >= growth.query.deadline:
                self._finish(session, "late")
                num_late += 1
        if num_late:
            # Otherwise one slow pass would end every tree after its first level for ever.
            self._wave_seconds *= 0.75
        return num_late

    def _finish_stuck(self) -> int:
        """Answer proposals that the pool is too small for; how many there were."""
        stuck, self._planner.stuck = self._planner.stuck, []
        for session in stuck:
            self._finish(session, "stuck")
        return len(stuck)

    def _finish(self, session: DraftSession, outcome: str = "done") -> None:
        """End a session's proposal with the best of what was found; `_deliver` hands it out."""
        growth = session.growth
        assert growth is not None
        tree, shape = growth.search.result(), growth.search.shape
        self._planner.stop_growing(session)
        if outcome == "done" and self.limits.ahead and go_ahead(session, tree, shape, self.limits):
            self._planner.start_ahead(session)
        first_pass = self._clock() if growth.first_pass is None else growth.first_pass
        result = DraftResult(
            growth.query.epoch,
            tree,
            queue_seconds=max(0.0, first_pass - growth.query.arrival),
            compute_seconds=growth.compute_seconds,
        )
        self._answers.append((growth.future, result))
        if self._counts is not None:
            seconds = self._clock() - growth.query.arrival
            self._counts.observe_proposal(outcome, result.tree.num_draft_tokens, seconds)

    def _deliver(self) -> None:
        """Hand out what is finished in one go, so that it can leave in one frame."""
        for future, result in self._answers:
            set_result(future, result)
        self._answers.clear()

    def _admit(self, session_id: str, owner: int) -> None:
        """Refuse an item of an owner who lost the session; end what a former owner has here."""
        known = self._planner.sessions.get(session_id)
        holder = None if known is None else known.owner
        if self._fence.pass_through(session_id, owner, holder):
            self._end(session_id, LeaseLost(f"owner {owner} has claimed the session"))

    def _end(self, session_id: str, reason: SpecinferError) -> None:
        session = self._planner.sessions.get(session_id)
        if session is not None:
            self._drop_growth(session, reason)
            self._planner.remove(session_id)

    def _drop_growth(self, session: DraftSession, reason: SpecinferError) -> None:
        growth = session.growth
        if growth is not None:
            self._planner.stop_growing(session)
            set_exception(growth.future, reason)

    def _make_place(self) -> None:
        """Close the least recently used session that grows nothing when all places are taken."""
        if self.num_sessions < self.limits.max_sessions:
            return
        for session in self._planner.sessions.values():
            if session.growth is None:
                self._planner.remove(session.session_id)
                return
        raise ResourceExhausted(
            f"all {self.limits.max_sessions} sessions of this drafter are busy", retry_after=0.1
        )
