"""Bounds of a model drafter, and what is refused because of them before any work.

This module knows nothing of passes, trees or threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specinfer.errors import InvalidRequest
from specinfer.tree import MAX_TREE_NODES
from specinfer_draft.grow import NO_THRIFT, Thrift
from specinfer_engine.fence import MAX_SESSION_ID_LENGTH


@dataclass(frozen=True)
class DrafterLimits:
    """Bounds and habits of a model drafter.

    Attributes:
        vocab_size: tokens the model knows.
        max_model_len: longest session in tokens.
        max_sessions: most sessions open at once; one more closes the least recently used.
        max_tree_nodes: largest tree grown, root included.
        max_rows: most rows of a pass.
        prefill_rows: most rows of prompts in a pass that carries trees too.
        thrift: when best-first growing is no longer worth its cost.
        ahead: whether to go on with the next tree while the last one is verified.
        spread: scale of the difference between target's and drafter's logits (see `forecast`).

    Raises:
        InvalidRequest: when a bound makes no sense.
    """

    vocab_size: int
    max_model_len: int
    max_sessions: int = 256
    max_tree_nodes: int = 64
    max_rows: int = 512
    prefill_rows: int = 128
    thrift: Thrift = NO_THRIFT
    spread: float = 1.0
    ahead: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.max_tree_nodes <= min(self.max_rows, MAX_TREE_NODES):
            raise InvalidRequest(
                f"max_tree_nodes is between 1 and max_rows and at most {MAX_TREE_NODES}, got "
                f"{self.max_tree_nodes}",
                field="max_tree_nodes",
            )
        if self.max_sessions < 1 or not 1 <= self.prefill_rows <= self.max_rows:
            raise InvalidRequest(
                "max_sessions is at least 1 and prefill_rows between 1 and max_rows",
                field="prefill_rows",
            )
        if not self.spread > 0.0:
            raise InvalidRequest(f"spread is positive, got {self.spread}", field="spread")


def check_open(
    limits: DrafterLimits, session_id: str, token_ids: Sequence[int], num_prompt_tokens: int
) -> None:
    """Raise InvalidRequest unless a session can be opened with these values."""
    if not 1 <= len(session_id) <= MAX_SESSION_ID_LENGTH:
        raise InvalidRequest(
            f"a session id has 1 to {MAX_SESSION_ID_LENGTH} characters", field="session_id"
        )
    if not token_ids:
        raise InvalidRequest("a session needs at least one token", field="token_ids")
    check_tokens(limits, token_ids)
    if len(token_ids) > limits.max_model_len:
        raise InvalidRequest(
            f"{len(token_ids)} tokens are more than the drafter's {limits.max_model_len}",
            field="token_ids",
        )
    if not 0 <= num_prompt_tokens <= len(token_ids):
        raise InvalidRequest(
            f"{num_prompt_tokens} of {len(token_ids)} tokens cannot be the prompt",
            field="num_prompt_tokens",
        )


def check_tokens(limits: DrafterLimits, token_ids: Sequence[int]) -> None:
    """Raise InvalidRequest for a token that the model does not know."""
    for token_id in (min(token_ids), max(token_ids)) if token_ids else ():
        if not 0 <= token_id < limits.vocab_size:
            raise InvalidRequest(
                f"token {token_id} is outside the vocabulary of {limits.vocab_size}",
                field="token_ids",
            )
