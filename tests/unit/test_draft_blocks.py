"""The drafter's pool: too few blocks, shared prefixes, random walks without a leak."""

from __future__ import annotations

import random
from concurrent.futures import Future

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specinfer.errors import Cancelled, SpecinferError
from specinfer.messages import DraftResult, ShapeQuery
from specinfer.sampling import SamplingParams
from specinfer_draft.drafters.session import DraftSession
from tests.kit.draft_driver import GREEDY, Bench, Target, table_drafter

CHAIN = ShapeQuery(max_nodes=4, max_depth=4, widths=(1, 1, 1, 1))
BUSHY = ShapeQuery(max_nodes=12, max_depth=4, branch=4)


def prompt(index: int, length: int) -> list[int]:
    return [(index * 7 + place * 3) % 11 for place in range(length)]


def test_an_idle_session_gives_its_blocks_up_and_computes_them_again() -> None:
    bench = table_drafter(num_blocks=8)  # 32 slots
    for index in range(2):
        bench.drafter.open(f"s{index}", 0, prompt(index, 20), GREEDY)
        bench.tree(f"s{index}", 20, shape=CHAIN)
    tree = bench.tree("s0", 20, [5], shape=CHAIN)
    assert tree == bench.fresh_tree([*prompt(0, 20), 5], GREEDY, CHAIN, 20)


def test_the_least_recently_used_gives_first() -> None:
    bench = table_drafter(num_blocks=16)  # 64 slots: three sessions of 20 and a bit
    for index in range(3):
        bench.drafter.open(f"s{index}", 0, prompt(index, 17), GREEDY)
        bench.tree(f"s{index}", 17, shape=CHAIN)
    bench.tree("s0", 17, shape=CHAIN)
    bench.drafter.open("s3", 0, prompt(3, 17), GREEDY)
    bench.tree("s3", 17, shape=CHAIN)
    before = bench.runner.num_passes
    for session_id in ("s0", "s2", "s3"):
        bench.tree(session_id, 17, shape=CHAIN)
    assert bench.runner.num_passes - before == 3 * 4
    assert max(bench.runner.num_rows[before:]) == 1


def test_proposals_that_do_not_fit_together_are_served_one_after_the_other() -> None:
    bench = table_drafter(num_blocks=7)  # 28 slots, each session takes 24
    futures = []
    for index in range(4):
        bench.drafter.open(f"s{index}", 0, prompt(index, 20), GREEDY)
        futures.append(bench.propose(f"s{index}", 20, shape=CHAIN))
    bench.work()
    for index, future in enumerate(futures):
        expected = bench.fresh_tree(prompt(index, 20), GREEDY, CHAIN, 20)
        assert future.result(0).tree == expected


def test_a_proposal_that_can_never_fit_ends_with_what_fits() -> None:
    bench = table_drafter(num_blocks=5)  # 20 slots
    bench.drafter.open("a", 0, prompt(0, 18), GREEDY)
    tree = bench.tree("a", 18, shape=CHAIN)
    # Two slots are left for drafted nodes, and the leaf below them needs none.
    assert tree.max_depth == 3
    bench.drafter.open("b", 0, prompt(1, 30), GREEDY)
    assert bench.tree("b", 30, shape=CHAIN).num_draft_tokens == 0
    assert bench.tree("a", 18, shape=CHAIN) == tree


def test_two_sessions_share_the_blocks_of_their_common_prompt() -> None:
    bench = table_drafter()
    tokens = prompt(0, 33)
    for session_id in ("a", "b"):
        bench.drafter.open(session_id, 0, tokens, GREEDY)
        bench.work()
    # Eight full blocks are shared; only the root is left to compute, in either session.
    assert bench.runner.num_rows == [32]
    first = bench.tree("a", 33, [1, 2], shape=BUSHY)
    second = bench.tree("b", 33, [1, 3], shape=BUSHY)
    assert first == bench.fresh_tree([*tokens, 1, 2], GREEDY, BUSHY, 33)
    assert second == bench.fresh_tree([*tokens, 1, 3], GREEDY, BUSHY, 33)
    # Going back into the shared blocks copies before it writes.
    assert bench.tree("a", 30, [9, 9], shape=BUSHY) == bench.fresh_tree(
        [*tokens[:30], 9, 9], GREEDY, BUSHY, 30
    )
    assert bench.tree("b", 35, shape=BUSHY) == second


