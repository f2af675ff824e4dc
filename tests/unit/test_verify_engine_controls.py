"""Negative controls: with a bug planted, the checks of the verify engine must report a difference.

Each check is a function that returns what it found; it finds nothing in the engine as it is, and
something in every planted copy.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

import specinfer_engine.acceptance
import specinfer_verify.engine
import specinfer_verify.walks
from specinfer.errors import SpecinferError, StaleEpoch
from specinfer.sampling import SamplingParams
from specinfer.tree import TokenTree
from specinfer_engine.acceptance import Walk
from specinfer_engine.batch import SequenceRows
from specinfer_engine.sequence import Moves, SequenceState
from specinfer_verify.engine import VerifyEngine
from tests.kit.table_models import TableModel, TableRunner, draft_nothing, random_drafter
from tests.kit.verify_driver import TIMEOUT, Job, decode, running, table_engine

VOCAB = 4
MakeRunner = Callable[[TableModel, int, int], TableRunner]


def speculation_divergences(make_runner: MakeRunner = TableRunner) -> int:
    """Sessions whose tokens differ between speculation on and off, or that fail."""
    divergences = 0
    engine, _, _ = table_engine(VOCAB, make_runner=make_runner)
    with running(engine):
        for seed in range(6):
            job = Job((seed % VOCAB, 1, 2), SamplingParams(temperature=0.9, seed=seed), 40)
            plain = decode(engine, f"plain{seed}", job)
            draft = random_drafter(random.Random(seed), VOCAB, known=[*job.prompt, *plain])
            try:
                divergences += decode(engine, f"tree{seed}", replace(job, draft=draft)) != plain
            except SpecinferError:
                divergences += 1
    return divergences


def stale_items_accepted(engine: VerifyEngine) -> int:
    """Steps two epochs old that were answered, though their round is long committed."""
    accepted = 0
    sampling = SamplingParams(seed=4)
    tokens = [1, 2, 3]
    engine.open("a", 0, tokens, sampling, 3).result(TIMEOUT)
    roots: list[TokenTree] = []
    for _ in range(12):
        roots.append(draft_nothing(tokens))
        epoch = len(roots) - 1
        result = engine.step("a", epoch, roots[-1]).result(TIMEOUT)
        tokens += result.token_ids
        # A network that delivers an old frame once more.
        late = TokenTree.root_only(tokens[-1])
        error = engine.step("a", epoch - 1, late).exception(TIMEOUT) if epoch else StaleEpoch("")
        accepted += not isinstance(error, StaleEpoch)
        if error is None:
            break
    return accepted


def test_the_checks_find_nothing_in_the_engine_as_it_is() -> None:
    assert speculation_divergences() == 0
    engine, _, _ = table_engine(VOCAB)
    with running(engine):
        assert stale_items_accepted(engine) == 0


class DescendingCompaction(TableRunner):
    """Planted: slots are moved one by one from the last to the first."""

    def compact(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        for source, target in reversed(list(zip(sources, targets, strict=True))):
            self.slots[target] = self.slots[source]


class NoCompaction(TableRunner):
    """Planted: accepted rows stay where the tree had put them."""

    def compact(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        return


class PositionByIndex(TableRunner):
    """Planted: a node's position is its index in the tree and not its depth."""

    def forward(self, rows: Sequence[SequenceRows]) -> list[object]:  # type: ignore[override]
        spoiled = [replace(part, depths=tuple(range(len(part.token_ids)))) for part in rows]
        return list(super().forward(spoiled))


class VisibleSibling(TableRunner):
    """Planted: every node sees all nodes before it."""

    def forward(self, rows: Sequence[SequenceRows]) -> list[object]:  # type: ignore[override]
        return list(super().forward([replace(part, ancestors=()) for part in rows]))


class NoBlockCopy(TableRunner):
    """Planted: a shared block is written without having been copied."""

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        return


@pytest.mark.parametrize(
    "planted", [DescendingCompaction, NoCompaction, PositionByIndex, VisibleSibling]
)
def test_a_planted_runner_diverges(planted: MakeRunner) -> None:
    assert speculation_divergences(planted) > 0


def test_a_missing_block_copy_diverges() -> None:
    prompt = tuple(index % 3 for index in range(8))
    job = Job(prompt, SamplingParams(temperature=0.0), 10)
    outputs = []
    for make_runner in (TableRunner, NoBlockCopy):
        engine, _, _ = table_engine(VOCAB, make_runner=make_runner)
        with running(engine):
            engine.open("owner", 0, prompt, job.sampling, 8)
            engine.step("owner", 0, draft_nothing(prompt)).result(TIMEOUT)
            outputs.append(decode(engine, "sharer", job))
    assert outputs[0] != outputs[1]


def test_accepted_nodes_committed_out_of_order_diverge(monkeypatch: pytest.MonkeyPatch) -> None:
    def shuffled(
        state: SequenceState, num_chunk: int, walk: Walk, token_ids: Sequence[int]
    ) -> Moves:
        state.append(token_ids)
        moves = state.commit([*range(num_chunk + 1), *(num_chunk + node for node in walk.path)])
        return Moves(moves.sources, moves.targets[::-1])

    monkeypatch.setattr(specinfer_verify.walks, "commit_walk", shuffled)
    assert speculation_divergences() > 0


def test_noise_of_the_root_reused_in_the_tree_diverges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        specinfer_engine.acceptance, "decided_position", lambda base_len, depth: base_len + 1
    )
    assert speculation_divergences() > 0


def test_a_stale_epoch_accepted_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(specinfer_verify.engine, "check_epoch", lambda *arguments: None)
    engine, _, _ = table_engine(VOCAB)
    with running(engine):
        assert stale_items_accepted(engine) > 0
