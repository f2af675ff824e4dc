"""What a session store promises, whatever holds the data.

A record is enough to go on with a session on any worker: with the same tokens, sampling and seed
the continuation is the same. Tensors, trees and block tables are never stored. This module knows
nothing of Redis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from specinfer.sampling import SamplingParams


@dataclass(frozen=True)
class SessionRecord:
    """What a store keeps of one session.

    Attributes:
        session_id: id of the session; letters, digits, "-" and "_".
        model_hash: checkpoint whose tokens these are.
        num_prompt_tokens: how many of `token_ids` are the prompt.
        token_ids: prompt and committed output.
        sampling: how tokens are drawn, with the seed in use.
        epoch: commits so far.
        finish_reason: "stop", "length", "cancelled" or "error"; "" while the session runs.
    """

    session_id: str
    model_hash: str
    num_prompt_tokens: int
    token_ids: tuple[int, ...]
    sampling: SamplingParams
    epoch: int = 0
    finish_reason: str = ""


class SessionStore(Protocol):
    """Keeps session records for a while after their last change.

    Every method may raise Unavailable when the store cannot be reached. Every method may be called
    again with the same arguments: the second call changes nothing and gives the same answer.
    """

    async def create(self, record: SessionRecord) -> None:
        """Keep a new session at epoch 0.

        Raises:
            StaleEpoch: another session has this id.
            ResourceExhausted: the store is full.
        """
        ...

    async def commit(
        self, session_id: str, epoch: int, token_ids: Sequence[int], finish_reason: str = ""
    ) -> int:
        """Add the tokens that lead from `epoch` to the next one, which is returned.

        Raises:
            StaleEpoch: the session is not at `epoch`, and this is no repetition of its last commit.
            NotFound: no such session, or it has expired.
        """
        ...

    async def finish(self, session_id: str, finish_reason: str) -> None:
        """Mark a session as finished without tokens; a reason that stands already stays.

        A session that is gone already is none of the caller's worry.
        """
        ...

    async def load(self, session_id: str) -> SessionRecord:
        """The record of a session; raises NotFound."""
        ...

    async def check(self) -> None:
        """Raise Unavailable, saying what to do, unless the store can be reached."""
        ...

    async def close(self) -> None:
        """Give connections up."""
        ...
