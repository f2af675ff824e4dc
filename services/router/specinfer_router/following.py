"""Reading along with sessions that run elsewhere: polling the store for what is new, within bounds.

This module knows nothing of owners, workers or the wire.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from specinfer.errors import ResourceExhausted, RouterLeaving, Unavailable
from specinfer.messages import Finished, RoundFacts, SpeculationSummary, TokensEvent, Usage
from specinfer_router.access import Caller
from specinfer_router.completion import Completion, Kept
from specinfer_router.replay import RESUMED, take
from specinfer_router.session import LEAVING
from specinfer_router.store import ABANDONED, ERROR, SessionRecord, SessionStore

POLL_SECONDS = 0.05
MAX_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class FollowLimits:
    """Bounds of reading along.

    Attributes:
        max_followers: most streams that are read along at once.
        max_of_key: most of them for one key; its own `max_streams` may be lower.
        still_seconds: a session that does not move for so long is given up.
    """

    max_followers: int = 256
    max_of_key: int = 64
    still_seconds: float = 150.0


class Followers:
    """Everybody who reads along through one router."""

    def __init__(self, store: SessionStore, limits: FollowLimits) -> None:
        self._store = store
        self._limits = limits
        self._of_key: Counter[str] = Counter()
        self._cut = False

    def cut(self) -> None:
        """End them all, at their next look at the store."""
        self._cut = True

    async def follow(
        self,
        record: SessionRecord,
        completion: Callable[[SessionRecord], Completion],
        offset: int,
        caller: Caller,
    ) -> AsyncGenerator[TokensEvent | Finished, None]:
        """What a session commits after `offset` tokens, as it does, and how it ends.

        Raises:
            ResourceExhausted: too many read along already.
            Unavailable: the session broke, or has not moved for a long time; resume it.
            RouterLeaving: this router shuts down; read on through another one.
        """
        self._check(caller)
        self._of_key[caller.key_id] += 1
        try:
            text = completion(record)
            kept = await take(text, record.output_ids[:offset])
            seen, epoch = offset, record.epoch
            new, reason = record.output_ids[offset:], record.finish_reason
            pause, moved = POLL_SECONDS, time.monotonic()
            while True:
                if new:
                    pause, moved = POLL_SECONDS, time.monotonic()
                    kept = await take(text, new)
                    yield _tokens(seen, epoch, kept)
                    seen += len(new)
                if reason not in ("", ABANDONED, ERROR):
                    yield finished(record, kept.finish_reason or reason, kept.stop_match, seen)
                    return
                if self._cut:
                    raise RouterLeaving(LEAVING, retry_after=0.0)
                if reason or time.monotonic() - moved > self._limits.still_seconds:
                    raise Unavailable(f"session {record.session_id} is not running; resume it")
                await asyncio.sleep(pause)
                pause = min(MAX_POLL_SECONDS, 1.5 * pause)
                new, epoch, reason = await self._store.tail(
                    record.session_id, record.terms.num_prompt_tokens + seen
                )
        finally:
            self._of_key[caller.key_id] -= 1
            self._of_key += Counter()  # forgets keys without followers

    def _check(self, caller: Caller) -> None:
        bound = self._limits.max_followers
        # Callers without keys are many behind one name.
        if caller.key_id:
            bound = min(self._limits.max_of_key, caller.limits.max_streams or bound)
        if (
            self._of_key[caller.key_id] >= bound
            or self._of_key.total() >= self._limits.max_followers
        ):
            raise ResourceExhausted("too many streams are read along", retry_after=1.0)


def finished(record: SessionRecord, reason: str, stop_match: str, num_tokens: int) -> Finished:
    """The last event of a session that this router did not run to its end."""
    return Finished(
        reason=reason,
        stop_match=stop_match,
        usage=Usage(record.terms.num_prompt_tokens, num_tokens),
        speculation=SpeculationSummary(),
    )


def _tokens(offset: int, epoch: int, kept: Kept) -> TokensEvent:
    facts = RoundFacts(epoch, root_only_reason=RESUMED)
    return TokensEvent(offset, kept.text, kept.token_ids, 0, (), facts)
