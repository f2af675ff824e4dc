"""A session that was claimed: what the former owner still sends changes nothing at a worker.

The check is a function that returns what it found; it finds nothing in the workers as they are, and
something in those that do not look at owners.
"""

from __future__ import annotations

import pytest

from specinfer.errors import LeaseLost, NotFound
from specinfer.sampling import SamplingParams
from specinfer_engine.fence import OwnerFence
from specinfer_verify.engine import VerifyEngine
from tests.kit.draft_driver import GREEDY, table_drafter
from tests.kit.table_models import draft_nothing
from tests.kit.verify_driver import TIMEOUT, running, table_engine

PROMPT = (1, 2, 3)
SAMPLING = SamplingParams(temperature=0.0)


@pytest.fixture
def unfenced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: owners are not looked at."""
    monkeypatch.setattr(OwnerFence, "pass_through", lambda *arguments: False)


def open_as(engine: VerifyEngine, owner: int, epoch: int = 0) -> None:
    engine.open("a", epoch, PROMPT, SAMPLING, 3, owner=owner).result(TIMEOUT)


def stale_owner_effects(engine: VerifyEngine) -> int:
    """What owner 1 changed after owner 2 had opened the session: a step, a close and an open."""
    open_as(engine, 1)
    open_as(engine, 2)
    effects = 0
    stale = engine.step("a", 0, draft_nothing(PROMPT), owner=1).exception(TIMEOUT)
    effects += not isinstance(stale, LeaseLost)
    engine.close("a", owner=1).exception(TIMEOUT)
    result = engine.step("a", 0, draft_nothing(PROMPT), owner=2)
    if result.exception(TIMEOUT) is not None:
        return effects + 1
    stale = engine.open("a", 1, (*PROMPT, 4), SAMPLING, 3, owner=1).exception(TIMEOUT)
    effects += not isinstance(stale, LeaseLost)
    tokens = (*PROMPT, *result.result().token_ids)
    after = engine.step("a", 1, draft_nothing(tokens), owner=2).exception(TIMEOUT)
    return effects + (after is not None)


def test_a_stale_owner_changes_nothing() -> None:
    engine, _, _ = table_engine()
    with running(engine):
        assert stale_owner_effects(engine) == 0


@pytest.mark.usefixtures("unfenced")
def test_a_worker_that_does_not_look_at_owners_is_seen() -> None:
    engine, _, _ = table_engine()
    with running(engine):
        assert stale_owner_effects(engine) > 0


def test_the_fence_outlives_the_session() -> None:
    engine, _, _ = table_engine()
    with running(engine):
        open_as(engine, 5)
        engine.close("a", owner=5).result(TIMEOUT)
        with pytest.raises(LeaseLost):
            open_as(engine, 4)
        open_as(engine, 5)
        open_as(engine, 6, epoch=0)


def test_what_a_former_owner_waits_for_fails_when_the_session_is_claimed() -> None:
    engine, _, blocks = table_engine()
    # The thread is not running yet, so that all three arrive at once.
    engine.open("a", 0, PROMPT, SAMPLING, 3, owner=1)
    waiting = engine.step("a", 0, draft_nothing(PROMPT), owner=1)
    claimed = engine.open("a", 0, PROMPT, SAMPLING, 3, owner=2)
    with running(engine):
        claimed.result(TIMEOUT)
        assert isinstance(waiting.exception(TIMEOUT), LeaseLost)
        assert engine.step("a", 0, draft_nothing(PROMPT), owner=2).result(TIMEOUT).epoch == 1
        engine.close("a", owner=2).result(TIMEOUT)
        assert blocks.num_free_blocks == blocks.num_blocks


def test_a_new_owner_may_open_at_an_earlier_epoch_than_the_worker_has() -> None:
    engine, _, _ = table_engine()
    with running(engine):
        open_as(engine, 0)
        engine.step("a", 0, draft_nothing(PROMPT)).result(TIMEOUT)
        # The store did not take that round.
        open_as(engine, 1)
        assert engine.step("a", 0, draft_nothing(PROMPT), owner=1).result(TIMEOUT).epoch == 1


def test_a_new_owner_who_steps_before_opening_is_told_to_open() -> None:
    engine, _, _ = table_engine()
    with running(engine):
        open_as(engine, 0)
        error = engine.step("a", 0, draft_nothing(PROMPT), owner=1).exception(TIMEOUT)
        assert isinstance(error, NotFound)
        open_as(engine, 1)


def stale_drafts() -> int:
    """What the first two owners changed at a drafter after the third had opened the session."""
    bench = table_drafter()
    bench.drafter.open("a", 0, PROMPT, GREEDY)
    waiting = bench.propose("a", 3)
    bench.drafter.open("a", 0, PROMPT, GREEDY, owner=2)
    effects = int(not isinstance(waiting.exception(0), LeaseLost))
    try:
        bench.drafter.close("a", owner=1)
        effects += 1
    except LeaseLost:
        pass
    try:
        bench.drafter.open("a", 3, (*PROMPT, 4), GREEDY, owner=1)
        effects += 1
    except LeaseLost:
        pass
    return effects


def test_a_stale_owner_changes_nothing_at_a_drafter() -> None:
    assert stale_drafts() == 0


@pytest.mark.usefixtures("unfenced")
def test_a_drafter_that_does_not_look_at_owners_is_seen() -> None:
    assert stale_drafts() > 0


def test_only_so_many_sessions_are_remembered() -> None:
    fence = OwnerFence(max_remembered=2)
    for name in "abc":
        assert not fence.pass_through(name, 1, None)
    assert len(fence) == 2
    assert not fence.pass_through("a", 0, None), "forgotten, as the oldest"
    with pytest.raises(LeaseLost):
        fence.pass_through("a", 0, 1)
    with pytest.raises(LeaseLost):
        fence.pass_through("c", 0, None)
    assert not fence.pass_through("x" * 300, 1, None)
    assert len(fence) == 2
    for number in range(100):
        fence.pass_through(f"s{number}", 0, None)
    assert len(fence) == 2, "sessions that were never claimed need no memory"
