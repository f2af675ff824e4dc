"""Sessions that outgrow the drafter's context: refused alone, and no pass runs past its end."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from torch import Tensor

from specinfer.errors import InvalidRequest
from specinfer_engine.batch import SequenceRows
from tests.kit.draft_driver import GREEDY, table_drafter
from tests.kit.table_models import TableRunner

MAX_MODEL_LEN = 20
PROMPT = (1, 2, 3, 4, 5, 6, 7)


class BoundedRunner(TableRunner):
    """A model that has MAX_MODEL_LEN positions and no more."""

    def forward(self, rows: Sequence[SequenceRows]) -> list[Tensor]:
        for share in rows:
            assert share.context_len + max(share.depths) < MAX_MODEL_LEN
        return super().forward(rows)


@pytest.mark.parametrize("num_new", [3, 500])
def test_a_session_past_the_end_of_the_context_is_refused_and_harms_nobody(num_new: int) -> None:
    bench = table_drafter(max_model_len=MAX_MODEL_LEN, make_runner=BoundedRunner)
    for session_id in ("long", "other"):
        bench.drafter.open(session_id, 0, PROMPT, GREEDY)
    known_len = len(PROMPT)
    bench.work()
    while known_len + num_new <= MAX_MODEL_LEN:
        bench.tree("long", known_len, [1] * num_new)
        known_len += num_new
    for _ in range(2):
        with pytest.raises(InvalidRequest):
            bench.propose("long", known_len, [1] * num_new)
        bench.work()
    assert bench.tree("other", len(PROMPT)).num_draft_tokens > 0
    assert bench.tree("long", known_len, [1] * (MAX_MODEL_LEN - known_len)).max_depth == 1
