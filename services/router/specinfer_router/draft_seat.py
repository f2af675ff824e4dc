"""A session's place in the draft tier, and what happens when a drafter is late, wrong or gone.

A drafter costs guesses at most: no error of it leaves this module, and none of its trees can change
a token. This module knows nothing of verify workers, text, stores or when a session ends.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from specinfer.errors import (
    InvalidRequest,
    InvalidTree,
    LeaseLost,
    SpecinferError,
    Unavailable,
)
from specinfer.messages import DraftResult, Grammar, ShapeQuery
from specinfer.sampling import SamplingParams
from specinfer.telemetry.logs import loggable
from specinfer.tree import TokenTree
from specinfer_router.answer import Answer, Patience
from specinfer_router.asking import Ask, Asking, Place, Question
from specinfer_router.guess import Guess, usable_tree
from specinfer_router.hedging import HedgeBudget
from specinfer_router.pool import WorkerPool
from specinfer_router.worker_links import DraftLink

log = logging.getLogger(__name__)

MIN_HEDGE_SECONDS = 0.005


class DraftSeat:
    """A session's place in the draft tier; it may be empty at any time."""

    def __init__(
        self,
        pool: WorkerPool[DraftLink],
        session_id: str,
        sampling: SamplingParams,
        *,
        num_prompt_tokens: int,
        vocab_size: int,
        deadline_seconds: float,
        grammar: Grammar | None = None,
        owner: int = 0,
        hedges: HedgeBudget | None = None,
    ) -> None:
        """Take down the session; nothing is sent before the first propose.

        Args:
            pool: the draft tier.
            session_id: id of the session.
            sampling: how the target draws.
            num_prompt_tokens: tokens of the prompt.
            vocab_size: tokens the target knows.
            deadline_seconds: a drafter that takes longer is not waited for.
            grammar: what the completion has to match, or None.
            owner: how often the session was claimed.
            hedges: the router's budget for asking a second drafter, or None for never.
        """
        self._pool = pool
        self._session_id = session_id
        self._sampling = sampling
        self._num_prompt_tokens = num_prompt_tokens
        self._vocab_size = vocab_size
        self._deadline_seconds = deadline_seconds
        self._grammar = grammar
        self._owner = owner
        self._hedges = hedges
        self._patience = Patience()
        self._place: Place | None = None
        # Drafters that do not take this session, such as one whose model is too short for it.
        self._refused: set[str] = set()

    def ask(
        self, token_ids: Sequence[int], epoch: int, shape: ShapeQuery, *, traceparent: str = ""
    ) -> Asking:
        """Send for a tree below the last token; the rest is `answer`'s or `drop`'s.

        `token_ids` stays as it is until then. Raises nothing of ours.
        """
        start = time.monotonic()
        question = Question(
            token_ids, epoch, shape, start, start + self._deadline_seconds, traceparent
        )
        if shape.max_nodes == 0:
            return Asking(question, _root_alone(question, "budget"), [])
        reason = self._sit(epoch)
        if self._place is None or reason:
            return Asking(question, _root_alone(question, reason), [])
        place = self._place
        try:
            return Asking(question, None, [self._ask(place, question)])
        except SpecinferError as error:
            self._fail(place, None, error)
            self._leave(place, epoch)
            seconds = time.monotonic() - start
            return Asking(question, _root_alone(question, "draft_error", seconds=seconds), [])

    async def answer(self, asking: Asking) -> Guess:
        """A tree, or the root alone with the reason. Raises nothing of ours.

        A tree that comes after the deadline is dropped, and until it has come that drafter is not
        asked again: one that hangs costs a session one deadline, not one in each round.
        """
        if asking.guess is not None:
            return asking.guess
        try:
            return await self._first_tree(asking.asks, asking.question)
        finally:
            self.drop(asking)

    def drop(self, asking: Asking) -> None:
        """Wait for nobody any more; again it does nothing."""
        while asking.asks:
            ask = asking.asks.pop()
            ask.place.link.breaker.release(ask.ticket)
            if ask.place is not self._place:
                self._leave(ask.place, asking.question.epoch)

    def leave(self, epoch: int) -> None:
        """Give the place up and let the worker forget the session."""
        self._patience.close()
        if self._place is not None:
            place, self._place = self._place, None
            self._leave(place, epoch)

    async def _first_tree(self, asks: list[Ask], question: Question) -> Guess:
        """The first usable tree of those who were asked; a second drafter is, after a while."""
        since = time.monotonic()
        hedge_at = self._hedge_at(asks[0], question)
        going = list(asks)
        while going:
            limit = question.deadline if hedge_at is None else hedge_at
            answers = [ask.answer for ask in going]
            await self._patience.first_answer(answers, limit - time.monotonic())
            answered = [ask for ask in going if ask.answer.done]
            for ask in answered:
                going.remove(ask)
                try:
                    guess = self._take(ask, question, since, hedged=len(asks) > 1)
                except SpecinferError as error:
                    self._fail(ask.place, ask.ticket, error)
                    continue
                self._lose(going)
                return guess
            if not answered and hedge_at is None:
                return self._miss(going, question, since, hedged=len(asks) > 1)
            if hedge_at is not None:
                hedge_at = None
                second = self._hedge(asks[0], question) if going else []
                asks += second
                going += second
        seconds = time.monotonic() - since
        return _root_alone(question, "draft_error", seconds=seconds, hedged=len(asks) > 1)

    def _take(self, ask: Ask, question: Question, since: float, *, hedged: bool) -> Guess:
        """Use one's tree and follow who brought it; raises when it is none."""
        result = ask.answer.result
        root = question.token_ids[-1]
        tree = usable_tree(result, root, question.epoch, question.shape, self._vocab_size)
        ask.place.link.breaker.succeed(ask.ticket)
        if not ask.after_prefill:
            ask.place.link.answer_seconds.observe(ask.seconds)
        if ask.hedge and self._hedges is not None:
            self._hedges.num_wins += 1
        self._place = ask.place
        return Guess(
            tree,
            "" if tree.num_draft_tokens else "no_guess",
            time.monotonic() - since,
            queue_seconds=result.queue_seconds,
            compute_seconds=result.compute_seconds,
            round_trip_seconds=ask.seconds,
            num_draft_nodes=len(tree),
            draft_depth=tree.max_depth,
            after_prefill=ask.after_prefill,
            hedged=hedged,
            drafter=ask.place.link.name,
            worker=ask.place.link.address,
        )

    def _lose(self, going: Sequence[Ask]) -> None:
        """Another drafter was faster than these."""
        for ask in going:
            self._pool.counts.waste(ask.answer, "lost_hedge")
            # Slower than nearly always, and nobody else was answered either.
            if ask.silent and not ask.hedge:
                ask.place.link.breaker.fail(ask.ticket)

    def _miss(
        self, going: Sequence[Ask], question: Question, since: float, *, hedged: bool
    ) -> Guess:
        """Nobody answered in time."""
        for ask in going:
            link = ask.place.link
            link.num_late += 1
            self._pool.counts.waste(ask.answer, "late")
            # A long prompt takes its time, and a second drafter was not given much.
            if not ask.hedge and (ask.silent or not ask.after_prefill):
                link.breaker.fail(ask.ticket)
            if not ask.after_prefill:
                link.answer_seconds.observe(self._deadline_seconds)
        kept = going[0]
        kept.place.late = kept.answer
        self._place = kept.place
        return _root_alone(question, "deadline", seconds=time.monotonic() - since, hedged=hedged)

    def _hedge_at(self, ask: Ask, question: Question) -> float | None:
        """When to ask a second drafter, or None for never."""
        if self._hedges is None:
            return None
        self._hedges.earn()
        usual = ask.place.link.answer_seconds.value
        if usual is None or ask.after_prefill or self._pool.num_ready < 2:
            return None
        moment = question.start + max(MIN_HEDGE_SECONDS, usual)
        return moment if moment < question.deadline else None

    def _hedge(self, first: Ask, question: Question) -> list[Ask]:
        """Ask a second drafter, if one has nothing to do and the budget allows."""
        link = self._choose(first.place.link)
        if link is None or not link.idle or self._hedges is None or not self._hedges.spend():
            return []
        place = Place(link, link.generation)
        link.num_seats += 1
        try:
            return [self._ask(place, question, hedge=True)]
        except SpecinferError as error:
            log.info("asking a second drafter failed: %s", loggable(error))
            self._leave(place, question.epoch)
            return []

    def _sit(self, epoch: int) -> str:
        """Have a place at a drafter that may be asked; the reason when there is none."""
        place = self._place
        if place is not None and not place.usable:
            self.leave(epoch)
            place = None
        if place is None:
            link = self._choose(None)
            if link is None:
                return self._why_nobody()
        else:
            trusted = place.link.trusted
            if trusted and not place.waiting and not place.link.load.draining:
                return ""
            link = self._choose(place.link)
            if link is None:
                if place.waiting:
                    return "deadline"
                return "" if trusted else "circuit_open"
            self.leave(epoch)
        link.num_seats += 1
        self._place = Place(link, link.generation)
        return ""

    def _why_nobody(self) -> str:
        if not self._pool.num_ready:
            return "no_drafter"
        return "draft_error" if self._refused else "circuit_open"

    def _choose(self, avoid: DraftLink | None) -> DraftLink | None:
        link = self._pool.choose(avoid)
        if link is None or link is avoid or not link.trusted or link.address in self._refused:
            return None
        return link

    def _ask(self, place: Place, question: Question, *, hedge: bool = False) -> Ask:
        ticket, asked = place.link.breaker.admit(), time.monotonic()
        after_prefill = place.known_len == 0
        try:
            answer = self._send(place, question, asked)
        except BaseException:
            # The ticket may be the breaker's only probe, and nobody else would give it back.
            place.link.breaker.release(ticket)
            raise
        return Ask(place, answer, ticket, asked, after_prefill, hedge)

    def _send(self, place: Place, question: Question, asked: float) -> Answer[DraftResult]:
        link, token_ids = place.link, question.token_ids
        if place.known_len == 0:
            link.open(
                self._session_id,
                question.epoch,
                token_ids,
                self._sampling,
                self._num_prompt_tokens,
                grammar=self._grammar,
                owner=self._owner,
                traceparent=question.traceparent,
            )
            place.known_len = len(token_ids)
        known_len, place.known_len = place.known_len, len(token_ids)
        return link.propose(
            self._session_id,
            question.epoch,
            known_len,
            token_ids[known_len:],
            question.shape,
            max(0.001, question.deadline - asked),
            owner=self._owner,
            traceparent=question.traceparent,
        )

    def _fail(self, place: Place, ticket: int | None, error: SpecinferError) -> None:
        """Begin anew at the next ask, and tell the breaker when the drafter is to blame."""
        log.info("the drafter at %s failed: %s", place.link.address, loggable(error))
        self._pool.counts.moves[error.reason.lower()] += 1
        if isinstance(error, InvalidRequest) and not isinstance(error, InvalidTree):
            self._refused.add(place.link.address)
        # A worker that went away is out of the pool at once. A lease that was lost is for the
        # verify tier and the store to say: a drafter is not believed that much.
        elif not isinstance(error, Unavailable | LeaseLost):
            place.link.breaker.fail(ticket)
        if place is self._place:
            self._place = None

    def _leave(self, place: Place, epoch: int) -> None:
        """Give a place up, once."""
        if place.left:
            return
        place.left = True
        place.link.num_seats -= 1
        if place.usable:
            try:
                place.link.forget(self._session_id, epoch, owner=self._owner)
            except SpecinferError as error:
                log.warning("a draft session was not closed: %s", loggable(error))


def _root_alone(
    question: Question, reason: str, *, seconds: float = 0.0, hedged: bool = False
) -> Guess:
    """No guess, and why."""
    return Guess(TokenTree.root_only(question.token_ids[-1]), reason, seconds, hedged=hedged)
