"""One session: propose, verify, commit, yield, until the text ends. Read this file first.

The next propose leaves beside the commit. The root is the last token; its keys and values do not
exist yet. A tree that is its root alone is plain decoding, so speculation off, drafter gone or
late and no budget are all the same round (DESIGN: one round). This module knows nothing of gRPC,
prompts as text, or tensors.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from specinfer.errors import Cancelled, InvalidRequest, LeaseLost, RouterLeaving, SpecinferError
from specinfer.messages import (
    Finished,
    RoundDetail,
    RoundFacts,
    ShapeQuery,
    TokensEvent,
    Usage,
)
from specinfer.metrics import RouterMetrics
from specinfer.telemetry import CLIENT, Span
from specinfer_router.asking import Asking
from specinfer_router.completion import Completion, Kept
from specinfer_router.crowd import CROWD
from specinfer_router.plain_pace import PlainPace
from specinfer_router.policy import LASTING_REASONS, TreeShapePolicy, clip, within
from specinfer_router.prediction import Prediction
from specinfer_router.round_history import RoundLoad
from specinfer_router.round_tally import RoundTally
from specinfer_router.seats import Checked, DraftSeat, Guess, VerifySeat
from specinfer_router.store import ABANDONED, CANCELLED, ERROR, SessionRecord, SessionStore
from specinfer_router.tracing import SessionTrace

LEAVING = "this router is shutting down; another one goes on with the stream"


@dataclass(frozen=True)
class SessionLimits:
    """Room for trees and for what comes without.

    Attributes:
        max_session_tokens: longest session in tokens.
        max_tree_nodes: largest tree, root included.
        plain_seconds: how long tokens may take that come together without guesses.
    """

    max_session_tokens: int
    max_tree_nodes: int
    plain_seconds: float = 0.0


class AskedRound(NamedTuple):
    """A round whose propose is on its way, the load that it was planned for, and its spans."""

    asking: Asking
    load: RoundLoad
    span: Span
    propose: Span


class Session:
    """The router-side state of one request and the loop over its rounds."""

    def __init__(
        self,
        record: SessionRecord,
        *,
        completion: Completion,
        drafter: DraftSeat,
        verifier: VerifySeat,
        store: SessionStore,
        policy: TreeShapePolicy,
        limits: SessionLimits,
        metrics: RouterMetrics,
        token_texts: Callable[[Sequence[int]], tuple[str, ...]],
        lost_before: int = 0,
        tell_lost: bool = False,
        leaving: Callable[[], bool] = lambda: False,
        num_at_once: Callable[[], int] = lambda: 0,
    ) -> None:
        """Take over a record that the store keeps already, and its completion so far.

        Args:
            lost_before: tokens of the output that the reader has; those that the record has not
                are made again by rounds of their own.
            tell_lost: whether those rounds are told as well.
            leaving: asked between two rounds; true ends the loop there, to go on elsewhere.
            num_at_once: asked while it has no place: how many sessions a worker has or will have.
            The others are what the loop is made of.
        """
        self.session_id = record.session_id
        self.epoch = record.epoch
        self.finished: Finished | None = None
        # Whether `run` was entered, which leaves the session finished or resumable.
        self.begun = False
        self._owner = record.owner
        self._token_ids = list(record.token_ids)
        self._num_prompt_tokens = record.terms.num_prompt_tokens
        self._num_cached_tokens = 0
        self._detail = record.terms.detail
        self._completion = completion
        self._drafter = drafter
        self._verifier = verifier
        self._store = store
        self._policy = policy
        self._options = within(record.terms.speculation, limits.max_tree_nodes)
        self._limits = limits
        self._metrics = metrics
        self._token_texts = token_texts
        self._lost_before = lost_before
        self._tell_lost = tell_lost
        self._leaving = leaving
        self._num_at_once = num_at_once
        self._history = policy.history(record.terms.sampling.temperature, len(record.token_ids))
        self._tally = RoundTally()
        self._pace = PlainPace(limits.plain_seconds)
        self._never_guesses = policy.never_guesses(self._options)
        self._asked: AskedRound | None = None
        self._prediction: Prediction | None = None
        if record.terms.prediction and self._options.enabled:
            self._prediction = Prediction(record.terms.prediction, record.output_ids)

    async def run(self) -> AsyncGenerator[TokensEvent | Finished, None]:
        """Rounds until the text ends; leaving the generator early gives the session up.

        Raises:
            StaleEpoch: somebody else has taken the session over.
            RouterLeaving: it is to go on elsewhere.
            InvalidRequest: it ended before the tokens that the reader says to have.
            SpecinferError: the verify tier or the store could not go on.
        """
        end, self.begun = ABANDONED, True
        trace = SessionTrace()
        try:
            while self.finished is None:
                if self._leaving():
                    raise RouterLeaving(LEAVING, retry_after=0.0)
                event = await self._round(trace)
                if event is not None and (event.offset >= self._lost_before or self._tell_lost):
                    yield event
            yield self.finished
        except RouterLeaving:
            raise
        except SpecinferError as error:
            end = ERROR
            if isinstance(error, LeaseLost):
                self._metrics.lease_lost()
            raise
        finally:
            trace.end()
            self._drop_asked()
            self._drafter.leave(self.epoch)
            self._verifier.leave(self.epoch)
            if self.finished is None:
                with suppress(SpecinferError):
                    await self._store.finish(self.session_id, end, owner=self._owner)

    async def _round(self, trace: SessionTrace) -> TokensEvent | None:
        """Propose, verify, commit; None where the session was cancelled meanwhile."""
        start = time.perf_counter()
        asked, self._asked = self._asked or self._ask(trace, self.epoch), None
        with asked.span as span:
            guess = await self._guess(asked, trace)
            with span.child("verify", kind=CLIENT) as checking:
                checked = await self._verifier.step(
                    self._token_ids,
                    self.epoch,
                    guess.tree,
                    num_tokens=self._num_plain(guess),
                    traceparent=checking.detail_parent,
                )
                trace.asked_verifier(checking, self._verifier.address)
            kept = self._take(guess, checked)
            if not kept.finish_reason and not self._leaving():
                self._asked = self._ask(trace, self.epoch + 1)
                # In a crowd there is always another one to be served while a frame waits.
                if self._verifier.num_sharing <= CROWD:
                    # A turn of the loop: the frame leaves before what a drafter need not wait for.
                    await asyncio.sleep(0)
            self._history.observe(guess, checked, context_len=len(self._token_ids), load=asked.load)
            # Committed before anyone sees it: what was shown can always be gone on from.
            with span.child("commit"):
                commit_seconds = await self._commit(kept)
            if self.finished is not None:
                return None
            event = self._event(guess, checked, kept, start, commit_seconds)
            trace.told(span, event.round)
        if self._num_lost > 0 and kept.finish_reason:
            raise beyond_the_end(self._lost_before, self._num_output_tokens)
        return event

    def _ask(self, trace: SessionTrace, epoch: int) -> AskedRound:
        """Begin a round: its propose leaves for the drafter, and nobody waits for it yet."""
        span = trace.round()
        propose = span.child("propose", kind=CLIENT)
        asking = self._drafter.ask(
            self._token_ids, epoch, self._shape(), traceparent=propose.detail_parent
        )
        return AskedRound(asking, self._history.load, span, propose)

    def _drop_asked(self) -> None:
        """The round that was asked for will not be."""
        if self._asked is not None:
            asked, self._asked = self._asked, None
            self._drafter.drop(asked.asking)
            asked.propose.end()
            asked.span.end()

    async def _guess(self, asked: AskedRound, trace: SessionTrace) -> Guess:
        """What the drafter guesses, and beside it what the caller predicted."""
        with asked.propose as span:
            guess = await self._drafter.answer(asked.asking)
            trace.asked_drafter(span, guess.worker, hedged=guess.hedged)
        if self._never_guesses and guess.root_only_reason:
            guess = guess._replace(root_only_reason="disabled")
        if self._prediction is None:
            return guess
        options = self._options
        tree = self._prediction.graft(
            guess.tree,
            self._token_ids[self._num_prompt_tokens :],
            max_nodes=1 + _least(self._limits.max_tree_nodes - 1, self._room, options.max_nodes),
            max_depth=_least(self._max_depth, options.max_depth),
        )
        reason = "" if tree.num_draft_tokens else guess.root_only_reason
        return guess._replace(tree=tree, root_only_reason=reason)

    async def _commit(self, kept: Kept) -> float:
        """Commit a round, or finish where the session was cancelled; returns the seconds."""
        start = time.perf_counter()
        try:
            self.epoch = await self._store.commit(
                self.session_id, self.epoch, kept.token_ids, kept.finish_reason, owner=self._owner
            )
        except Cancelled:
            del self._token_ids[len(self._token_ids) - len(kept.token_ids) :]
            self.finished = self._finish(CANCELLED, "")
        return time.perf_counter() - start

    @property
    def _room(self) -> int:
        return self._limits.max_session_tokens - len(self._token_ids)

    @property
    def _num_output_tokens(self) -> int:
        return len(self._token_ids) - self._num_prompt_tokens

    @property
    def _num_lost(self) -> int:
        """Tokens that the reader has and that are still to be made again."""
        return self._lost_before - self._num_output_tokens

    @property
    def _max_depth(self) -> int:
        """Deepest guess of use; no round goes from lost tokens into new ones."""
        left = self._completion.num_left
        return (min(left, self._num_lost) if self._num_lost > 0 else left) - 1

    def _shape(self) -> ShapeQuery:
        """The policy's wish within the room that is left: guesses past the end are of no use."""
        sharing = self._verifier.num_sharing
        of_late = self._verifier.num_of_late if sharing else self._num_at_once()
        return clip(
            self._policy.plan(self._options, self._history, sharing, of_late),
            max_nodes=min(self._limits.max_tree_nodes - 1, self._room),
            max_depth=self._max_depth,
        )

    def _num_plain(self, guess: Guess) -> int:
        """Tokens to decode in one round: several where no later round will have guesses either."""
        reason = guess.root_only_reason
        # A policy that guesses nothing counts rounds until it tries again; a crowd has many, and
        # the policy still takes for one what was one a moment ago.
        in_crowd = reason == "budget" and self._verifier.num_of_late > CROWD
        lasting = reason in LASTING_REASONS or in_crowd
        if self._prediction is not None or not lasting:
            return 1
        return self._pace.num_tokens(min(self._max_depth + 1, self._room))

    def _take(self, guess: Guess, checked: Checked) -> Kept:
        """Take a verified round in, as far as it belongs to the completion."""
        result = checked.result
        if not guess.tree.num_draft_tokens:
            self._pace.observe(checked.seconds, len(result.token_ids))
        kept = self._completion.take(result.token_ids)
        self._token_ids.extend(kept.token_ids)
        self._num_cached_tokens = self._num_cached_tokens or result.num_cached_tokens
        return kept

    def _event(
        self, guess: Guess, checked: Checked, kept: Kept, start: float, commit_seconds: float
    ) -> TokensEvent:
        """Say what a committed round did."""
        result = checked.result
        num_accepted = min(len(result.accepted), len(kept.token_ids))
        seconds = time.perf_counter() - start
        facts = self._facts(guess, checked, num_accepted, seconds, commit_seconds)
        self._count(facts, guess, checked.result.accepted[:num_accepted], len(kept.token_ids))
        if kept.finish_reason:
            self.finished = self._finish(kept.finish_reason, kept.stop_match)
        return TokensEvent(
            offset=self._num_output_tokens - len(kept.token_ids),
            text=kept.text,
            token_ids=kept.token_ids,
            num_accepted_tokens=num_accepted,
            logprobs=result.logprobs[: len(kept.token_ids)],
            round=facts,
            detail=self._round_detail(guess, checked, kept) if self._detail else None,
        )

    def _count(
        self, facts: RoundFacts, guess: Guess, accepted: Sequence[int], num_tokens: int
    ) -> None:
        """Tell everybody who counts."""
        self._tally.add(facts)
        self._metrics.observe_round(facts, num_tokens)
        if guess.drafter and not guess.after_prefill:
            self._metrics.observe_draft_round_trip(guess.round_trip_seconds)
        if facts.num_draft_tokens:
            self._metrics.observe_tree(
                guess.tree,
                accepted,
                num_draft_nodes=guess.num_draft_nodes,
                drafter=guess.drafter,
                worker=guess.worker,
            )

    def _round_detail(self, guess: Guess, checked: Checked, kept: Kept) -> RoundDetail:
        return RoundDetail(
            tree=guess.tree,
            accepted=checked.result.accepted,
            node_texts=self._token_texts(guess.tree.token_ids),
            token_texts=self._token_texts(kept.token_ids),
        )

    def _facts(
        self,
        guess: Guess,
        checked: Checked,
        num_accepted: int,
        seconds: float,
        commit_seconds: float,
    ) -> RoundFacts:
        # Of the drafter's time only what the round waited for: the rest passed beside the commit.
        draft = min(guess.compute_seconds, guess.seconds)
        queue = min(guess.queue_seconds, guess.seconds - draft) + checked.result.queue_seconds
        # The verifier may have begun before it was asked.
        verify = min(checked.result.compute_seconds, checked.seconds)
        away = guess.seconds + checked.seconds
        return RoundFacts(
            epoch=self.epoch,
            num_draft_tokens=guess.tree.num_draft_tokens,
            num_accepted_tokens=num_accepted,
            root_only_reason=guess.root_only_reason,
            draft_seconds=draft,
            verify_seconds=verify,
            queue_seconds=queue,
            network_seconds=max(0.0, away - draft - verify - queue),
            router_seconds=max(0.0, seconds - away),
            commit_seconds=commit_seconds,
            draft_depth=guess.tree.max_depth,
        )

    def _finish(self, reason: str, stop_match: str) -> Finished:
        return Finished(
            reason=reason,
            stop_match=stop_match,
            usage=Usage(
                self._num_prompt_tokens,
                self._num_output_tokens,
                self._num_cached_tokens,
            ),
            speculation=self._tally.summary(),
        )


def beyond_the_end(offset: int, num_tokens: int) -> InvalidRequest:
    """What is told to a reader who asks for more than a session has or will ever have."""
    return InvalidRequest(
        f"offset {offset} is not within the {num_tokens} tokens of the session", field="offset"
    )


def _least(*bounds: int | None) -> int:
    """The smallest of the bounds that are set."""
    return min(bound for bound in bounds if bound is not None)
