"""Where a completion ends: end tokens, stop strings and the most tokens, inside a round as well.

A round brings several tokens at once; the completion may end at any of them. This module knows
nothing of trees, workers, stores or the wire.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from specinfer_router.text import Detokenizer, StopMatcher


class Kept(NamedTuple):
    """What of a round's tokens belongs to the completion.

    Attributes:
        token_ids: tokens kept, up to and with the one that ended the completion.
        text: text that became certain and may be shown.
        finish_reason: "stop", "length", or "" while the completion goes on.
        stop_match: the stop string, or the stop token's number, that ended it.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str = ""
    stop_match: str = ""


class Completion:
    """The text and end of one completion.

    An end token is kept as a token and has no text. Tokens after the one that completes a stop
    string are dropped; the text is cut where the stop string begins.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        *,
        stops: Sequence[str],
        stop_token_ids: frozenset[int],
        eos_token_ids: frozenset[int],
        max_tokens: int,
    ) -> None:
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(stops)
        self._stop_token_ids = stop_token_ids
        self._eos_token_ids = eos_token_ids
        self._max_tokens = max_tokens
        self.num_tokens = 0

    @property
    def num_left(self) -> int:
        """Tokens that may still come."""
        return self._max_tokens - self.num_tokens

    def take(self, token_ids: Sequence[int]) -> Kept:
        """Add a round's tokens, as many as belong to the completion; at least one is given."""
        if len(token_ids) < self.num_left and self._only_text(token_ids):
            self.num_tokens += len(token_ids)
            return Kept(tuple(token_ids), self._detokenizer.push_all(token_ids))
        text: list[str] = []
        for index, token_id in enumerate(token_ids, start=1):
            self.num_tokens += 1
            reason, match = self._take_one(token_id, text)
            if reason:
                return Kept(tuple(token_ids[:index]), "".join(text), reason, match)
        return Kept(tuple(token_ids), "".join(text))

    def _only_text(self, token_ids: Sequence[int]) -> bool:
        """Whether none of these tokens can end the completion, as in nearly every round."""
        return (
            self._matcher.idle
            and self._stop_token_ids.isdisjoint(token_ids)
            and self._eos_token_ids.isdisjoint(token_ids)
        )

    def _take_one(self, token_id: int, text: list[str]) -> tuple[str, str]:
        if token_id in self._stop_token_ids:
            return "stop", self._finish(text) or str(token_id)
        if token_id in self._eos_token_ids:
            return "stop", self._finish(text)
        shown, match = self._matcher.push(self._detokenizer.push(token_id))
        text.append(shown)
        if match:
            return "stop", match
        if self.num_left > 0:
            return "", ""
        match = self._finish(text)
        return ("stop" if match else "length"), match

    def _finish(self, text: list[str]) -> str:
        """Show what was held back; it may complete a stop string, which is returned."""
        shown, match = self._matcher.push(self._detokenizer.flush())
        text.append(shown if match else shown + self._matcher.flush())
        return match
