"""Trees grown whole are those grown level by level, score for score, whatever shares their run.

A recorder on the CPU stands in for CUDA graphs: it keeps the growth and runs it again, so that it
can read nothing but the tensors that were there when it was recorded.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import pytest
import torch
from prometheus_client import CollectorRegistry
from torch import Tensor

from specinfer.messages import ShapeQuery
from specinfer.metrics import DraftMetrics
from specinfer.sampling import SamplingParams
from specinfer_draft.drafters import static_growth
from specinfer_draft.drafters.forecast import Cuts, cut, cut_by_best
from specinfer_draft.drafters.static_growth import (
    Growth,
    GrowthSizes,
    GrowthStart,
    TreePlan,
    lay_out,
)
from specinfer_engine.batch import SequenceRows
from specinfer_engine.device_waits import RefuseWaits
from specinfer_engine.graphs import Capture, ScratchBlocks
from specinfer_engine.loader import load_model
from specinfer_engine.model import LoadedModel
from specinfer_kernels import TARGET, gumbel_noise, reference
from tests.kit.draft_driver import Clock
from tests.kit.draft_service import INFO
from tests.kit.recorded_passes import Recorder, refuse
from tests.kit.threads import one_thread as one_thread
from tests.kit.tiny_models import write_tiny_llama
from tests.kit.whole_trees import (
    BLOCK_SIZE,
    CUT,
    GREEDY,
    NUM_BLOCKS,
    SAMPLED,
    drafter_of,
    rounds,
    shape_of,
)

VOCAB_SIZE = 300
WIDTHS = [(1,) * 6, (3, 2, 1), (2, 2, 2)]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A Llama with grouped heads, bit-invariant by row."""
    path = tmp_path_factory.mktemp("growth") / "llama"
    write_tiny_llama(path, vocab_size=VOCAB_SIZE, hidden_size=32)
    return load_model(path, dtype="float32")


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, CUT], ids=["greedy", "sampled", "cut"])
def test_a_tree_is_that_of_the_levels_in_one_pass(
    loaded: LoadedModel, widths: tuple[int, ...], sampling: SamplingParams
) -> None:
    recorder, shape = Recorder(), shape_of(widths)
    expected, num_passes = rounds(drafter_of(loaded), [sampling], [shape])
    bench = drafter_of(loaded, recorder)
    found, num_whole = rounds(bench, [sampling], [shape])
    assert found == expected
    assert len(found[0]) == shape.max_nodes + 1
    assert len({tree.token_ids for tree in found}) == len(found)
    assert (num_passes, num_whole) == (4 * len(widths), 4)
    assert bench.growths is not None
    assert bench.growths.num_recorded == 1, "the later trees are replays"


def test_sessions_of_many_laws_and_shapes_share_passes(loaded: LoadedModel) -> None:
    samplings = [
        *(replace(SAMPLED, seed=seed) for seed in range(3)),
        *(GREEDY, CUT, replace(CUT, seed=5), SamplingParams(temperature=1.3, seed=9)),
        # Three that grow level by level beside them.
        SamplingParams(temperature=0.8, frequency_penalty=0.5, seed=3),
        SamplingParams(temperature=0.0, logit_bias={7: 4.0}),
        SAMPLED,
    ]
    shapes = [shape_of((2, 2, 2))] * 9 + [ShapeQuery(8, 4, branch=3)]
    expected, _ = rounds(drafter_of(loaded), samplings, shapes)
    bench = drafter_of(loaded, Recorder())
    found, _ = rounds(bench, samplings, shapes)
    assert found == expected
    assert bench.growths is not None
    assert bench.growths.num_recorded == 2, "one a law"
    for index in range(len(samplings)):
        bench.drafter.close(str(index))
    assert bench.blocks.num_free_blocks == NUM_BLOCKS


def test_more_sessions_than_a_run_takes_are_several_runs(loaded: LoadedModel) -> None:
    samplings = [replace(SAMPLED, seed=seed) for seed in range(19)]
    shape = shape_of((1, 1))
    expected, _ = rounds(drafter_of(loaded, num_blocks=800), samplings, [shape], 2)
    # Noise of one level at a time.
    with patch.object(static_growth, "NOISE_BYTES", 1):
        found, _ = rounds(drafter_of(loaded, Recorder(), num_blocks=800), samplings, [shape], 2)
    assert found == expected


def test_a_law_that_leaves_fewer_tokens_than_children_gives_the_same_smaller_tree(
    loaded: LoadedModel,
) -> None:
    sampling, shape = SamplingParams(temperature=0.8, top_k=2, seed=2), shape_of((3, 2, 3))
    expected, _ = rounds(drafter_of(loaded), [sampling], [shape])
    found, num_whole = rounds(drafter_of(loaded, Recorder()), [sampling], [shape])
    assert found == expected
    assert num_whole == 4
    assert len(found[0]) == 1 + 2 + 4 + 8


