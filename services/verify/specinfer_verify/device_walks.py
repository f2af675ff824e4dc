"""The walks of many sessions at once, where their logits lie: one small copy leaves the device.

    draws = law and noise of every node        `sample_law`, one launch
    walks = rule MATCH down every tree         `walk_trees`, one launch

For a GPU, on which drawing for all nodes costs less than asking once for each visited one. Law,
noise and rule are those of `match_walk`; what depends on a session's past (penalties, a grammar) or
names tokens (a bias) is walked there instead. Which of the two walks a session follows from its own
request alone, never from its neighbours. This module knows nothing of results, commits or futures.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specinfer.errors import InternalError
from specinfer.sampling import SamplingParams
from specinfer.tree import TokenTree
from specinfer_engine.acceptance import Walk, decided_position
from specinfer_kernels import Backend, Laws, sample_law, walk_trees
from specinfer_verify.scheduler import ScheduledRows
from specinfer_verify.session import Session

Walked = dict[str, list[int]]
"""Session id -> number of accepted nodes, tail and accepted nodes; for `read_walk`."""

# Drawn at a row with a NaN: no node carries it, so the walk ends there.
_NO_TOKEN = -1
# Walks together that fail this often in a row are not tried again.
MOST_WALK_FAILURES = 3

log = logging.getLogger(__name__)


class DeviceWalks:
    """Walks together, for as long as they do not fail.

    Args:
        wanted: whether sessions are walked together at all.
    """

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted
        self._num_failures = 0  # in a row

    def of(self, plan: Sequence[ScheduledRows], logits: Sequence[Tensor]) -> Walked:
        """What was walked together; what is missing is walked session by session."""
        if not self._wanted or self._num_failures >= MOST_WALK_FAILURES:
            return {}
        try:
            walked = walk_on_device(plan, logits)
        except Exception:
            # Whoever is at fault, by itself each session fails alone.
            self._num_failures += 1
            last = self._num_failures == MOST_WALK_FAILURES
            log.exception(
                "walks together failed: sessions are walked one by one %s",
                "from now on" if last else "in this pass",
            )
            return {}
        self._num_failures = 0
        return walked


@dataclass(frozen=True)
class Walker:
    """One tree to walk.

    Attributes:
        tree: its guesses.
        base_len: tokens before its root.
        sampling: how its session draws.
    """

    tree: TokenTree
    base_len: int
    sampling: SamplingParams


def walk_on_device(
    plan: Sequence[ScheduledRows],
    logits: Sequence[Tensor],
    *,
    backend: Backend | None = None,
) -> Walked:
    """Walk the sessions of a pass whose laws are made of their rows alone.

    Args:
        plan: the pass.
        logits: raw logits of each tree's nodes, [num_nodes, vocab_size], all on one device; what is
            not float32 is left to `match_walk`.
        backend: of the kernels; None chooses by device.

    Returns:
        The walks of those sessions.
    """
    names, walkers, rows = [], [], []
    for item, values in zip(plan, logits, strict=True):
        session = item.session
        if item.tree is not None and values.dtype == torch.float32 and draws_from_rows(session):
            names.append(session.session_id)
            walkers.append(Walker(item.tree, session.base_len, session.sampling))
            rows.append(values)
    if not names:
        return {}
    together = rows[0] if len(rows) == 1 else torch.cat(rows)
    walks = walk_together(walkers, together, backend=backend)
    return dict(zip(names, walks, strict=True))


def draws_from_rows(session: Session) -> bool:
    """Whether a session's law at a node is made of that node's logits and nothing else."""
    sampling = session.sampling
    return not (sampling.penalised or sampling.logit_bias or session.grammar is not None)


def walk_together(
    walkers: Sequence[Walker], logits: Tensor, *, backend: Backend | None = None
) -> list[list[int]]:
    """Number of accepted nodes, tail and accepted nodes of each tree, then -1.

    Args:
        walkers: trees, one at least.
        logits: raw float32 [num_nodes of all trees, vocab_size], in the order of the trees.
        backend: of the kernels; None chooses by device.
    """
    device = logits.device
    seeds, positions, token_ids = _columns(walkers, device)
    laws = _laws(walkers, device)
    draws = sample_law(logits, laws, seeds, positions, backend=backend)
    draws = torch.where(logits.amax(1).isnan(), _NO_TOKEN, draws)
    parents = [parent for walker in walkers for parent in walker.tree.parents]
    offsets = [0]
    for walker in walkers:
        offsets.append(offsets[-1] + len(walker.tree))
    walks = walk_trees(
        draws,
        token_ids,
        _put(parents, torch.int32, device),
        _put(offsets, torch.int32, device),
        max(walker.tree.max_depth for walker in walkers),
        backend=backend,
    )
    numbers: list[list[int]] = walks.tolist()  # the one copy that leaves the device
    return numbers


def read_walk(numbers: Sequence[int], base_len: int) -> Walk:
    """One row of `walk_together` for a tree with `base_len` tokens before its root.

    Raises:
        InternalError: when the walk came to a row with a NaN.
    """
    num_accepted, tail, *nodes = numbers
    if tail == _NO_TOKEN:
        position = decided_position(base_len, num_accepted)
        raise InternalError(f"the model made a NaN where token {position} is decided")
    return Walk(tuple(nodes[:num_accepted]), tail)


def _columns(walkers: Sequence[Walker], device: torch.device) -> tuple[Tensor, ...]:
    """Seed, position of the token decided, and own token of every node, each int64 [num_nodes]."""
    seeds = [walker.sampling.seed for walker in walkers for _ in walker.tree.token_ids]
    positions = [
        decided_position(walker.base_len, depth)
        for walker in walkers
        for depth in walker.tree.depths
    ]
    token_ids = [token_id for walker in walkers for token_id in walker.tree.token_ids]
    return _put([seeds, positions, token_ids], torch.int64, device).unbind()


def _laws(walkers: Sequence[Walker], device: torch.device) -> Laws:
    """The law of every node, its session's."""
    each = [walker.sampling for walker in walkers for _ in walker.tree.token_ids]
    return Laws(
        temperature=_put([one.temperature for one in each], torch.float32, device),
        top_k=_put([one.top_k for one in each], torch.int32, device),
        top_p=_put([one.top_p for one in each], torch.float64, device),
        min_p=_put([one.min_p for one in each], torch.float64, device),
    )


def _put(values: Sequence[object], dtype: torch.dtype, device: torch.device) -> Tensor:
    # Nobody waits for the copy; the pass may still be running.
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)
