"""What a pass has shown: candidates for every row that its shares wanted to look at.

This module knows nothing of pools, deadlines or how a tree grows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specinfer_draft.drafters.forecast import rank
from specinfer_draft.drafters.passes import Share
from specinfer_draft.drafters.session import DraftSession
from specinfer_draft.grow import Candidates, GrowingTree, Wave


def look(
    shares: Sequence[Share], logits: Sequence[Tensor], spread: float
) -> list[list[Candidates]]:
    """Candidates of every row wanted, for each share; one top-k for the whole pass.

    Args:
        shares: of a pass; those whose search is over get none.
        logits: of the rows wanted, [num_wanted, vocab_size] a share.
        spread: as for `rank`.
    """
    forecasts, branch, counts = [], 0, []
    for share, rows in zip(shares, logits, strict=True):
        search, count = share.session.search, 0
        if share.rows.logit_rows and search is not None and search.wave is not None:
            count = len(share.rows.logit_rows)
            forecasts.append(_forecast(share.session, search.tree, search.wave, rows))
            branch = max(branch, search.wave.branch)
        counts.append(count)
    if not forecasts:
        return [[] for _ in shares]
    z = forecasts[0] if len(forecasts) == 1 else torch.cat(forecasts)
    ranked = iter(rank(z, branch, spread))
    return [[next(ranked) for _ in range(count)] for count in counts]


def _forecast(session: DraftSession, tree: GrowingTree, wave: Wave, logits: Tensor) -> Tensor:
    """Forecasts at the nodes of a wave, [num_nodes, vocab_size]."""
    paths = [tree.path_token_ids(node) for node in wave.nodes]
    # The root stands at len(state) - 1 and decides the token at len(state).
    positions = [len(session.state) + tree.depths[node] for node in wave.nodes]
    return session.forecast.forecast(logits, paths, positions)