def differs(loaded: LoadedModel) -> bool:
    """Whether trees grown whole are not those of the levels."""
    samplings, shapes = [SAMPLED, GREEDY, CUT], [shape_of((2, 2, 2))]
    expected, _ = rounds(drafter_of(loaded), samplings, shapes)
    return rounds(drafter_of(loaded, Recorder()), samplings, shapes)[0] != expected


def test_negative_control_planted_bugs_are_noticed(loaded: LoadedModel) -> None:
    assert not differs(loaded)

    def of_the_position_before(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
        return gumbel_noise(seeds, positions - 1, vocab_size)

    with patch.object(static_growth, "gumbel_noise", of_the_position_before):
        assert differs(loaded)
    rows = TreePlan.level_rows

    def all_see_the_first(plan: TreePlan, depth: int) -> SequenceRows:
        level = rows(plan, depth)
        return replace(level, ancestors=tuple(seen | 1 for seen in level.ancestors))

    with patch.object(TreePlan, "level_rows", all_see_the_first):
        assert differs(loaded)
    # A replay that was not given its sessions.
    laid_out = dict[GrowthSizes, Tensor]()

    def first_ones(
        sizes: GrowthSizes, starts: Sequence[GrowthStart], scratch: ScratchBlocks
    ) -> Tensor:
        return laid_out.setdefault(sizes, lay_out(sizes, starts, scratch))

    with patch.object(static_growth, "lay_out", first_ones):
        assert differs(loaded)


def written_blocks(loaded: LoadedModel, capture: Capture | None) -> list[int]:
    """Blocks of sessions that have keys after a round of three of them."""
    bench = drafter_of(loaded, capture)
    rounds(bench, [SAMPLED] * 3, [shape_of((3, 2, 1))], 1)
    pool = bench.runner.pool[:, :, :NUM_BLOCKS]
    return [int(block) for block in pool.abs().sum((0, 1, 3, 4, 5)).nonzero()]


def test_padding_writes_into_blocks_that_no_session_can_have(loaded: LoadedModel) -> None:
    expected = written_blocks(loaded, None)
    assert written_blocks(loaded, Recorder()) == expected

    # Negative control: padding with blocks of the pool.
    def of_others(sizes: GrowthSizes, starts: Sequence[GrowthStart], _: ScratchBlocks) -> Tensor:
        return lay_out(sizes, starts, ScratchBlocks(NUM_BLOCKS - 40, BLOCK_SIZE))

    with patch.object(static_growth, "lay_out", of_others):
        assert written_blocks(loaded, Recorder()) != expected


def refuse_growths(step: Callable[[], None]) -> Callable[[], None]:
    """A device on which only single passes can be recorded."""
    return refuse(step) if isinstance(step, Growth) else Recorder()(step)


@pytest.mark.parametrize("capture", [refuse, refuse_growths])
def test_what_cannot_be_recorded_grows_level_by_level_and_is_told_once(
    loaded: LoadedModel, capture: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    shapes = [shape_of((2, 2, 2))]
    expected = rounds(drafter_of(loaded), [SAMPLED], shapes)
    with caplog.at_level(logging.WARNING):
        assert rounds(drafter_of(loaded, capture), [SAMPLED], shapes) == expected
    what = "whole trees" if capture is refuse_growths else "passes"
    assert [record.message for record in caplog.records] == [
        f"{what} are not recorded any more: this model asks the host"
    ]


def test_only_so_many_are_recorded(loaded: LoadedModel) -> None:
    shapes = [shape_of(widths) for widths in WIDTHS]
    expected, _ = rounds(drafter_of(loaded), [SAMPLED] * 3, shapes)
    bench = drafter_of(loaded, Recorder())
    with patch.object(bench.growths, "_most_growths", 2):
        assert rounds(bench, [SAMPLED] * 3, shapes)[0] == expected
    assert bench.growths is not None
    assert bench.growths.num_recorded == 2


@pytest.mark.parametrize(
    "shape",
    [
        ShapeQuery(13, 3, (2, 2, 2)),
        ShapeQuery(2, 1, (2, 2, 2)),
        ShapeQuery(8, 3, branch=2),
        ShapeQuery(40, 1, (3,)),
    ],
    ids=["too large", "one level", "best-first", "leaves alone"],
)
def test_other_shapes_grow_level_by_level(loaded: LoadedModel, shape: ShapeQuery) -> None:
    bench = drafter_of(loaded, Recorder())
    found, num_passes = rounds(bench, [SAMPLED], [shape])
    assert (found, num_passes) == rounds(drafter_of(loaded), [SAMPLED], [shape])
    assert bench.growths is not None
    assert bench.growths.num_recorded == 0


def test_what_is_short_of_time_grows_level_by_level_and_is_tried_again(
    loaded: LoadedModel,
) -> None:
    clock = Clock()

    def slow(step: Callable[[], None]) -> Callable[[], None]:
        def replay() -> None:
            clock.now += 3.0 if isinstance(step, Growth) else 0.0
            step()

        return replay

    bench = drafter_of(loaded, slow, clock=clock)
    shape, prompt = shape_of((2, 2, 2)), [7] * 9
    bench.drafter.open("a", 0, prompt, GREEDY)
    bench.work()
    passes = []
    for seconds in (math.inf, math.inf, 1.0, 1.0, 1.0):
        run = bench.propose("a", prompt, shape, known=9, deadline=clock.now + seconds)
        passes.append(bench.work())
        assert run.result(0).tree.num_draft_tokens == 14
    # The first one is recorded, which says nothing of the next. A level then takes 0.5 seconds, in
    # which half of one second is believed, and less each time that it was too much.
    assert passes == [1, 1, 3, 3, 1]


def test_what_is_short_of_room_grows_as_far_as_level_by_level(loaded: LoadedModel) -> None:
    trees = []
    for bench in (drafter_of(loaded), drafter_of(loaded, Recorder())):
        bench.drafter.open("a", 0, [7] * 9, GREEDY)
        bench.work()
        # The root's block has three slots more, enough for the first level of the inner six nodes.
        bench.blocks.allocate(bench.blocks.num_free_blocks - 1)
        run = bench.propose("a", [7] * 9, shape_of((2, 2, 2)), known=9)
        bench.work()
        trees.append(run.result(0).tree)
    assert trees[0] == trees[1]
    assert trees[0].num_draft_tokens == 6


def test_a_whole_tree_counts_as_one_pass_of_all_its_rows(loaded: LoadedModel) -> None:
    bench, registry = drafter_of(loaded, Recorder()), CollectorRegistry()
    bench.drafter.count_with(DraftMetrics(registry, INFO))
    bench.drafter.open("a", 0, [7, 8, 9], SAMPLED)
    bench.propose("a", [7, 8, 9], shape_of((3, 2, 1)), known=3)
    assert bench.work() == 1
    found = {sample.name: sample.value for one in registry.collect() for sample in one.samples}
    assert found["specinfer_step_rows_count"] == 1
    assert found["specinfer_step_rows_sum"] == 3 + 3 + 6


def test_nothing_waits_for_the_device(loaded: LoadedModel) -> None:
    """The path of a GPU, as the recorder there looks it through. Torch makes the noise there."""

    def watch(step: Callable[[], None]) -> Callable[[], None]:
        with RefuseWaits("cpu"):
            step()
        return step

    bench = drafter_of(loaded, watch)
    with patch.object(
        static_growth, "gumbel_noise", partial(reference.gumbel_noise, purpose=TARGET)
    ):
        found = rounds(bench, [SAMPLED, CUT], [shape_of((2, 2, 2))], 2)
    assert found[0] == rounds(drafter_of(loaded), [SAMPLED, CUT], [shape_of((2, 2, 2))], 2)[0]
    assert bench.growths is not None
    assert bench.growths.num_recorded == 2


def test_a_law_of_more_tokens_than_are_looked_at_grows_level_by_level(loaded: LoadedModel) -> None:
    wide = SamplingParams(temperature=1.5, top_p=0.9, seed=3)
    samplings, shapes = [wide, replace(wide, seed=4)], [shape_of((2, 2, 2))]
    expected, num_passes = rounds(drafter_of(loaded), samplings, shapes)
    for num_tokens, waited in ((VOCAB_SIZE - 1, 4), (20, num_passes)):
        with patch.object(static_growth, "TOP_P_TOKENS", num_tokens):
            assert rounds(drafter_of(loaded, Recorder()), samplings, shapes) == (expected, waited)


@pytest.mark.parametrize("top_p", [0.05, 0.6, 0.999])
def test_a_rows_cut_does_not_depend_on_its_neighbours(top_p: float) -> None:
    logits = torch.randn(5, 2000, generator=torch.Generator().manual_seed(3))
    # Rows that need few tokens among rows that need more than are looked at first.
    logits[1::2] *= 20.0
    cuts = Cuts(temperature=1.2, top_k=0, top_p=top_p, min_p=0.0)
    together = cut(logits, cuts)
    for row in range(len(logits)):
        assert torch.equal(cut(logits[row : row + 1], cuts)[0], together[row])
        assert torch.equal(cut_by_best(logits, cuts, 2000)[0][row], together[row])


def test_trees_of_more_than_64_inner_nodes_see_their_ancestors(loaded: LoadedModel) -> None:
    shape = shape_of((3, 5, 5, 1))
    expected, _ = rounds(drafter_of(loaded), [SAMPLED], [shape], 1)
    assert rounds(drafter_of(loaded, Recorder()), [SAMPLED], [shape], 1) == (expected, 1)
