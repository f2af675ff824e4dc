"""The model drafter over table models: agreement, rollback, shared passes, deadlines, bounds."""

from __future__ import annotations

import random

import pytest
import torch

from specinfer.errors import Cancelled, InvalidRequest, NotFound, ResourceExhausted, StaleEpoch
from specinfer.messages import ShapeQuery
from specinfer.sampling import SamplingParams
from specinfer.tree import TokenTree
from specinfer_draft.drafters.limits import DrafterLimits
from specinfer_draft.grow import Thrift
from specinfer_kernels import gumbel_noise
from tests.kit.draft_driver import GREEDY, SHAPE, Bench, Target, table_drafter
from tests.kit.table_models import TableModel

PROMPT = [1, 2, 3, 4, 5, 6, 7]
CHAIN = ShapeQuery(max_nodes=4, max_depth=4, widths=(1, 1, 1, 1))
SAMPLINGS = [
    GREEDY,
    SamplingParams(temperature=0.8, seed=11),
    SamplingParams(temperature=1.5, top_p=0.8, top_k=6, seed=12),
    SamplingParams(temperature=1.0, repetition_penalty=1.5, frequency_penalty=0.5, seed=13),
]
IDS = ["greedy", "sampled", "cut", "penalised"]


@pytest.fixture
def bench() -> Bench:
    built = table_drafter()
    built.drafter.open("a", 0, PROMPT, GREEDY)
    return built


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=IDS)
@pytest.mark.parametrize("shape", [CHAIN, SHAPE], ids=["chain", "best-first"])
def test_a_drafter_that_is_the_target_is_always_right(
    sampling: SamplingParams, shape: ShapeQuery
) -> None:
    """Shared noise: the tree holds the target's path, level after level, sampled or not."""
    bench = table_drafter()
    target = Target(bench.model, sampling, list(PROMPT))
    bench.drafter.open("a", 0, PROMPT, sampling)
    known, new = len(PROMPT), list[int]()
    for epoch in range(12):
        tree = bench.tree("a", known, new, shape=shape, epoch=epoch)
        known = len(target.tokens)
        new = target.commit(tree)
        depth = 4 if shape is CHAIN else tree.max_depth
        assert len(new) == (depth + 1 if shape is CHAIN else len(new))
        assert len(new) >= 2
    assert len(target.tokens) > len(PROMPT) + 24


@pytest.mark.parametrize(
    "shape", [ShapeQuery(12, 5, (2, 2, 2)), ShapeQuery(16, 5, (), 3)], ids=["widths", "best-first"]
)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_every_node_has_the_score_of_its_own_path(shape: ShapeQuery, temperature: float) -> None:
    """Every row of every wave saw its ancestors and nothing else, at its own position."""
    sampling = SamplingParams(temperature=temperature, seed=21)
    bench = table_drafter()
    bench.drafter.open("a", 0, PROMPT, sampling)
    tree = bench.tree("a", len(PROMPT), [8, 9], shape=shape)
    tokens = [*PROMPT, 8, 9]
    assert len(tree) > 12
    for node in range(1, len(tree)):
        path = tree.path_token_ids(node)[1:]
        score = 0.0
        for depth, token_id in enumerate(path):
            z = bench.model.logits([*tokens, *path[:depth]]).double()
            position = torch.tensor([len(tokens) + depth])
            z = z + temperature * gumbel_noise(torch.tensor([21]), position, 11)[0]
            score += float(torch.log_softmax(z, 0)[token_id])
        assert tree.scores[node] == pytest.approx(score, abs=1e-4)


