"""One session: propose, verify, commit, yield, until the text ends. Read this file first.

The root is the last token; its keys and values do not exist yet. A tree that is its root alone is
plain decoding, so speculation off, drafter gone, drafter late and no budget are all the same round
(DESIGN: one round). This module knows nothing of gRPC, prompts as text, or tensors.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass

from specinfer.errors import SpecinferError
from specinfer.messages import (
    Finished,
    RoundFacts,
    ShapeQuery,
    SpeculationOptions,
    SpeculationSummary,
    TokensEvent,
    Usage,
)
from specinfer.metrics import RouterMetrics
from specinfer_router.completion import Completion, Kept
from specinfer_router.policy import RoundHistory, TreeShapePolicy, clip
from specinfer_router.seats import Checked, DraftSeat, Guess, VerifySeat
from specinfer_router.store import SessionRecord, SessionStore


@dataclass(frozen=True)
class SessionLimits:
    """Room for trees.

    Attributes:
        max_session_tokens: longest session in tokens.
        max_tree_nodes: largest tree, root included.
    """

    max_session_tokens: int
    max_tree_nodes: int


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
        options: SpeculationOptions,
        limits: SessionLimits,
        metrics: RouterMetrics,
    ) -> None:
        """Take over a record that the store keeps already."""
        self.session_id = record.session_id
        self.epoch = record.epoch
        self.finished: Finished | None = None
        self._token_ids = list(record.token_ids)
        self._num_prompt_tokens = record.num_prompt_tokens
        self._num_cached_tokens = 0
        self._completion = completion
        self._drafter = drafter
        self._verifier = verifier
        self._store = store
        self._policy = policy
        self._options = options
        self._limits = limits
        self._metrics = metrics
        self._history = RoundHistory()
        self._tally = RoundTally()

    async def run(self) -> AsyncGenerator[TokensEvent | Finished, None]:
        """Rounds until the text ends; leaving the generator early gives the session up.

        Raises:
            SpecinferError: the verify tier or the store could not go on.
        """
        end = "cancelled"
        try:
            while self.finished is None:
                start = time.perf_counter()
                guess = await self._drafter.propose(self._token_ids, self.epoch, self._shape())
                checked = await self._verifier.step(self._token_ids, self.epoch, guess.tree)
                kept = self._completion.take(checked.result.token_ids)
                # Committed before anyone sees it: what was shown can always be gone on from.
                self.epoch = await self._store.commit(
                    self.session_id, self.epoch, kept.token_ids, kept.finish_reason
                )
                yield self._advance(guess, checked, kept, start)
            yield self.finished
        except SpecinferError:
            end = "error"
            raise
        finally:
            self._drafter.leave(self.epoch)
            self._verifier.leave(self.epoch)
            if self.finished is None:
                with suppress(SpecinferError):
                    await self._store.finish(self.session_id, end)

    def _shape(self) -> ShapeQuery:
        """The policy's wish within the room that is left: guesses past the end are of no use."""
        room = self._limits.max_session_tokens - len(self._token_ids)
        return clip(
            self._policy.plan(self._options, self._history, self._verifier.num_sharing),
            max_nodes=min(self._limits.max_tree_nodes - 1, room),
            max_depth=self._completion.num_left - 1,
        )

    def _advance(self, guess: Guess, checked: Checked, kept: Kept, start: float) -> TokensEvent:
        """Take a committed round in and say what it did."""
        result = checked.result
        offset = len(self._token_ids) - self._num_prompt_tokens
        num_accepted = min(len(result.accepted), len(kept.token_ids))
        self._token_ids.extend(kept.token_ids)
        self._num_cached_tokens = self._num_cached_tokens or result.num_cached_tokens
        self._history.observe(
            depth=guess.tree.max_depth, num_accepted=num_accepted, seconds=guess.seconds
        )
        facts = self._facts(guess, checked, num_accepted, time.perf_counter() - start)
        self._tally.add(facts)
        self._metrics.observe_round(facts, len(kept.token_ids))
        if kept.finish_reason:
            self.finished = self._finish(kept)
        return TokensEvent(
            offset=offset,
            text=kept.text,
            token_ids=kept.token_ids,
            num_accepted_tokens=num_accepted,
            logprobs=result.logprobs[: len(kept.token_ids)],
            round=facts,
        )

    def _facts(
        self, guess: Guess, checked: Checked, num_accepted: int, seconds: float
    ) -> RoundFacts:
        reason = guess.root_only_reason
        if not self._options.enabled:
            reason = "disabled"
        draft, verify = guess.compute_seconds, checked.result.compute_seconds
        queue = guess.queue_seconds + checked.result.queue_seconds
        away = guess.seconds + checked.seconds
        return RoundFacts(
            epoch=self.epoch,
            num_draft_tokens=guess.tree.num_draft_tokens,
            num_accepted_tokens=num_accepted,
            root_only_reason=reason,
            draft_seconds=draft,
            verify_seconds=verify,
            queue_seconds=queue,
            network_seconds=max(0.0, away - draft - verify - queue),
            router_seconds=max(0.0, seconds - away),
        )

    def _finish(self, kept: Kept) -> Finished:
        return Finished(
            reason=kept.finish_reason,
            stop_match=kept.stop_match,
            usage=Usage(
                self._num_prompt_tokens,
                len(self._token_ids) - self._num_prompt_tokens,
                self._num_cached_tokens,
            ),
            speculation=self._tally.summary(),
        )


class RoundTally:
    """Counts over a session's rounds."""

    def __init__(self) -> None:
        self._num_rounds = self._num_drafts = self._num_draft_tokens = 0
        self._per_pos: list[int] = []
        self._reasons: Counter[str] = Counter()

    def add(self, facts: RoundFacts) -> None:
        """Count one round."""
        self._num_rounds += 1
        if facts.root_only_reason:
            self._reasons[facts.root_only_reason] += 1
        if facts.num_draft_tokens:
            self._num_drafts += 1
            self._num_draft_tokens += facts.num_draft_tokens
        missing = facts.num_accepted_tokens - len(self._per_pos)
        self._per_pos.extend([0] * missing)
        for position in range(facts.num_accepted_tokens):
            self._per_pos[position] += 1

    def summary(self) -> SpeculationSummary:
        """The counts so far."""
        return SpeculationSummary(
            num_rounds=self._num_rounds,
            num_drafts=self._num_drafts,
            num_draft_tokens=self._num_draft_tokens,
            num_accepted_tokens=sum(self._per_pos),
            num_accepted_tokens_per_pos=tuple(self._per_pos),
            root_only_reasons=tuple(sorted(self._reasons.items())),
        )
