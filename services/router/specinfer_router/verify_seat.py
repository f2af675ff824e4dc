"""A session's place in the verify tier, and what happens when its worker fails, hangs or leaves.

A round that fails is run again from the committed tokens, here or elsewhere, and gives the same
tokens: losing a verifier costs time. This module knows nothing of drafters, text, stores or when a
session ends.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Sequence
from typing import NamedTuple

from specinfer.errors import (
    InternalError,
    InvalidRequest,
    LeaseLost,
    NotFound,
    ResourceExhausted,
    SpecinferError,
    StaleEpoch,
    Unavailable,
)
from specinfer.messages import Grammar, VerifyResult
from specinfer.sampling import SamplingParams
from specinfer.step_curve import StepCurve
from specinfer.telemetry import current_span
from specinfer.telemetry.logs import loggable
from specinfer.tree import TokenTree
from specinfer_router.answer import Answer, Patience
from specinfer_router.deadlines import RoundWait, StepDeadline, work_of
from specinfer_router.pool import WorkerPool
from specinfer_router.worker_links import VerifyLink

log = logging.getLogger(__name__)

MAX_BACKOFF_SECONDS = 1.0
# How often a session that waits for a hung worker looks for another one.
LOOK_SECONDS = 0.5


class Checked(NamedTuple):
    """A verified round and the time it took, retries included."""

    result: VerifyResult
    seconds: float


class _Round(NamedTuple):
    """What one round asks."""

    token_ids: Sequence[int]
    epoch: int
    tree: TokenTree
    num_tokens: int
    traceparent: str


class VerifySeat:
    """A session's place in the verify tier."""

    def __init__(
        self,
        pool: WorkerPool[VerifyLink],
        session_id: str,
        sampling: SamplingParams,
        *,
        num_prompt_tokens: int,
        num_logprobs: int | None,
        vocab_size: int,
        grammar: Grammar | None = None,
        affinity_key: str = "",
        owner: int = 0,
        max_tries: int = 4,
        step_seconds: float = 0.0,
        failover_seconds: float = 30.0,
    ) -> None:
        """Take down the session; nothing is sent before the first step.

        Args:
            pool: the verify tier.
            session_id: id of the session.
            sampling: how tokens are drawn.
            num_prompt_tokens: tokens of the prompt.
            num_logprobs: most probable tokens to report, or None.
            vocab_size: tokens the target knows.
            grammar: what the completion has to match, or None.
            affinity_key: sessions with the same one share a worker where its load allows.
            owner: how often the session was claimed.
            max_tries: workers tried for one round.
            step_seconds: a worker that takes longer for a round counts as hung; 0 derives it from
                what the worker's passes cost (`StepDeadline`).
            failover_seconds: how long to wait for a worker when none is ready.
        """
        self._pool = pool
        self._session_id = session_id
        self._sampling = sampling
        self._num_prompt_tokens = num_prompt_tokens
        self._num_logprobs = num_logprobs
        self._vocab_size = vocab_size
        self._grammar = grammar
        self._affinity_key = affinity_key
        self._owner = owner
        self._max_tries = max_tries
        self._deadline = StepDeadline(fixed_seconds=step_seconds)
        self._failover_seconds = failover_seconds
        self._patience = Patience()
        self._link: VerifyLink | None = None
        self._generation = 0
        self._curve = StepCurve(())
        self._usual: tuple[tuple[int, int, int], RoundWait] | None = None
        self._num_misses = 0

    @property
    def address(self) -> str:
        """Address of the worker, or "" without one."""
        return self._link.address if self._link is not None else ""

    @property
    def num_sharing(self) -> int:
        """Sessions of this router at the same worker, ours included; 0 without a place."""
        return self._link.num_seats if self._link is not None else 0

    @property
    def num_of_late(self) -> int:
        """As `num_sharing`, those included who left a moment ago; see `crowd.RecentMost`."""
        link = self._link
        return link.recent_seats.most(link.num_seats) if link is not None else 0

    async def step(
        self,
        token_ids: Sequence[int],
        epoch: int,
        tree: TokenTree,
        *,
        num_tokens: int = 1,
        traceparent: str = "",
    ) -> Checked:
        """Have a tree checked. A round that fails is run again from the committed tokens.

        Below a root alone up to `num_tokens` tokens are decoded.

        Raises:
            LeaseLost: somebody else has claimed the session.
            Unavailable: no worker finished the round within the tries allowed.
            ResourceExhausted: every worker tried was full.
            InvalidRequest: the session itself cannot be served.
        """
        start = time.perf_counter()
        failed: VerifyLink | None = None
        attempt = self._num_misses = 0
        lost: SpecinferError
        while True:
            try:
                opening = await self._sit(token_ids, epoch, failed, traceparent)
                asked = _Round(token_ids, epoch, tree, num_tokens, traceparent)
                result = await self._ask(opening, asked)
                return Checked(result, time.perf_counter() - start)
            except LeaseLost:
                raise
            except InvalidRequest:
                # Perhaps the tree, never the root alone: that is what the user asked for.
                if tree.num_draft_tokens == 0:
                    raise
                tree = TokenTree.root_only(token_ids[-1])
                self.leave(epoch)
                continue
            except _TookTooLong as error:
                failed, lost = self._link, error
                # Slow is not broken: only the longest wait counts as a try.
                attempt += error.last
            except (Unavailable, NotFound, StaleEpoch, ResourceExhausted, InternalError) as error:
                failed, lost = self._link, error
                attempt += 1
            # Whatever the reason, less is more likely to come in time.
            num_tokens = 1
            log.warning("round %d failed: %s", epoch, loggable(lost))
            current_span().event("round failed", {"error.type": lost.reason})
            if attempt == self._max_tries:
                raise _last_error(lost) from lost
            slow = isinstance(lost, _TookTooLong)
            self._pool.counts.moves["slow" if slow else lost.reason.lower()] += 1
            self.leave(epoch)
            if not isinstance(lost, _TookTooLong):
                pause = min(MAX_BACKOFF_SECONDS, 0.005 * 4**attempt)
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))

    def leave(self, epoch: int) -> None:
        """Give the place up and let the worker free the session's KV."""
        self._patience.close()
        if self._link is None:
            return
        self._link.recent_seats.note(self._link.num_seats)
        self._link.num_seats -= 1
        if self._link.connected and self._link.generation == self._generation:
            try:
                self._link.forget(self._session_id, epoch, owner=self._owner)
            except SpecinferError as error:
                log.warning("a verify session was not closed: %s", loggable(error))
        self._link = None

    async def _sit(
        self,
        token_ids: Sequence[int],
        epoch: int,
        avoid: VerifyLink | None,
        traceparent: str,
    ) -> Answer[None] | None:
        """Have a place; the answer to opening it when it is new. It leaves in the step's frame.

        A worker that drains or was found to fail is left for another one, if there is one.
        """
        if self._link is not None:
            if self._link.connected and self._link.generation == self._generation:
                leaving = self._link.load.draining or not self._link.trusted
                if not leaving or self._elsewhere() is None:
                    return None
                log.info("the session moves away from %s", self._link.address)
                avoid = self._link
                reason = "draining" if self._link.load.draining else "distrusted"
                self._pool.counts.moves[reason] += 1
            else:
                self._pool.counts.moves["unavailable"] += 1
            self.leave(epoch)
        link = await self._pool.wait(
            avoid,
            seconds=self._failover_seconds,
            affinity_key=self._affinity_key,
            token_ids=token_ids,
        )
        self._link, self._generation = link, link.generation
        self._curve = StepCurve(link.info.step_costs if link.info is not None else ())
        self._usual = None
        link.num_seats += 1
        return link.open(
            self._session_id,
            epoch,
            token_ids,
            self._num_prompt_tokens,
            self._sampling,
            self._num_logprobs,
            grammar=self._grammar,
            owner=self._owner,
            traceparent=traceparent,
        )

    def _elsewhere(self) -> VerifyLink | None:
        """Another worker that is ready and trusted."""
        link = self._pool.choose(self._link, affinity_key=self._affinity_key)
        if link is None or link is self._link or not link.trusted:
            return None
        return link

    async def _ask(self, opening: Answer[None] | None, asked: _Round) -> VerifyResult:
        """The worker's result, checked; tells its breaker how it went."""
        link = self._link
        assert link is not None
        ticket = link.breaker.admit()
        try:
            since = time.monotonic()
            stepping = link.step(
                self._session_id,
                asked.epoch,
                asked.tree,
                num_tokens=asked.num_tokens,
                owner=self._owner,
                traceparent=asked.traceparent,
            )
            await self._wait(link, stepping, ticket, since, opening is not None, asked)
            # Why a session was not taken says more than that the worker does not know it.
            if opening is not None:
                await opening
            result = stepping.result
            check_result(result, asked.tree, asked.epoch, self._vocab_size, asked.num_tokens)
            link.breaker.succeed(ticket)
            return result
        except InternalError:
            link.breaker.fail(ticket)
            raise
        finally:
            link.breaker.release(ticket)

    async def _wait(
        self,
        link: VerifyLink,
        stepping: Answer[VerifyResult],
        ticket: int | None,
        since: float,
        opened: bool,
        asked: _Round,
    ) -> None:
        """Wait until the step is answered; past the deadline, for as long as nobody else could.

        Raises:
            _TookTooLong: the deadline has passed and another worker is there, or none came.
        """
        allowed, late = self._first_wait(link, opened, asked), False
        until = since + allowed.seconds
        while True:
            limit = until - time.monotonic()
            limit = min(limit, LOOK_SECONDS) if late else limit
            await self._patience.first_answer((stepping,), limit)
            if stepping.done:
                return
            passed = time.monotonic() >= until
            # One that has answered nobody since is hung; one that has is slow.
            silent = link.heard < since
            if passed:
                link.breaker.fail(ticket, at_once=silent)
                self._num_misses += 1
                late = True
            last = passed and allowed.last
            if last or (late and self._elsewhere() is not None):
                if silent:
                    link.give_up()
                raise _TookTooLong(link.address, allowed.seconds, last=last)
            if passed:
                allowed = self._allowed(link, opened, asked)
                until = time.monotonic() + allowed.seconds

    def _first_wait(self, link: VerifyLink, opened: bool, asked: _Round) -> RoundWait:
        """As `_allowed`, which mostly says what it said of the last round.

        A round whose session was just opened is worked out: it reads a prompt, and every further
        try of a round is one, so that no other has misses.
        """
        if opened:
            return self._allowed(link, opened, asked)
        waiting = max(link.num_seats, link.load.num_waiting)
        work = *work_of(len(asked.tree), waiting), asked.num_tokens
        if self._usual is None or self._usual[0] != work:
            self._usual = work, self._allowed(link, opened, asked)
        return self._usual[1]

    def _allowed(self, link: VerifyLink, opened: bool, asked: _Round) -> RoundWait:
        return self._deadline.wait(
            self._curve,
            num_rows=len(asked.tree),
            num_prefill=len(asked.token_ids) if opened else 0,
            num_waiting=max(link.num_seats, link.load.num_waiting),
            num_steps=asked.num_tokens,
            num_misses=self._num_misses,
            with_grammar=opened and self._grammar is not None,
        )