def test_without_the_right_noise_a_drafter_is_often_wrong() -> None:
    """Negative control: the same model with another seed loses most of its guesses."""
    bench = table_drafter()
    target = Target(bench.model, SamplingParams(temperature=2.0, seed=1), list(PROMPT))
    bench.drafter.open("a", 0, PROMPT, SamplingParams(temperature=2.0, seed=2))
    known, new, num_accepted = len(PROMPT), list[int](), 0
    for epoch in range(12):
        tree = bench.tree("a", known, new, shape=CHAIN, epoch=epoch)
        known = len(target.tokens)
        new = target.commit(tree)
        num_accepted += len(new) - 1
    assert num_accepted < 24


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=IDS)
def test_after_any_accepted_prefix_the_next_tree_is_a_fresh_sessions(
    sampling: SamplingParams,
) -> None:
    rng = random.Random(5)
    bench = table_drafter()
    bench.drafter.open("a", 0, PROMPT, sampling)
    tokens, known, new = list(PROMPT), len(PROMPT), list[int]()
    for epoch in range(30):
        shape = rng.choice([CHAIN, SHAPE, ShapeQuery(12, 5, (2, 2, 1))])
        tree = bench.tree("a", known, new, shape=shape, epoch=epoch)
        assert tree == bench.fresh_tree(tokens, sampling, shape, len(PROMPT))
        node = rng.randrange(len(tree))
        known, new = len(tokens), [*tree.path_token_ids(node)[1:], rng.randrange(11)]
        tokens += new
        if rng.random() < 0.2:
            # A drafter that missed a round hears of both at once, and one that was told too much
            # is taken back.
            bench.tree("a", known, [*new, 1, 2], epoch=epoch)
    assert bench.runner.num_passes < 30 * 8


@pytest.mark.parametrize("known_len", [1, 3, 7])
def test_tokens_beyond_the_known_ones_are_dropped(bench: Bench, known_len: int) -> None:
    bench.tree("a", 7, [8, 9, 10])
    tree = bench.tree("a", known_len, [9, 1])
    assert tree == bench.fresh_tree([*PROMPT[:known_len], 9, 1], GREEDY, SHAPE, known_len)


def test_a_repeated_proposal_gets_the_same_tree_in_as_many_passes(bench: Bench) -> None:
    first = bench.tree("a", 7, [8, 9])
    num_passes = bench.runner.num_passes
    assert bench.tree("a", 7, [8, 9]) == first
    assert bench.tree("a", 9) == first
    assert bench.runner.num_passes == 3 * num_passes


def test_a_level_costs_one_pass_and_accepted_tokens_none(bench: Bench) -> None:
    bench.work()
    target = Target(bench.model, GREEDY, list(PROMPT))
    known, new = len(PROMPT), list[int]()
    for epoch in range(5):
        before = bench.runner.num_passes
        tree = bench.tree("a", known, new, shape=CHAIN, epoch=epoch)
        assert bench.runner.num_passes - before == 4
        known, new = len(target.tokens), target.commit(tree)


def test_sessions_that_grow_together_share_their_passes() -> None:
    bench = table_drafter()
    prompts = [[n, n + 1, n + 2] for n in range(6)]
    for index, prompt in enumerate(prompts):
        bench.drafter.open(f"s{index}", 0, prompt, GREEDY)
    bench.work()
    futures = [bench.propose(f"s{index}", 3, shape=CHAIN) for index in range(3)]
    before = bench.runner.num_passes
    assert bench.drafter.run_pass()
    futures += [bench.propose(f"s{index}", 3, shape=CHAIN) for index in range(3, 6)]
    bench.work()
    # The late ones join at the second pass and end one pass after the others.
    assert bench.runner.num_passes - before == 5
    for prompt, future in zip(prompts, futures, strict=True):
        assert future.result(0).tree == bench.fresh_tree(prompt, GREEDY, CHAIN, 3)


def test_a_long_prompt_does_not_stop_the_trees_of_others() -> None:
    bench = table_drafter(prefill_rows=8, max_rows=32)
    bench.drafter.open("short", 0, [1, 2], GREEDY)
    bench.work()
    bench.drafter.open("long", 0, [n % 11 for n in range(150)], GREEDY)
    late = bench.propose("long", 150, shape=CHAIN)
    for length, new in ((2, []), (2, [3]), (3, [4])):
        early = bench.propose("short", length, new, shape=CHAIN)
        for _ in range(4):
            assert not early.done()
            assert bench.drafter.run_pass()
        assert early.done()
    assert not late.done()
    assert max(bench.runner.num_rows[1:13]) <= 8 + 2
    bench.work()
    tokens = [n % 11 for n in range(150)]
    assert late.result(0).tree == bench.fresh_tree(tokens, GREEDY, CHAIN, 150)


def test_a_prompt_is_computed_before_anybody_asks(bench: Bench) -> None:
    assert bench.work() == 1
    assert bench.runner.num_rows == [len(PROMPT) - 1]
    bench.tree("a", 7)
    assert bench.runner.num_rows[1] == 1


