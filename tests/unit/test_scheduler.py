"""The scheduler: order, budgets, fairness between trees and prefill, preemption by age."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from specinfer.sampling import SamplingParams
from specinfer.tree import TokenTree
from specinfer_engine.blocks import BlockManager
from specinfer_engine.sequence import SequenceState
from specinfer_verify.scheduler import ScheduledRows, Scheduler
from specinfer_verify.session import PendingStep, Session, fit_tree

NOW = 100.0


def make_scheduler(
    num_blocks: int = 100, *, max_rows: int = 32, min_prefill_rows: int = 8
) -> Scheduler:
    return Scheduler(
        BlockManager(num_blocks, 4),
        max_rows=max_rows,
        min_prefill_rows=min_prefill_rows,
        yield_seconds=1.0,
        starve_seconds=5.0,
    )


def add(scheduler: Scheduler, name: str, length: int, *, cached: bool = False) -> Session:
    """Open a session of `length` tokens that nobody else has; `cached` computes its prefix."""
    age = len(scheduler.sessions) + 1
    tokens = [1000 * age + index for index in range(length)]
    session = Session(
        session_id=name,
        age=age,
        epoch=0,
        sampling=SamplingParams(),
        num_prompt_tokens=length,
        num_logprobs=None,
        state=SequenceState(scheduler.blocks, tokens),
        last_active=NOW,
    )
    scheduler.add(session)
    if cached:
        session.state.reserve(length - 1)
        session.state.commit(range(length - 1))
    return session


def ask(session: Session, num_nodes: int = 1, arrival: float = NOW) -> None:
    """Let a tree wait for the session."""
    tree = TokenTree.chain([session.state.token_ids[-1], *range(num_nodes - 1)])
    future: Future[object] = Future()
    kept = tuple(range(num_nodes))
    session.pending = PendingStep(tree, tree, kept, arrival, [future])  # type: ignore[list-item]


def plan(scheduler: Scheduler, now: float = NOW) -> dict[str, tuple[int, int]]:
    """Rows of the next pass: session -> (rows of its chunk, nodes of its tree)."""
    return {
        item.session.session_id: (item.num_chunk, len(item.tree) if item.tree else 0)
        for item in scheduler.schedule(now)
    }


def finish(items: list[ScheduledRows]) -> None:
    """Commit what a pass computed, as if every walk ended at its root."""
    for item in items:
        if item.tree is None:
            item.session.state.commit(range(item.num_chunk))
        else:
            item.session.state.append([0])
            item.session.state.commit(range(item.num_chunk + 1))
            item.session.pending = None


def test_nothing_to_do_is_an_empty_plan() -> None:
    scheduler = make_scheduler()
    add(scheduler, "idle", 5, cached=True)
    assert plan(scheduler) == {}


def test_a_prompt_is_computed_before_a_step_asks_for_it() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a", 11)
    assert plan(scheduler) == {"a": (10, 0)}


def test_a_chunk_that_reaches_the_root_takes_its_tree_along() -> None:
    scheduler = make_scheduler()
    ask(add(scheduler, "a", 11), 5)
    (item,) = scheduler.schedule(NOW)
    assert (item.num_chunk, item.num_rows) == (10, 15)
    rows = item.row_tree()
    assert rows.parents == tuple(range(-1, 14))
    assert rows.token_ids[:11] == tuple(item.session.state.token_ids)


def test_chunk_and_branching_tree_join_at_the_root() -> None:
    scheduler = make_scheduler()
    session = add(scheduler, "a", 3)
    tree = TokenTree((session.state.token_ids[-1], 7, 8), (-1, 0, 0))
    session.pending = PendingStep(tree, tree, (0, 1, 2), NOW, [])
    (item,) = scheduler.schedule(NOW)
    assert item.row_tree().parents == (-1, 0, 1, 2, 2)


def test_trees_come_first_and_the_longest_waiting_before_all() -> None:
    scheduler = make_scheduler(max_rows=32, min_prefill_rows=8)
    add(scheduler, "prompt", 100)
    for number in range(4):
        ask(add(scheduler, f"tree{number}", 9, cached=True), 12, arrival=NOW - number)
    assert plan(scheduler) == {"tree3": (0, 12), "tree2": (0, 12), "prompt": (8, 0)}


def test_neither_trees_nor_prefill_starve() -> None:
    scheduler = make_scheduler(max_rows=16, min_prefill_rows=4)
    streams = [add(scheduler, f"s{number}", 5, cached=True) for number in range(6)]
    prompt = add(scheduler, "prompt", 41)
    waits = dict.fromkeys((session.session_id for session in streams), 0)
    for turn in range(10):
        for session in streams:
            if session.pending is None:
                ask(session, 8, arrival=NOW + turn)
        items = scheduler.schedule(NOW)
        served = {item.session.session_id for item in items}
        waits = {name: 0 if name in served else wait + 1 for name, wait in waits.items()}
        assert max(waits.values()) <= 2
        assert sum(item.num_rows for item in items) <= 16 + 4
        finish(items)
    assert prompt.num_missing == 0


def test_prompts_share_what_trees_leave_oldest_first() -> None:
    scheduler = make_scheduler(max_rows=32)
    add(scheduler, "first", 21)
    add(scheduler, "second", 21)
    add(scheduler, "third", 21)
    assert plan(scheduler) == {"first": (20, 0), "second": (12, 0)}


def test_the_youngest_yields_its_blocks_and_keeps_its_tokens() -> None:
    scheduler = make_scheduler(num_blocks=6)
    old = add(scheduler, "old", 9, cached=True)
    middle = add(scheduler, "middle", 9, cached=True)
    young = add(scheduler, "young", 9, cached=True)
    for session in (old, middle, young):
        ask(session, 2)
    assert set(plan(scheduler)) == {"old", "middle"}
    assert scheduler.num_preemptions == 1
    assert young.state.num_cached == 0
    assert len(young.state) == 9
    assert young.pending is not None


def test_a_younger_session_waits_for_an_older_one() -> None:
    scheduler = make_scheduler(num_blocks=4)
    old = add(scheduler, "old", 13, cached=True)
    young = add(scheduler, "young", 9)
    ask(young)
    assert plan(scheduler) == {}
    assert old.state.num_cached == 12


def test_an_old_session_that_went_silent_yields_in_the_end() -> None:
    scheduler = make_scheduler(num_blocks=4)
    old = add(scheduler, "old", 13, cached=True)
    young = add(scheduler, "young", 9)
    ask(young)
    assert plan(scheduler, NOW + 0.9) == {}
    assert plan(scheduler, NOW + 1.1) == {"young": (8, 1)}
    assert old.state.block_table == []
    scheduler.remove("young")
    assert plan(scheduler, NOW + 2) == {}, "it does not fight for its blocks while it is silent"
    ask(old)
    # Its first block is still in the prefix cache; the others were given to the young one.
    assert plan(scheduler, NOW + 3) == {"old": (8, 1)}


def test_an_eager_prompt_takes_nobodys_blocks() -> None:
    scheduler = make_scheduler(num_blocks=4)
    first = add(scheduler, "first", 9)
    second = add(scheduler, "second", 13, cached=True)
    assert plan(scheduler) == {}
    assert (first.state.num_cached, second.state.num_cached) == (0, 12)


def test_a_preempted_session_is_taken_out_of_the_plan() -> None:
    scheduler = make_scheduler(num_blocks=4)
    old = add(scheduler, "old", 9, cached=True)
    young = add(scheduler, "young", 5, cached=True)
    ask(young, 4, arrival=NOW - 1)
    ask(old, 5)
    items = scheduler.schedule(NOW)
    assert [item.session for item in items] == [old]
    assert young.state.block_table == []


def test_a_tree_is_cut_by_depth_and_number() -> None:
    tree = TokenTree((0, 1, 2, 3, 4), (-1, 0, 1, 0, 3))
    cut, kept = fit_tree(tree, max_depth=1, max_nodes=10)
    assert (cut.token_ids, cut.parents, kept) == ((0, 1, 3), (-1, 0, 0), [0, 1, 3])
    cut, kept = fit_tree(tree, max_depth=9, max_nodes=2)
    assert (cut.token_ids, kept) == ((0, 1), [0, 1])
    assert fit_tree(tree, max_depth=2, max_nodes=5)[0] is tree


@pytest.mark.parametrize("num_blocks", [5, 8, 20])
def test_every_session_ends_whatever_the_pressure(num_blocks: int) -> None:
    scheduler = make_scheduler(num_blocks=num_blocks, max_rows=16, min_prefill_rows=4)
    sessions = [add(scheduler, f"s{number}", 3 + 2 * number) for number in range(6)]
    left = {session.session_id: 5 for session in sessions}
    now = NOW
    for _ in range(400):
        now += 2.0
        for session in list(scheduler.sessions.values()):
            if session.pending is None:
                ask(session, 2, arrival=now)
        items = scheduler.schedule(now)
        finish(items)
        for item in items:
            name = item.session.session_id
            left[name] -= item.tree is not None
            if left[name] == 0:
                scheduler.remove(name)
    assert not scheduler.sessions
    assert scheduler.blocks.num_free_blocks == num_blocks
