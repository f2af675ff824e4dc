"""The verify engine: sessions in, one tree-parallel pass after another, confirmed tokens out.

Public methods may be called from any thread and return futures; everything else happens on the
engine's own thread. This module knows nothing of gRPC, text or drafters.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from specinfer.errors import Cancelled, LeaseLost, NotFound, SpecinferError, Unavailable
from specinfer.grammar import GrammarState
from specinfer.messages import VerifyResult, WorkerLoad
from specinfer.metrics import VerifyMetrics
from specinfer.sampling import SamplingParams
from specinfer.step_curve import StepCurve
from specinfer.tree import TokenTree
from specinfer_engine.blocks import BlockManager
from specinfer_engine.fence import MAX_SESSION_ID_LENGTH, OwnerFence
from specinfer_engine.sequence import SequenceState
from specinfer_engine.thread import EngineThread, set_exception, set_result
from specinfer_verify.checks import Limits, check_epoch, check_num_tokens, check_open, check_tree
from specinfer_verify.counting import CountPass, count_in, count_nothing
from specinfer_verify.device_walks import DeviceWalks
from specinfer_verify.gathering import Gathering
from specinfer_verify.passes import TargetRunner, move_slots, run_rows
from specinfer_verify.roots_ahead import RootsAhead, cheap_rows
from specinfer_verify.scheduler import Scheduler
from specinfer_verify.session import PendingStep, Session, StepItem, fit_tree
from specinfer_verify.silence import silent_for
from specinfer_verify.walks import Outcome, PassFacts, finish

# How soon blocks that idle sessions have to yield are noticed.
IDLE_SECONDS = 0.05

log = logging.getLogger(__name__)


class VerifyEngine:
    """Holds the target's sessions and decides their tokens.

    Args:
        runner: the model and its KV pool.
        blocks: the pool's bookkeeping; num_blocks and block_size are the runner's.
        limits: what a session may be.
        walk_on_device: whether sessions are walked together where their logits lie, for a GPU.
        clock: seconds, for queue times and idle sessions.
        on_failure: called on the engine's thread when a pass has failed.
    """

    def __init__(
        self,
        runner: TargetRunner,
        blocks: BlockManager,
        limits: Limits,
        *,
        walk_on_device: bool = False,
        clock: Callable[[], float] = time.perf_counter,
        on_failure: Callable[[], None] | None = None,
    ) -> None:
        self.limits = limits.within_pool(blocks)
        self._runner = runner
        self._walks = DeviceWalks(walk_on_device)
        self._blocks = blocks
        self._clock = clock
        self._scheduler = Scheduler(
            blocks,
            max_rows=limits.max_rows,
            min_prefill_rows=limits.min_prefill_rows,
            yield_seconds=limits.yield_seconds,
            starve_seconds=limits.starve_seconds,
        )
        self._fence = OwnerFence()
        self._count: CountPass = count_nothing
        self._num_opened = 0
        self._draining = False
        self._next_sweep = 0.0
        self._empty = threading.Event()
        self._empty.set()
        self._gathering = Gathering(self.limits.max_rows)
        self._roots_ahead = RootsAhead(self.limits)
        self._thread = EngineThread(
            "verify-engine",
            self.run_pass,
            idle_seconds=lambda: self._gathering.pause or IDLE_SECONDS,
            on_failure=on_failure,
        )

    def start(self) -> None:
        """Start the engine's thread."""
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.healthy

    def count_with(self, metrics: VerifyMetrics) -> None:
        """Count passes, and show what is held; to be called before `start`."""
        metrics.watch_one("roots_ahead", lambda: self._roots_ahead.num_computed)
        metrics.watch_one("roots_ahead_used", lambda: self._roots_ahead.num_used)
        self._count = count_in(metrics, self._scheduler, self._blocks, self._fence)

    def gather_with(self, costs: StepCurve) -> None:
        """Let passes wait for sessions that are due where it pays; to be called before `start`."""
        self._gathering.costs = costs

    def run_ahead(self, costs: StepCurve) -> None:
        """Compute roots before they are asked for where that is cheap; call it before `start`."""
        self._roots_ahead = RootsAhead(self.limits, cheap_rows(costs, self.limits.max_rows))

    @property
    def num_preemptions(self) -> int:
        """How often a session gave its blocks up for another one."""
        return self._scheduler.num_preemptions

    def load(self) -> WorkerLoad:
        """How busy the engine is; a snapshot that may be taken from any thread."""
        return WorkerLoad(
            num_sessions=len(self._scheduler.sessions),
            num_waiting=self._scheduler.num_waiting,
            num_free_blocks=self._blocks.num_free_blocks,
            draining=self._draining or not self.healthy,
        )

    def open(
        self,
        session_id: str,
        epoch: int,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        num_prompt_tokens: int,
        num_logprobs: int | None = None,
        *,
        grammar: GrammarState | None = None,
        owner: int = 0,
        stream: object | None = None,
    ) -> Future[None]:
        """Take a session at an epoch, replacing what an earlier epoch or owner left of it.

        Args:
            session_id: the router's name for it.
            epoch: commits so far.
            token_ids: prompt and output; the last one is the root.
            sampling: how tokens are drawn.
            num_prompt_tokens: how many of `token_ids` are the prompt.
            num_logprobs: most probable tokens to report with each token; None reports no logprobs.
            grammar: a state of this session alone, for what its output has to match, or None.
            owner: how often the session was claimed; what lower owners send is refused from now on.
            stream: which stream has the session from now on, for `close_stream`.

        The future fails with InvalidRequest, LeaseLost, StaleEpoch, ResourceExhausted or
        Unavailable.
        """
        tokens = tuple(token_ids)

        def take() -> None:
            check_open(
                self.limits, session_id, epoch, tokens, sampling, num_prompt_tokens, num_logprobs
            )
            self._admit(session_id, owner)
            self._open(
                session_id, epoch, tokens, sampling, num_prompt_tokens, num_logprobs, grammar
            )
            session = self._scheduler.sessions[session_id]
            session.owner, session.stream = owner, stream

        return self._thread.call(take)

    def step(
        self,
        session_id: str,
        epoch: int,
        tree: TokenTree,
        *,
        num_tokens: int = 1,
        owner: int = 0,
    ) -> Future[VerifyResult]:
        """Check a tree below the session's root and commit what it confirms.

        With a root alone up to `num_tokens` tokens are decoded before the answer, one pass each;
        fewer where a text ends or the session is full.

        A step for the epoch before the session's is answered with the result that led here, so a
        router may ask again after a broken stream. The future fails with NotFound, StaleEpoch,
        LeaseLost, InvalidTree, InvalidRequest, Cancelled or InternalError.
        """
        item = StepItem(session_id, epoch, owner, tree, num_tokens, self._clock())
        return self._thread.submit(lambda future: self._take_step(future, item))

    def close(self, session_id: str, *, owner: int = 0) -> Future[None]:
        """Give a session's blocks up; an unknown one is fine, a lost one fails with LeaseLost."""
        # A router that gave the session up may close it under one that has just taken it over: that
        # one is told what lets it open the session again.
        reason = NotFound("the session was closed")

        def end() -> None:
            self._admit(session_id, owner)
            self._close(session_id, reason)

        return self._thread.call(end)

    def close_stream(self, stream: object) -> None:
        """Close the sessions that `stream` was the last one to open; returns at once."""
        self._thread.tell(lambda: self._close_stream(stream))

    def drain(self, timeout: float) -> bool:
        """Refuse new sessions and wait for the open ones; whether they all ended in time."""
        self._draining = True
        return self._empty.wait(timeout)

    def stop(self) -> None:
        """End the thread; what is pending fails with Unavailable."""
        self._draining = True
        self._thread.stop()
        self._empty.set()  # nobody is left to wait for

    def run_pass(self) -> bool:
        """One pass: schedule, run, walk and commit. Returns whether there was anything to do."""
        start = self._clock()
        self._evict_idle(start)
        sessions = self._scheduler.sessions.values()
        ahead = self._roots_ahead.chosen(sessions)
        waits = self._gathering.waits(start, sessions, ahead)
        plan = [] if waits else self._scheduler.schedule(start, ahead)
        if not plan:
            return False
        logits = run_rows(self._runner, plan)
        for item in plan:
            if item.tree is not None and item.session.pending is None:
                item.session.pending = PendingStep.unasked(item.tree, start)
        walked = self._walks.of(plan, logits)
        facts = PassFacts(start, self._clock(), sum(item.num_rows for item in plan))
        self._count(plan, facts)
        outcomes = [
            finish(item, rows, facts, walked.get(item.session.session_id))
            for item, rows in zip(plan, logits, strict=True)
        ]
        move_slots(self._runner, [outcome.moves for outcome in outcomes])
        self._answer(outcomes)
        return True

    def _answer(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            session, step = outcome.session, outcome.session.pending
            if outcome.error is not None and step is not None and step.partial is not None:
                # What came before it is good; who goes on from there is told.
                step.num_tokens = 1
                self._end_pass(session, step.partial)
            elif outcome.error is not None:
                self._close(session.session_id, outcome.error)
            elif outcome.result is not None:
                self._end_pass(session, outcome.result)

    def _end_pass(self, session: Session, result: VerifyResult) -> None:
        """Answer a step, or let it go on with the next plain token."""
        step = session.pending
        assert step is not None
        if step.num_tokens > 1 and not self.limits.end_at(session.state.token_ids):
            step.go_on(result, self._clock())
        elif step.futures:
            session.told(result, len(step.tree), self._clock())
            for future in step.futures:
                set_result(future, result)
        else:
            self._roots_ahead.keep(session, result)

    def _open(
        self,
        session_id: str,
        epoch: int,
        token_ids: tuple[int, ...],
        sampling: SamplingParams,
        num_prompt_tokens: int,
        num_logprobs: int | None,
        grammar: GrammarState | None,
    ) -> None:
        known = self._scheduler.sessions.get(session_id)
        if known is not None:
            known.take_back()
            if known.repeats(epoch, token_ids, sampling, num_prompt_tokens, num_logprobs, grammar):
                return
            self._close(session_id, Cancelled("the session was opened again"))
        elif self._draining:
            raise Unavailable("this worker is draining")
        now = self._clock()
        self._evict_idle(now)
        self._make_place(now)
        self._num_opened += 1
        state = SequenceState(self._blocks, token_ids)
        self._scheduler.add(
            Session(
                session_id=session_id,
                age=self._num_opened,
                epoch=epoch,
                sampling=sampling,
                num_prompt_tokens=num_prompt_tokens,
                num_logprobs=num_logprobs,
                state=state,
                last_active=now,
                grammar=grammar,
            )
        )
        self._empty.clear()

    def _admit(self, session_id: str, owner: int) -> None:
        """Refuse an item of an owner who lost the session; end what a former owner has here."""
        known = self._scheduler.sessions.get(session_id)
        holder = None if known is None else known.owner
        if self._fence.pass_through(session_id, owner, holder):
            self._close(session_id, LeaseLost(f"owner {owner} has claimed the session"))

    def _make_place(self, now: float) -> None:
        """When all places are taken, close the session that has been silent for longest.

        Raises:
            ResourceExhausted: none has been silent long enough.
        """
        sessions = self._scheduler.sessions.values()
        if len(sessions) >= self.limits.max_sessions:
            for session in silent_for(sessions, self.limits.silent_seconds, now)[:1]:
                log.info("session %s made place for another one", session.session_id)
                self._close(session.session_id, NotFound("the session was silent for too long"))
        self.limits.check_sessions(len(sessions))

    def _take_step(self, future: Future[VerifyResult], item: StepItem) -> None:
        session_id, epoch, tree, arrival = item.session_id, item.epoch, item.tree, item.arrival
        self._admit(session_id, item.owner)
        session = self._scheduler.sessions.get(session_id)
        if session is None:
            raise NotFound(f"no session {session_id[:MAX_SESSION_ID_LENGTH]} here; open it again")
        check_num_tokens(tree, item.num_tokens)
        session.last_active = arrival
        ahead = self._roots_ahead.take(session, epoch, tree)
        if ahead is not None:
            session.absence.come_back(arrival)
            session.pending = PendingStep(tree, tree, (0,), arrival, [future], item.num_tokens)
            self._end_pass(session, ahead)
            return
        if session.last_result is not None and epoch == session.epoch - 1:
            future.set_result(session.last_result)
            return
        check_epoch(session_id, session.epoch, epoch)
        if session.pending is not None and session.pending.repeats(item):
            session.pending.futures.append(future)
            return
        session.take_back()
        check_tree(self.limits, tree, session.state.token_ids)
        if session.pending is not None:
            _fail(session.pending, Cancelled("another tree for the same epoch came"))
        fitting, kept = fit_tree(
            tree,
            max_depth=self.limits.max_model_len - 2 - session.base_len,
            max_nodes=self.limits.max_slots - session.base_len,
        )
        session.pending = PendingStep(
            tree, fitting, tuple(kept), arrival, [future], item.num_tokens
        )
        session.absence.come_back(arrival)

    def _close(self, session_id: str, reason: SpecinferError) -> None:
        if session_id not in self._scheduler.sessions:
            return
        session = self._scheduler.remove(session_id)
        if session.pending is not None:
            _fail(session.pending, reason)
        if not self._scheduler.sessions:
            self._empty.set()

    def _close_stream(self, stream: object) -> None:
        for session in list(self._scheduler.sessions.values()):
            if session.stream is stream:
                self._close(session.session_id, Cancelled("the session's stream ended"))

    def _evict_idle(self, now: float) -> None:
        """Close sessions that no router has asked for in a long time."""
        limit = self.limits.session_idle_seconds
        if now < self._next_sweep:
            return
        self._next_sweep = now + min(1.0, limit / 2)
        for session in silent_for(self._scheduler.sessions.values(), limit, now):
            log.info("session %s was idle for %.0f s", session.session_id, limit)
            self._close(session.session_id, NotFound("the session was idle for too long"))


def _fail(step: PendingStep, error: SpecinferError) -> None:
    for future in step.futures:
        set_exception(future, error)
