"""Rounds that are counted many at a time show what rounds counted one by one would."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
from prometheus_client import CollectorRegistry

from specinfer.messages import RoundFacts
from specinfer.metrics import RouterMetrics, expose
from specinfer.metrics.round_counts import MAX_KEPT
from specinfer.tree import TokenTree

TREES = (TokenTree.chain(range(5)), TokenTree((1, 2, 3, 4), (-1, 0, 0, 1)))
NAMES = ("spec_decode", "tree_", "round", "tokens", "drafter", "wasted")


class Counted:
    """A router's metrics, fed the same rounds for the same seed."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.metrics = RouterMetrics(self.registry, "tiny")
        self.metrics.watch_wasted(dict)

    def round(self, chance: random.Random) -> None:
        """One round; all its seconds are sums of powers of two, which add up in any order."""
        tree = chance.choice((None, *TREES))
        num_draft = 0 if tree is None else tree.num_draft_tokens
        accepted = () if tree is None else tree.path(chance.randrange(len(tree)))[1:]
        reason = "" if num_draft else chance.choice(("budget", "deadline"))
        one, two, three, four = (chance.randrange(1, 4096) / 1024 for _ in range(4))
        depth = 0 if tree is None else tree.max_depth
        facts = RoundFacts(
            1, num_draft, len(accepted), reason, one, two, three, four, two, one, depth
        )
        self.metrics.observe_round(facts, len(accepted) + 1)
        if tree is not None:
            worker = chance.choice("ab")
            self.metrics.observe_tree(tree, accepted, num_draft_nodes=3, drafter="d", worker=worker)

    def shown(self) -> list[str]:
        """What is exposed of rounds."""
        lines = expose(self.registry, "")[0].decode().splitlines()
        return sorted(line for line in lines if any(name in line for name in NAMES))


def test_a_batch_counts_as_its_rounds_do_one_by_one() -> None:
    together, alone = Counted(), Counted()
    chances = random.Random(5), random.Random(5)
    for _ in range(3 * MAX_KEPT + 7):
        together.round(chances[0])
        alone.round(chances[1])
        alone.shown()
    assert together.shown() == alone.shown()
    # The comparison sees a single round more.
    alone.round(chances[1])
    assert together.shown() != alone.shown()


@pytest.mark.parametrize("threads", [1, 4])
def test_nothing_is_missing_whoever_looks_and_whenever(threads: int) -> None:
    counted, chance = Counted(), random.Random(7)
    name = "specinfer_tokens_per_round_count"

    def looked() -> float:
        return counted.registry.get_sample_value(name, {"model_name": "tiny"}) or 0.0

    with ThreadPoolExecutor(threads) as pool:
        looks = []
        for _ in range(500):
            counted.round(chance)
            looks.append(pool.submit(looked))
        found = [look.result() for look in looks]
    assert all(at < found[at] <= 500 for at in range(500))
    assert looked() == 500
    if threads == 1:
        assert all(before <= after for before, after in pairwise(found))
