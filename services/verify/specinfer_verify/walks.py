"""From the logits of one session's rows to its result: walk the tree, commit, report.

Plain functions over one session at a time, so that a walk that fails harms no other session. This
module knows nothing of threads, futures or the pool.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from specinfer.errors import InternalError, SpecinferError
from specinfer.messages import TokenLogprob, VerifyResult
from specinfer.tree import TokenTree
from specinfer_engine.acceptance import Walk, match_walk
from specinfer_engine.grammar import constrain
from specinfer_engine.logits import process_logits, token_logprob
from specinfer_engine.sequence import Moves, SequenceState
from specinfer_verify.device_walks import read_walk
from specinfer_verify.scheduler import ScheduledRows
from specinfer_verify.session import PendingStep, Session

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PassFacts:
    """When a pass began and ended, in seconds of the engine's clock, and how many rows it had."""

    start: float
    end: float
    num_rows: int


@dataclass(frozen=True)
class Outcome:
    """One session's share of a finished pass.

    Attributes:
        session: whose share it is.
        result: of the step, or None while the prefix is incomplete or the walk failed.
        moves: slots to move before the next pass.
        error: why the walk failed, or None.
    """

    session: Session
    result: VerifyResult | None = None
    moves: Moves = field(default_factory=Moves)
    error: SpecinferError | None = None


def finish(
    item: ScheduledRows, logits: Tensor, facts: PassFacts, walked: Sequence[int] | None = None
) -> Outcome:
    """Commit a chunk, or walk a tree and commit what it confirms.

    Args:
        item: the session's share of the pass.
        logits: raw logits of the tree's nodes, [num_nodes, vocab_size].
        facts: of the pass.
        walked: the walk that was done on the device, for `read_walk`; None does it here.
    """
    session, step = item.session, item.session.pending
    if step is not None:
        step.compute_seconds += facts.end - facts.start
    if item.tree is None or step is None:
        return Outcome(session, moves=session.state.commit(range(item.num_chunk)))
    try:
        if walked is None:
            walk = walk_tree(session, item.tree, logits)
        else:
            walk = read_walk(walked, session.base_len)
        token_ids = (*(item.tree.token_ids[node] for node in walk.path), walk.tail)
        result = _result(session, step, walk, token_ids, logits, facts)
    except SpecinferError as error:
        return Outcome(session, error=error)
    except Exception as error:
        log.exception("the walk of session %s failed", session.session_id)
        return Outcome(session, error=InternalError(f"the walk failed: {error}"))
    moves = commit_walk(session.state, item.num_chunk, walk, token_ids)
    return Outcome(session, result, moves)


def walk_tree(session: Session, tree: TokenTree, logits: Tensor) -> Walk:
    """Rule MATCH over the session's processed logits, made for visited nodes only."""
    sampling = session.sampling
    past: Past | None = None
    if sampling.penalised or session.grammar is not None:
        token_ids, num_prompt = session.state.token_ids, session.num_prompt_tokens
        past = Past(token_ids[:num_prompt], token_ids[num_prompt:])

    def p_at(node: int) -> Tensor:
        if past is None:
            return process_logits(logits[node], sampling)
        return law_after(session, logits[node], past, tree.path_token_ids(node)[1:])

    return match_walk(
        tree, p_at, base_len=session.base_len, seed=sampling.seed, greedy=sampling.greedy
    )


@dataclass(frozen=True)
class Past:
    """Tokens of a session up to its root: the prompt's, and the output's with the root."""

    prompt: Sequence[int]
    output: Sequence[int]


def law_after(session: Session, row: Tensor, past: Past, path: Sequence[int]) -> Tensor:
    """The law at the node that a path of guessed tokens leads to, [vocab_size].

    The grammar comes first, so that every later step sees the allowed tokens alone.
    """
    output = [*past.output, *path]
    if session.grammar is not None:
        row = constrain(row, session.grammar, output)
    return process_logits(row, session.sampling, past.prompt, output)


def commit_walk(
    state: SequenceState, num_chunk: int, walk: Walk, token_ids: Sequence[int]
) -> Moves:
    """Append a walk's tokens and keep the chunk's, the root's and the accepted nodes' KV."""
    state.append(token_ids)
    chunk_and_root = range(num_chunk + 1)
    return state.commit([*chunk_and_root, *(num_chunk + node for node in walk.path)])


def _result(
    session: Session,
    step: PendingStep,
    walk: Walk,
    token_ids: tuple[int, ...],
    logits: Tensor,
    facts: PassFacts,
) -> VerifyResult:
    return VerifyResult(
        epoch=session.epoch + 1,
        accepted=tuple(step.kept[node] for node in walk.path),
        token_ids=(*step.token_ids, *token_ids),
        logprobs=(*step.logprobs, *_logprobs(session, walk, token_ids, logits)),
        num_cached_tokens=session.num_cached_tokens or 0,
        num_rows=facts.num_rows,
        queue_seconds=max(0.0, facts.end - step.arrival - step.compute_seconds),
        compute_seconds=step.compute_seconds,
    )


def _logprobs(
    session: Session, walk: Walk, token_ids: Sequence[int], logits: Tensor
) -> tuple[TokenLogprob, ...]:
    """One entry a token, each from the row that its token was drawn at."""
    num_top = session.num_logprobs
    if num_top is None:
        return ()
    visited = (0, *walk.path)
    return tuple(
        token_logprob(logits[node], token_id, num_top)
        for node, token_id in zip(visited, token_ids, strict=True)
    )
