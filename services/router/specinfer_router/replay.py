"""What was committed before, shown again: tokens, text and logprobs of a session after an offset.

What the text is after any number of tokens does not depend on how rounds cut them, so what is shown
here joins what was shown before. This module knows nothing of rounds to come, owners or the wire.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence

from specinfer.messages import RoundFacts, TokenLogprob, TokensEvent
from specinfer.tree import TokenTree
from specinfer_router.completion import Completion, Kept
from specinfer_router.seats import VerifySeat
from specinfer_router.store import SessionRecord

log = logging.getLogger(__name__)

RESUMED = "resumed"
# Tokens of one event: an event with all logprobs of a long session would be too large to send.
PIECE_TOKENS = 256
# Fewer tokens become text in less time than a thread takes to start.
OFF_LOOP_TOKENS = 512


async def take(completion: Completion, token_ids: Sequence[int]) -> Kept:
    """`completion.take` of any number of tokens, off the event loop when they are many."""
    if not token_ids:
        return Kept((), "")
    if len(token_ids) <= OFF_LOOP_TOKENS:
        return completion.take(token_ids)
    return await asyncio.to_thread(completion.take, token_ids)


class Replay:
    """The committed tokens of a session after an offset.

    Attributes:
        ended: how the completion ended with the last token so far; its reason is "" if it did not.
    """

    def __init__(
        self,
        record: SessionRecord,
        completion: Completion,
        offset: int,
        seat: VerifySeat | None,
        *,
        whole: bool = False,
    ) -> None:
        """Begin with a completion that has taken nothing.

        Args:
            record: the session as the store has it.
            completion: it will have taken the whole output in the end.
            offset: tokens of the output that the reader has.
            seat: a place of its own in the verify tier, to compute logprobs again; None for none.
            whole: tell the tokens before the offset too, without logprobs.
        """
        self.ended = Kept((), "")
        self._record = record
        self._completion = completion
        self._offset = offset
        self._seat = seat
        self._whole = whole
        self._epoch = 0

    async def events(self, max_tree_nodes: int) -> AsyncGenerator[TokensEvent, None]:
        """The tokens after the offset, a few hundred an event.

        Raises:
            SpecinferError: logprobs are wanted and the verify tier could not go on.
        """
        output_ids = self._record.output_ids
        before = output_ids[: self._offset]
        self.ended = await take(self._completion, before)
        facts = RoundFacts(self._record.epoch, root_only_reason=RESUMED)
        if self._whole and before:
            yield TokensEvent(0, self.ended.text, before, 0, (), facts)
        try:
            for start in range(self._offset, len(output_ids), PIECE_TOKENS):
                piece = output_ids[start : start + PIECE_TOKENS]
                logprobs = await self._logprobs(start, piece, max_tree_nodes)
                self.ended = await take(self._completion, piece)
                yield TokensEvent(start, self.ended.text, piece, 0, logprobs, facts)
        finally:
            if self._seat is not None:
                self._seat.leave(self._epoch)

    async def _logprobs(
        self, start: int, piece: Sequence[int], max_tree_nodes: int
    ) -> tuple[TokenLogprob, ...]:
        """Logprobs of a piece, which the store does not keep.

        The target is asked again: given its own tokens as guesses it confirms each of them.
        """
        if self._seat is None:
            return ()
        prefix = list(self._record.token_ids[: self._record.terms.num_prompt_tokens + start])
        found: list[TokenLogprob] = []
        while len(found) < len(piece):
            rest = piece[len(found) :]
            # The last one wanted is the target's own, so that no step goes beyond the piece.
            guesses = rest[: min(max_tree_nodes, len(rest)) - 1]
            tree = TokenTree.chain((prefix[-1], *guesses))
            result = (await self._seat.step(prefix, self._epoch, tree)).result
            if tuple(result.token_ids) != tuple(rest[: len(guesses) + 1]):
                # Other hardware, or a target whose rows depend on their company. What the store has
                # stands; its logprobs are not to be had any more.
                log.warning("the target does not repeat its tokens; logprobs are left out")
                self._seat.leave(self._epoch)
                self._seat = None
                return ()
            found.extend(result.logprobs)
            prefix.extend(result.token_ids)
            self._epoch += 1
        return tuple(found)
