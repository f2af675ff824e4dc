"""What a session and a tree may be, checked before any of it reaches a pass.

Every check raises the error that the caller gets. This module knows nothing of threads or tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from specinfer.errors import InvalidRequest, InvalidTree, ResourceExhausted, StaleEpoch
from specinfer.sampling import MAX_LOGPROBS, SamplingParams
from specinfer.tree import MAX_TREE_NODES, TokenTree
from specinfer_engine.blocks import BlockManager
from specinfer_engine.fence import MAX_SESSION_ID_LENGTH

# Between two answers nobody can end a session's text, so few tokens may be lost.
MAX_PLAIN_TOKENS = 16


@dataclass(frozen=True)
class Limits:
    """Bounds of a worker.

    Attributes:
        vocab_size: tokens the model knows.
        max_model_len: longest session in tokens, prompt and output together.
        max_sessions: most sessions open at once.
        max_tree_nodes: largest tree taken, root included.
        max_rows: most rows of a pass.
        min_prefill_rows: rows that prefill gets in every pass if it needs them.
        yield_seconds: how long a session without a step keeps its blocks from a younger one.
        starve_seconds: how long a step waits for blocks before an older session that is stepping
            has to yield them too.
        silent_seconds: how long a session without a step keeps its place when all are taken.
        session_idle_seconds: how long a session may be silent before it is closed.
        max_slots: slots of the KV pool; `within_pool` fills it in.
        end_token_ids: tokens that end a text: unasked nothing is decoded below them.

    Raises:
        InvalidRequest: when the bounds contradict each other.
    """

    vocab_size: int
    max_model_len: int
    max_sessions: int = 256
    max_tree_nodes: int = 64
    max_rows: int = 256
    min_prefill_rows: int = 64
    yield_seconds: float = 0.1
    starve_seconds: float = 2.0
    silent_seconds: float = 10.0
    session_idle_seconds: float = 600.0
    max_slots: int = 0
    end_token_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if not 1 <= self.max_tree_nodes <= self.max_rows <= MAX_TREE_NODES:
            raise InvalidRequest(
                f"max_tree_nodes {self.max_tree_nodes} is at least 1 and at most max_rows "
                f"{self.max_rows}, which is at most {MAX_TREE_NODES}",
                field="max_rows",
            )
        if not 1 <= self.min_prefill_rows <= self.max_rows:
            raise InvalidRequest(
                f"min_prefill_rows is between 1 and max_rows, got {self.min_prefill_rows}",
                field="min_prefill_rows",
            )
        if self.max_sessions < 1:
            raise InvalidRequest("max_sessions is at least 1", field="max_sessions")

    def within_pool(self, blocks: BlockManager) -> Limits:
        """The same limits, with the longest session cut to what the pool can ever hold."""
        max_slots = blocks.num_blocks * blocks.block_size
        return replace(self, max_slots=max_slots, max_model_len=min(self.max_model_len, max_slots))

    def end_at(self, token_ids: Sequence[int]) -> bool:
        """Whether nothing is to be decoded below these tokens without being asked for."""
        return len(token_ids) >= self.max_model_len or token_ids[-1] in self.end_token_ids

    def check_sessions(self, num_sessions: int) -> None:
        """Raise ResourceExhausted when there is no place for one more session."""
        if num_sessions >= self.max_sessions:
            raise ResourceExhausted(
                f"all {self.max_sessions} sessions of this worker are in use", retry_after=1.0
            )


def check_open(
    limits: Limits,
    session_id: str,
    epoch: int,
    token_ids: Sequence[int],
    sampling: SamplingParams,
    num_prompt_tokens: int,
    num_logprobs: int | None,
) -> None:
    """Raise InvalidRequest unless a session can be opened with these values."""
    if not 1 <= len(session_id) <= MAX_SESSION_ID_LENGTH:
        raise InvalidRequest(
            f"a session id has 1 to {MAX_SESSION_ID_LENGTH} characters", field="session_id"
        )
    if epoch < 0:
        raise InvalidRequest(f"an epoch is not negative, got {epoch}", field="epoch")
    _check_tokens(limits, token_ids)
    if not 1 <= num_prompt_tokens <= len(token_ids):
        raise InvalidRequest(
            f"{num_prompt_tokens} of {len(token_ids)} tokens cannot be the prompt",
            field="num_prompt_tokens",
        )
    if num_logprobs is not None and not 0 <= num_logprobs <= MAX_LOGPROBS:
        raise InvalidRequest(
            f"num_logprobs is between 0 and {MAX_LOGPROBS}, got {num_logprobs}",
            field="num_logprobs",
        )
    for token_id in sampling.logit_bias:
        if token_id >= limits.vocab_size:
            raise InvalidRequest(
                f"logit_bias names token {token_id}, outside the vocabulary of {limits.vocab_size}",
                field="logit_bias",
            )


def _check_tokens(limits: Limits, token_ids: Sequence[int]) -> None:
    if not token_ids:
        raise InvalidRequest("a session needs at least one token", field="token_ids")
    if len(token_ids) >= limits.max_model_len:
        raise InvalidRequest(
            f"{len(token_ids)} tokens leave no room for another one; a session has at most "
            f"{limits.max_model_len}",
            field="token_ids",
        )
    for token_id in (min(token_ids), max(token_ids)):
        if not 0 <= token_id < limits.vocab_size:
            raise InvalidRequest(
                f"token {token_id} is outside the vocabulary of {limits.vocab_size}",
                field="token_ids",
            )


def check_num_tokens(tree: TokenTree, num_tokens: int) -> None:
    """Raise InvalidRequest unless so many tokens may be asked for with this tree."""
    most = MAX_PLAIN_TOKENS if len(tree) == 1 else 1
    if not 1 <= num_tokens <= most:
        raise InvalidRequest(
            f"a step may ask for 1 to {MAX_PLAIN_TOKENS} tokens below a root alone and for 1 with "
            f"guesses, got {num_tokens}",
            field="num_tokens",
        )


def check_tree(limits: Limits, tree: TokenTree, token_ids: Sequence[int]) -> None:
    """Raise InvalidTree or InvalidRequest unless the tree can be checked below these tokens."""
    if len(tree) > limits.max_tree_nodes:
        raise InvalidTree(f"a tree has at most {limits.max_tree_nodes} nodes here, got {len(tree)}")
    tree.check_vocabulary(limits.vocab_size)
    if tree.token_ids[0] != token_ids[-1]:
        raise InvalidTree(
            f"the root is token {tree.token_ids[0]}, but the session ends with {token_ids[-1]}"
        )
    if len(token_ids) >= limits.max_model_len:
        raise InvalidRequest(
            f"the session has {len(token_ids)} tokens and may not grow beyond "
            f"{limits.max_model_len}",
            field="token_ids",
        )


def check_epoch(session_id: str, current: int, epoch: int) -> None:
    """Raise StaleEpoch unless an item is meant for the session as it is now."""
    if epoch != current:
        raise StaleEpoch(f"session {session_id} is at epoch {current}, not {epoch}")
