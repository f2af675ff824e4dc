"""Drafting ahead: the same trees in fewer passes, and nothing held or believed that is wrong."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from specinfer.messages import ShapeQuery
from specinfer.metrics import DraftMetrics
from specinfer.sampling import SamplingParams
from specinfer.tree import TokenTree
from specinfer_draft.drafters.ahead import likely_path
from specinfer_draft.drafters.search import TreeSearch
from tests.kit.draft_driver import GREEDY, Bench, Target, table_drafter
from tests.kit.draft_service import INFO

CHAIN = ShapeQuery(max_nodes=4, max_depth=4, widths=(1, 1, 1, 1))
WIDE = ShapeQuery(max_nodes=14, max_depth=3, widths=(2, 2, 2))
BUSHY = ShapeQuery(max_nodes=12, max_depth=4, branch=4)
SAMPLED = SamplingParams(temperature=0.9, seed=5)
PENALISED = SamplingParams(temperature=0.7, seed=5, frequency_penalty=0.4, repetition_penalty=1.2)
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def rounds(
    bench: Bench, sampling: SamplingParams, shape: ShapeQuery, num_rounds: int = 12
) -> tuple[list[TokenTree], list[int], int]:
    """The trees and tokens of a session's rounds, and the passes that its proposals waited for."""
    target = Target(bench.model, sampling, list(PROMPT))
    bench.drafter.open("a", 0, PROMPT, sampling)
    bench.work()
    trees, known, waited = [], len(PROMPT), 0
    for epoch in range(num_rounds):
        future = bench.propose("a", known, target.tokens[known:], shape=shape, epoch=epoch)
        while not future.done():
            assert bench.drafter.run_pass()
            waited += 1
        known = len(target.tokens)
        trees.append(future.result(0).tree)
        target.commit(trees[-1])
        bench.work()  # as long as the verifier takes
    return trees, target.tokens, waited


@pytest.mark.parametrize("shape", [CHAIN, WIDE, BUSHY], ids=["chain", "wide", "bushy"])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, PENALISED], ids=["0", "0.9", "penalised"])
def test_the_trees_are_the_same_and_wait_for_fewer_passes(
    shape: ShapeQuery, sampling: SamplingParams
) -> None:
    plain = rounds(table_drafter(), sampling, shape)
    ahead = rounds(table_drafter(ahead=True), sampling, shape)
    assert ahead[:2] == plain[:2]
    assert ahead[2] < plain[2]


def test_a_chain_that_is_foreseen_waits_for_no_pass() -> None:
    _, _, waited = rounds(table_drafter(ahead=True), GREEDY, CHAIN, 6)
    assert waited == 4, "those of the first tree"


def test_what_was_not_foreseen_gives_the_tree_of_a_fresh_drafter() -> None:
    bench = table_drafter(ahead=True)
    bench.drafter.open("a", 0, PROMPT, GREEDY)
    tree = bench.tree("a", len(PROMPT), shape=BUSHY)
    path, _ = likely_path(tree)
    told = list(PROMPT)
    likely = bench.fresh_tree([*PROMPT, *path], GREEDY, CHAIN, len(PROMPT)).token_ids[1]
    unlikely = next(token for token in range(11) if token not in (likely, path[0]))
    for new in ([unlikely], [path[0], unlikely], [*path[:2], 7, 7, 7], [*path, unlikely]):
        bench.tree("a", len(told), shape=BUSHY)
        told += new
        found = bench.tree("a", len(told) - len(new), new, shape=BUSHY)
        assert found == bench.fresh_tree(told, GREEDY, BUSHY, len(PROMPT))
    del told[len(PROMPT) + 1 :]
    found = bench.tree("a", len(told), shape=BUSHY)
    assert found == bench.fresh_tree(told, GREEDY, BUSHY, len(PROMPT))


def test_a_search_that_is_continued_at_the_wrong_node_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Negative control: the tests above can tell one node from its neighbour."""
    find = TreeSearch.find

    def wrong(self: TreeSearch, token_ids: list[int]) -> int | None:
        node = find(self, token_ids)
        others = [other for other in sorted(self._looked) if other not in (0, node)]
        return node if node is None or not others else others[0]

    plain = rounds(table_drafter(), SAMPLED, BUSHY)
    monkeypatch.setattr(TreeSearch, "find", wrong)
    ahead = rounds(table_drafter(ahead=True), SAMPLED, BUSHY)
    assert ahead[0] != plain[0]


def test_a_proposal_comes_first_and_ahead_is_gone_on_with_afterwards() -> None:
    bench = table_drafter(ahead=True)
    for session_id in ("a", "b"):
        bench.drafter.open(session_id, 0, PROMPT, GREEDY)
    bench.work()
    first = bench.propose("a", len(PROMPT), shape=CHAIN)
    while not first.done():
        bench.drafter.run_pass()
    assert bench.drafter.run_pass(), "a's next tree is begun"
    second = bench.propose("b", len(PROMPT), shape=CHAIN)
    before = bench.runner.num_passes
    while not second.done():
        bench.drafter.run_pass()
    assert bench.runner.num_passes - before == 4
    assert bench.runner.num_rows[before:] == [1, 1, 1, 1], "b's rows alone"
    assert bench.work() == 5, "the rest of a's together with b's, and no more"
    assert not bench.drafter.run_pass()


def test_a_session_is_not_taken_to_hold_what_was_only_foreseen() -> None:
    bench = table_drafter(ahead=True)
    bench.drafter.open("a", 0, PROMPT, GREEDY)
    bench.tree("a", len(PROMPT), shape=CHAIN)
    assert len(bench.drafter._planner.sessions["a"].state) > len(PROMPT)
    with pytest.raises(Exception, match="open it again"):
        bench.propose("a", len(PROMPT) + 1)


def test_nothing_is_held_when_the_session_is_closed() -> None:
    bench = table_drafter(ahead=True)
    free = bench.blocks.num_free_blocks
    bench.drafter.open("a", 0, PROMPT, GREEDY)
    bench.tree("a", len(PROMPT), shape=BUSHY)
    bench.drafter.close("a")
    assert not bench.drafter.run_pass()
    assert bench.blocks.num_free_blocks == free


@pytest.mark.parametrize("num_blocks", [5, 6, 8])
def test_a_small_pool_gives_up_what_went_ahead_first(num_blocks: int) -> None:
    bench = table_drafter(ahead=True, num_blocks=num_blocks)
    for turn in range(4):
        for session_id, prompt in (("a", PROMPT), ("b", PROMPT[::-1])):
            if turn == 0:
                bench.drafter.open(session_id, 0, prompt, GREEDY)
            tree = bench.tree(session_id, len(prompt), shape=CHAIN)
            assert tree == bench.fresh_tree(prompt, GREEDY, CHAIN, len(prompt))


def test_work_ahead_and_its_use_are_counted() -> None:
    bench, registry = table_drafter(ahead=True), CollectorRegistry()
    bench.drafter.count_with(DraftMetrics(registry, INFO))
    rounds(bench, SAMPLED, BUSHY)

    def count(name: str, **labels: str) -> float:
        labels |= {"model_name": INFO.model_name}
        return sum(
            sample.value
            for family in registry.collect()
            for sample in family.samples
            if sample.name == f"specinfer_{name}_total" and labels.items() <= sample.labels.items()
        )

    # All but the first of twelve trees were begun ahead, when their tokens were not known yet.
    hits, misses = (count("ahead_trees", outcome=name) for name in ("hit", "miss"))
    assert (hits + misses, hits > 0, misses > 0) == (11, True, True)
    assert count("ahead_rows") >= count("ahead_passes") > 0