class _TookTooLong(Unavailable):
    """A worker let a deadline pass; `last` when no longer wait is allowed."""

    def __init__(self, address: str, seconds: float, *, last: bool) -> None:
        super().__init__(f"the verify worker at {address} took more than {seconds:g} s for a round")
        self.last = last


def check_result(
    result: VerifyResult, tree: TokenTree, epoch: int, vocab_size: int, num_tokens: int = 1
) -> None:
    """Raise InternalError unless the result is one of this tree: a path of it and a tail.

    Of a root alone it may be up to `num_tokens` tokens.
    """
    if result.epoch != epoch + 1:
        raise InternalError(f"a result that leads to epoch {result.epoch}, not {epoch + 1}")
    if not 1 <= len(result.token_ids) - len(result.accepted) <= num_tokens:
        raise InternalError(f"{len(result.accepted)} accepted, {len(result.token_ids)} tokens")
    parents, token_ids = tree.parents, tree.token_ids
    parent, num_nodes = 0, len(parents)
    for node, token_id in zip(result.accepted, result.token_ids, strict=False):
        if not parent < node < num_nodes or parents[node] != parent:
            raise InternalError(f"accepted node {node} is no child of node {parent}")
        if token_ids[node] != token_id:
            raise InternalError(f"accepted node {node} carries another token than the result")
        parent = node
    if max(result.token_ids) >= vocab_size:
        raise InternalError(f"a token outside the vocabulary of {vocab_size}")


def _last_error(error: SpecinferError) -> SpecinferError:
    """What the user is told: full stays full, all else is nobody there."""
    if isinstance(error, ResourceExhausted):
        return ResourceExhausted(error.message, retry_after=error.retry_after or 1.0)
    if isinstance(error, Unavailable):
        return error
    return Unavailable(f"the verify tier failed a round again and again: {error.message}")
