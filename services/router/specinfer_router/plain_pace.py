"""How many tokens a round without guesses asks for at once.

Where nobody guesses, a round trip for every token buys nothing: the target goes on by itself, a
pass a token, and they come together as long as that keeps nobody waiting. This module knows nothing
of why there are no guesses, of workers or of rounds.
"""

from __future__ import annotations

# A text may end within them, by a stop string that the target does not know, and be thrown away.
MOST_TOKENS = 8


class PlainPace:
    """One session's.

    Args:
        seconds: how long tokens may take that come together; 0 lets each come by itself.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        # Of one token, by the last round; nothing is known before the first.
        self._token_seconds = 0.0

    def observe(self, seconds: float, num_tokens: int) -> None:
        """Take in a round without guesses: how long its tokens took, waits and the way included."""
        self._token_seconds = seconds / num_tokens

    def num_tokens(self, left: int) -> int:
        """How many the next such round asks for, of so many that are wanted; one at least."""
        if not self._token_seconds:
            return 1
        return max(1, min(left, tokens_within(self._seconds, self._token_seconds)))


def tokens_within(seconds: float, token_seconds: float) -> int:
    """How many tokens of so many seconds each come together; one at least."""
    return max(1, min(MOST_TOKENS, int(seconds / token_seconds)))
