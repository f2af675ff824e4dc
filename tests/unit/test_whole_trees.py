"""Which trees grow whole: what one run cannot take does not keep the others from theirs, recordings
give way to younger ones, and neither they nor blocks are taken from those who wait."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from unittest.mock import patch

import pytest
from torch import Tensor

from specinfer.sampling import SamplingParams
from specinfer_draft.drafters import static_growth
from specinfer_draft.drafters.static_growth import (
    Growth,
    GrowthSizes,
    GrowthStart,
    Levels,
    StaticGrowths,
)
from specinfer_draft.drafters.whole_trees import RECORD_SECONDS
from specinfer_engine.batch import SequenceRows
from specinfer_engine.loader import load_model
from specinfer_engine.model import LoadedModel
from tests.kit.draft_driver import Clock
from tests.kit.recorded_passes import Recorder
from tests.kit.threads import one_thread as one_thread
from tests.kit.tiny_models import write_tiny_llama
from tests.kit.whole_trees import CUT, GREEDY, SAMPLED, Bench, drafter_of, rounds, shape_of

SHAPE = shape_of((2, 2, 2))
PROMPT = [7] * 9
RECORDING_SECONDS = 3.0


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A Llama with grouped heads, bit-invariant by row."""
    path = tmp_path_factory.mktemp("whole") / "llama"
    write_tiny_llama(path, vocab_size=300, hidden_size=32)
    return load_model(path, dtype="float32")


def growths_of(bench: Bench) -> StaticGrowths:
    assert bench.growths is not None
    return bench.growths


def passes_of(bench: Bench, sampling: SamplingParams, seconds: float = math.inf) -> int:
    """Passes that a tree of a session of its own takes when it has so many seconds."""
    bench.drafter.open("a", 0, PROMPT, sampling)
    bench.work()
    deadline = bench.clock.now + seconds
    run = bench.propose("a", PROMPT, SHAPE, known=len(PROMPT), deadline=deadline)
    num_passes = bench.work()
    assert run.result(0).tree.num_draft_tokens == SHAPE.max_nodes
    bench.drafter.close("a")
    return num_passes


def test_a_part_that_is_not_recorded_does_not_cost_the_others_theirs(loaded: LoadedModel) -> None:
    samplings = [replace(SAMPLED, seed=seed) for seed in range(19)]
    expected, _ = rounds(drafter_of(loaded, num_blocks=800), samplings, [SHAPE], 2)
    bench = drafter_of(loaded, Recorder(), num_blocks=800)
    taken = list[tuple[int, bool]]()
    grow = StaticGrowths.grow

    def watched(
        growths: StaticGrowths, sizes: GrowthSizes, starts: Sequence[GrowthStart]
    ) -> list[Levels | None] | None:
        found = grow(growths, sizes, starts)
        taken.append((len(starts), found is not None))
        return found

    with (
        patch.object(bench.growths, "_most_growths", 1),
        patch.object(bench.growths, "_refused", 0),
        patch.object(StaticGrowths, "grow", watched),
    ):
        found, _ = rounds(bench, samplings, [SHAPE], 2)
    assert found == expected
    # The three that are left over grow level by level, and nothing that was computed is lost.
    assert taken == [(16, True)] * 2


def test_the_least_recently_used_recording_gives_way(loaded: LoadedModel) -> None:
    bench = drafter_of(loaded, Recorder())
    laws = [GREEDY, CUT, replace(CUT, temperature=1.1), replace(CUT, temperature=1.2)]
    with (
        patch.object(bench.growths, "_most_growths", 2),
        patch.object(static_growth, "EVICT_AFTER", 3),
    ):
        assert [passes_of(bench, law) for law in (laws[0], laws[1], laws[0], laws[2])] == [1] * 4
        assert growths_of(bench).num_recorded == 2
        # The second law's gave way, and only every third refusal takes another's place.
        assert [passes_of(bench, law) for law in (laws[0], laws[2])] == [1, 1]
        assert [passes_of(bench, laws[3]) for _ in range(5)] == [3, 3, 3, 1, 1]
        assert [passes_of(bench, law) for law in (laws[2], laws[0])] == [1, 3]
    assert growths_of(bench).num_recorded == 2


def test_a_recording_is_not_made_where_a_deadline_is_nearer(loaded: LoadedModel) -> None:
    clock = Clock()

    def slow(step: Callable[[], None]) -> Callable[[], None]:
        clock.now += RECORDING_SECONDS if isinstance(step, Growth) else 0.0
        step()
        return step

    bench = drafter_of(loaded, slow, clock=clock)
    assert passes_of(bench, GREEDY, RECORD_SECONDS) == 3
    assert clock.now == 0.0
    assert passes_of(bench, GREEDY, RECORD_SECONDS) == 1
    assert clock.now == RECORDING_SECONDS, "tried, since the wait is believed less each time"
    # What one took is believed of the next, replays are not held to it.
    assert passes_of(bench, GREEDY, 0.01) == 1
    assert passes_of(bench, CUT, RECORDING_SECONDS) == 3
    assert clock.now == RECORDING_SECONDS


def test_a_recording_does_not_keep_others_of_the_pass_past_their_deadline(
    loaded: LoadedModel,
) -> None:
    bench = drafter_of(loaded, Recorder())
    for name, sampling in (("a", GREEDY), ("b", CUT)):
        bench.drafter.open(name, 0, PROMPT, sampling)
    bench.work()
    runs = [
        bench.propose(name, PROMPT, SHAPE, known=len(PROMPT), deadline=deadline)
        for name, deadline in (("a", math.inf), ("b", RECORD_SECONDS / 2))
    ]
    assert bench.work() == 3
    assert all(run.result(0).tree.num_draft_tokens == SHAPE.max_nodes for run in runs)
    assert growths_of(bench).num_recorded == 0


def test_time_that_the_root_took_counts(loaded: LoadedModel) -> None:
    bench = drafter_of(loaded, Recorder())
    forward = bench.runner.forward

    def slow_forward(rows: Sequence[SequenceRows]) -> list[Tensor]:
        bench.clock.now += 1.0
        return forward(rows)

    bench.drafter.open("a", 0, PROMPT, GREEDY)
    bench.work()
    run = bench.propose("a", PROMPT, SHAPE, known=len(PROMPT), deadline=1.0 + RECORD_SECONDS / 2)
    with patch.object(bench.runner, "forward", slow_forward):
        bench.work()
    assert growths_of(bench).num_recorded == 0, "half of what a recording takes was left"
    assert run.done()


def test_a_tree_that_cannot_grow_whole_takes_no_blocks_for_it(loaded: LoadedModel) -> None:
    free = []
    for bench in (drafter_of(loaded), drafter_of(loaded, Recorder())):
        bench.drafter.open("a", 0, PROMPT, GREEDY)
        bench.work()
        bench.propose("a", PROMPT, shape_of((3, 5, 5, 1)), known=len(PROMPT))
        with patch.object(StaticGrowths, "admits", return_value=False):
            passes = iter(bench.drafter.run_pass, False)
            free.append([bench.blocks.num_free_blocks for _ in passes])
    assert free[0] == free[1]
    assert free[0][0] > free[0][-2]