def test_at_the_deadline_what_is_there_is_the_answer(bench: Bench) -> None:
    for num_passes in range(4):
        future = bench.propose("a", 7, shape=CHAIN, deadline=bench.clock.now + 1.0)
        for _ in range(num_passes):
            bench.drafter.run_pass()
        bench.clock.now += 2.0
        assert bench.drafter.run_pass()
        assert future.result(0).tree.max_depth == num_passes
    future = bench.propose("a", 7, shape=CHAIN, deadline=bench.clock.now + 1.0)
    bench.work()
    assert future.result(0).tree.max_depth == 4


def test_a_pass_that_would_end_too_late_is_not_begun() -> None:
    bench = table_drafter()
    bench.drafter.open("a", 0, PROMPT, GREEDY)
    bench.work()

    def slow(rows):  # type: ignore[no-untyped-def]
        bench.clock.now += 1.0
        return forward(rows)

    forward, bench.runner.forward = bench.runner.forward, slow  # type: ignore[method-assign]
    bench.tree("a", 7, shape=CHAIN)
    future = bench.propose("a", 7, shape=CHAIN, deadline=bench.clock.now + 2.5)
    bench.work()
    assert future.result(0).tree.max_depth == 2
    # One slow pass is not held against the drafter for ever.
    bench.runner.forward = forward  # type: ignore[method-assign]
    depths = []
    for _ in range(20):
        future = bench.propose("a", 7, shape=CHAIN, deadline=bench.clock.now + 0.1)
        bench.work()
        depths.append(future.result(0).tree.max_depth)
    assert depths[-1] == 4


def test_seconds_are_reported(bench: Bench) -> None:
    forward = bench.runner.forward

    def slow(rows):  # type: ignore[no-untyped-def]
        bench.clock.now += 0.25
        return forward(rows)

    bench.runner.forward = slow  # type: ignore[method-assign]
    future = bench.propose("a", 7, shape=CHAIN)
    bench.clock.now += 3.0
    bench.work()
    result = future.result(0)
    assert (result.queue_seconds, result.compute_seconds) == (3.0, 1.0)