def test_background_prompts_never_fight_for_blocks() -> None:
    """Idle sessions that cannot all be held leave the engine idle, too."""
    bench = table_drafter(num_blocks=6)
    for index in range(5):
        bench.drafter.open(f"s{index}", 0, prompt(index, 20), GREEDY)
    assert bench.work() < 40
    assert not bench.drafter.run_pass()


class Walk:
    """Sessions that come, go, advance, fall back and are cut off, in random order."""

    def __init__(self, seed: int, num_blocks: int) -> None:
        self.rng = random.Random(seed)
        self.bench: Bench = table_drafter(
            num_blocks=num_blocks, max_sessions=4, prefill_rows=4, ahead=seed % 2 == 1
        )
        self.targets: dict[str, Target] = {}
        self.epochs: dict[str, int] = {}
        self.num_compared = 0
        self.waiting: list[tuple[str, list[int], ShapeQuery, Future[DraftResult]]] = []
        for _ in range(6):
            self.open()

    def open(self) -> None:
        session_id = f"s{self.rng.randrange(6)}"
        sampling = self.rng.choice([GREEDY, SamplingParams(temperature=1.0, seed=3)])
        tokens = prompt(self.rng.randrange(3), self.rng.randrange(1, 30))
        self.bench.drafter.open(session_id, 0, tokens, sampling)
        self.targets[session_id] = Target(self.bench.model, sampling, tokens)
        self.epochs[session_id] = 0

    def propose(self) -> None:
        if not self.targets:
            return
        session_id, target = self.rng.choice(sorted(self.targets.items()))
        known_len = self.rng.randrange(target.num_prompt, len(target.tokens) + 1)
        shape = self.rng.choice([CHAIN, BUSHY, ShapeQuery(6, 3, (2, 2))])
        new = target.tokens[known_len:]
        future = self.bench.propose(
            session_id, known_len, new, shape=shape, epoch=self.epochs[session_id]
        )
        self.waiting.append((session_id, list(target.tokens), shape, future))

    def answer(self) -> None:
        """Check every answer that is there, and let its session go on."""
        for item in [item for item in self.waiting if item[3].done()]:
            self.waiting.remove(item)
            session_id, tokens, shape, future = item
            target = self.targets.get(session_id)
            if isinstance(future.exception(0), Cancelled) or target is None:
                continue
            tree = future.result(0).tree
            whole = self.bench.fresh_tree(tokens, target.sampling, shape, target.num_prompt)
            assert tree == whole
            self.num_compared += 1
            if target.tokens == tokens and len(tokens) < 40:
                target.commit(tree)
                self.epochs[session_id] += 1

    def close(self) -> None:
        session_id = f"s{self.rng.randrange(6)}"
        self.bench.drafter.close(session_id)
        self.targets.pop(session_id, None)

    def run(self) -> None:
        self.bench.drafter.run_pass()
        self.answer()

    def step(self) -> None:
        actions = (self.open, self.close, self.propose, self.run)
        (action,) = self.rng.choices(actions, (4, 1, 40, 55))
        try:
            action()
        except SpecinferError as error:
            # An unknown session was evicted, a busy drafter takes no more: both are answers.
            if error.reason not in ("NOT_FOUND", "RESOURCE_EXHAUSTED", "STALE_EPOCH"):
                raise

    def end(self) -> None:
        self.bench.work()
        self.answer()
        assert not self.waiting
        for index in range(6):
            self.bench.drafter.close(f"s{index}")
        blocks = self.bench.blocks
        assert blocks.num_free_blocks == blocks.num_blocks
        blocks.drop_cache()
        assert blocks.num_cached_blocks == 0


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**9), num_blocks=st.sampled_from([15, 20, 80]))
def test_random_walks_give_fresh_trees_and_lose_no_block(seed: int, num_blocks: int) -> None:
    walk = Walk(seed, num_blocks)
    for _ in range(150):
        walk.step()
    walk.end()
    assert walk.num_compared > 5


@pytest.mark.parametrize("seed", range(3))
def test_a_walk_in_a_pool_for_one_session_takes_blocks_from_growing_trees(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_restarts = [0]
    give_up = DraftSession.give_up_blocks

    def counted(session: DraftSession) -> None:
        num_restarts[0] += session.growth is not None
        give_up(session)

    monkeypatch.setattr(DraftSession, "give_up_blocks", counted)
    walk = Walk(seed, 15)
    for _ in range(400):
        walk.step()
    walk.end()
    assert walk.num_compared > 20
    assert num_restarts[0] > 0