def test_an_answered_proposal_keeps_no_scratch_slot(bench: Bench) -> None:
    for length in range(7, 12):
        bench.tree("a", length, [1])
        assert bench.blocks.num_blocks - bench.blocks.num_free_blocks == -(-(length + 1) // 4)


def test_no_nodes_or_no_depth_is_the_root_without_a_pass(bench: Bench) -> None:
    for shape in (ShapeQuery(max_nodes=0), ShapeQuery(max_depth=0), ShapeQuery(0, 4, (2,))):
        future = bench.propose("a", 7, [8], shape=shape)
        assert future.result(0).tree == TokenTree((8,), (-1,), (), (0.0,))
    assert bench.runner.num_passes == 0


def test_the_workers_tree_size_and_the_models_length_bound_a_tree() -> None:
    bench = table_drafter(max_tree_nodes=4, max_model_len=9)
    bench.drafter.open("a", 0, PROMPT, GREEDY)
    assert len(bench.tree("a", 7, shape=ShapeQuery(20, 8, (), 3))) == 4
    # Seven tokens: nodes at depths 1 and 2 stand at positions 7 and 8, depth 3 needs no position.
    assert bench.tree("a", 7, shape=ShapeQuery(20, 8, (1,) * 8)).max_depth == 3
    assert bench.tree("a", 7, [1, 2], shape=ShapeQuery(20, 8, (1,) * 8)).max_depth == 1
    with pytest.raises(InvalidRequest):
        bench.propose("a", 9, [3, 4])


def test_what_is_not_known_or_too_old_is_a_typed_error(bench: Bench) -> None:
    with pytest.raises(NotFound):
        bench.propose("nobody", 1)
    with pytest.raises(StaleEpoch, match="holds 7 tokens"):
        bench.propose("a", 8, [1])
    bench.tree("a", 7, [8], epoch=3)
    with pytest.raises(StaleEpoch, match="epoch 3"):
        bench.propose("a", 7, epoch=2)
    with pytest.raises(InvalidRequest):
        bench.propose("a", 0, epoch=3)
    with pytest.raises(InvalidRequest, match="vocabulary"):
        bench.propose("a", 8, [11], epoch=3)
    with pytest.raises(InvalidRequest, match="max_nodes"):
        bench.propose("a", 8, shape=ShapeQuery(max_nodes=5000), epoch=3)
    assert bench.tree("a", 8, epoch=3).num_draft_tokens == 8


@pytest.mark.parametrize(
    ("session_id", "tokens", "sampling"),
    [
        ("b", [], GREEDY),
        ("b", [1, 11], GREEDY),
        ("b", [-1], GREEDY),
        ("b", [1] * 201, GREEDY),
        ("", [1], GREEDY),
        ("b" * 257, [1], GREEDY),
        ("b", [1], SamplingParams(logit_bias={11: 1.0})),
    ],
    ids=["empty", "too large", "negative", "too long", "no id", "long id", "bias"],
)
def test_a_session_that_does_not_fit_the_model_is_refused_and_harms_nobody(
    bench: Bench, session_id: str, tokens: list[int], sampling: SamplingParams
) -> None:
    with pytest.raises(InvalidRequest):
        bench.drafter.open(session_id, 0, tokens, sampling)
    assert bench.drafter.num_sessions == 1
    assert bench.tree("a", 7).num_draft_tokens == 8


def test_a_newer_proposal_a_close_and_an_open_answer_the_one_before(bench: Bench) -> None:
    first = bench.propose("a", 7)
    second = bench.propose("a", 7, [8])
    bench.drafter.run_pass()
    bench.drafter.open("a", 0, PROMPT, GREEDY)
    third = bench.propose("a", 7)
    bench.drafter.close("a")
    for future in (first, second, third):
        with pytest.raises(Cancelled):
            future.result(0)
    assert not bench.drafter.run_pass()
    assert bench.blocks.num_free_blocks == 64
    bench.drafter.close("a")


def test_an_item_that_comes_late_answers_itself_and_harms_nobody(bench: Bench) -> None:
    """Negative control for epochs at the drafter: a late item neither cancels nor rewinds."""
    live = bench.propose("a", 7, epoch=4)
    with pytest.raises(StaleEpoch):
        bench.propose("a", 7, epoch=2)
    while bench.drafter.run_pass():
        pass
    assert live.result(0).tree.num_draft_tokens == 8
    with pytest.raises(StaleEpoch):
        bench.drafter.open("a", 3, PROMPT, GREEDY)
    assert bench.drafter.num_sessions == 1


def test_the_least_recently_used_session_makes_place() -> None:
    bench = table_drafter(max_sessions=2)
    for session_id in ("a", "b"):
        bench.drafter.open(session_id, 0, PROMPT, GREEDY)
    bench.tree("a", 7)
    bench.drafter.open("c", 0, PROMPT, GREEDY)
    with pytest.raises(NotFound):
        bench.propose("b", 7)
    bench.propose("a", 7)
    bench.propose("c", 7)
    with pytest.raises(ResourceExhausted):
        bench.drafter.open("d", 0, PROMPT, GREEDY)
    bench.drafter.open("a", 0, PROMPT, GREEDY)
    assert bench.drafter.num_sessions == 2


@pytest.mark.parametrize(
    "limits",
    [
        {"max_tree_nodes": 0},
        {"max_tree_nodes": 600, "max_rows": 500},
        {"max_sessions": 0},
        {"prefill_rows": 0},
        {"spread": 0.0},
    ],
    ids=str,
)
def test_limits_that_make_no_sense_are_refused(limits: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest):
        DrafterLimits(vocab_size=5, max_model_len=10, **limits)  # type: ignore[arg-type]


def test_thrift_makes_trees_smaller_and_passes_fewer() -> None:
    model = TableModel(11)
    sizes, passes = [], []
    for thrift in (Thrift(), Thrift(score_floor=-1.5), Thrift(least_reach=0.6)):
        built = table_drafter(model=model, thrift=thrift)
        built.drafter.open("a", 0, PROMPT, GREEDY)
        sizes.append(len(built.tree("a", 7, shape=ShapeQuery(20, 6, (), 4))))
        passes.append(built.runner.num_passes)
    assert sizes[0] == 21
    assert 1 < sizes[1] < 15
    assert 1 < sizes[2] <= 21
    assert max(passes[1:]) < passes[0]
