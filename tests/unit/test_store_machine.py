"""Routers that pause, repeat themselves and come late never commit beside each other.

A model drives a store through three routers: claims, commits, commits that are delivered later or
again, cancellations, lost and half-lost data. What the store holds has to be what it accepted, each
epoch once and from one owner. The planted bugs at the end prove that the model can see one.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from specinfer.errors import Cancelled, LeaseLost, NotFound, StaleEpoch
from specinfer.redis_connection import RedisSettings
from specinfer_router.store import (
    ABANDONED,
    CANCELLED,
    MemoryStore,
    RedisStore,
    SessionRecord,
    SessionStore,
)
from specinfer_router.store.encoding import session_keys
from specinfer_router.store.interface import Behind
from tests.unit.test_store import record_of

NUM_ROUTERS = 3
PATIENCE_SECONDS = 30.0
ROUTERS = st.integers(0, NUM_ROUTERS - 1)
MakeStores = Callable[[], list[SessionStore]]


@dataclass
class Message:
    """A commit as a router sent it, or will."""

    router: int
    owner: int
    epoch: int
    token_ids: tuple[int, ...]


@dataclass
class View:
    """What a router believes of the session."""

    record: SessionRecord
    sent: list[Message] = field(default_factory=list)


class Routers(RuleBasedStateMachine):
    """Three routers and one session."""

    make_stores: MakeStores

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.stores = self.wait(self._build())
        self.views: dict[int, View] = {}
        self.accepted: list[Message] = []
        self.owner = 0
        self.holder = 0
        self.cancelled = self.lost = False
        self.late: list[Message] = []
        self.next_token = 100
        self.snapshot: tuple[Any, bytes] | None = None

    async def _build(self) -> list[SessionStore]:
        return self.make_stores()

    def wait(self, call: Awaitable[Any]) -> Any:
        async def waited() -> Any:
            return await call

        return self.runner.run(waited())

    def teardown(self) -> None:
        for store in dict.fromkeys(self.stores):
            self.wait(store.close())
        self.runner.close()

    @initialize()
    def create(self) -> None:
        record = record_of(uuid.uuid4().hex)
        self.prompt = record.token_ids
        self.session_id = record.session_id
        self.wait(self.stores[0].create(record))
        self.views[0] = View(record)

    @rule(router=ROUTERS)
    def claim(self, router: int) -> None:
        try:
            record = self.wait(self.stores[router].claim(self.session_id))
        except NotFound:
            assert self.lost
            return
        if self.lost:
            # Half of it: whoever claims that has what Redis has, as its user would.
            return
        # A claim whose answer was late is sent again, and then skips a number.
        assert record.owner > self.owner, "owner numbers only rise"
        self.owner, self.holder = record.owner, router
        self.views[router] = View(record)

    def message(self, router: int, num_tokens: int) -> Message:
        record = self.views[router].record
        tokens = tuple(range(self.next_token, self.next_token + num_tokens))
        self.next_token += num_tokens
        return Message(router, record.owner, record.epoch, tokens)

    def send(self, message: Message) -> bool:
        """Deliver a commit; whether the store says that it holds it."""
        known = message in self.accepted
        try:
            reached = self.wait(
                self.stores[message.router].commit(
                    self.session_id, message.epoch, message.token_ids, owner=message.owner
                )
            )
        except LeaseLost:
            assert (message.owner, message.router) != (self.owner, self.holder) or self.lost
            return False
        except (NotFound, Behind):
            assert self.lost, "nothing was lost"
            return False
        except Cancelled:
            assert self.cancelled
            return False
        except StaleEpoch:
            return False
        assert not self.lost, "a commit on lost data"
        assert reached == message.epoch + 1
        if not known:
            assert (message.owner, message.router) == (self.owner, self.holder), "a former owner"
            assert message.epoch == len(self.accepted), "an epoch twice, or one left out"
            assert not self.cancelled
            self.accepted.append(message)
        self.learn(message)
        return True

    def learn(self, message: Message) -> None:
        """A router learns that its commit was taken."""
        view = self.views[message.router]
        record = view.record
        if (record.owner, record.epoch) == (message.owner, message.epoch):
            view.record = record._replace(
                epoch=record.epoch + 1, token_ids=record.token_ids + message.token_ids
            )
        view.sent.append(message)

    @precondition(lambda self: not self.lost)
    @rule(router=ROUTERS, num_tokens=st.integers(1, 3))
    def commit(self, router: int, num_tokens: int) -> None:
        if router in self.views:
            self.send(self.message(router, num_tokens))

    @rule(router=ROUTERS, num_tokens=st.integers(1, 3))
    def pause_before_a_commit(self, router: int, num_tokens: int) -> None:
        if router in self.views:
            self.late.append(self.message(router, num_tokens))

    @precondition(lambda self: self.late and not self.lost)
    @rule(data=st.data())
    def deliver_late(self, data: st.DataObject) -> None:
        self.send(self.late.pop(data.draw(st.integers(0, len(self.late) - 1))))

    @precondition(lambda self: self.accepted and not self.lost)
    @rule(data=st.data())
    def deliver_again(self, data: st.DataObject) -> None:
        at = data.draw(st.integers(max(0, len(self.accepted) - 3), len(self.accepted) - 1))
        self.send(self.accepted[at])

    @precondition(lambda self: not self.lost)
    @rule(router=ROUTERS)
    def give_up(self, router: int) -> None:
        if router in self.views:
            owner = self.views[router].record.owner
            self.wait(self.stores[router].finish(self.session_id, ABANDONED, owner=owner))

    @precondition(lambda self: not self.lost and len(self.accepted) > 3)
    @rule(router=ROUTERS)
    def cancel(self, router: int) -> None:
        self.wait(self.stores[router].finish(self.session_id, CANCELLED))
        self.cancelled = True

    @precondition(lambda self: not self.lost)
    @rule(router=ROUTERS)
    def restore_without_need(self, router: int) -> None:
        if router in self.views:
            try:
                self.wait(self.stores[router].restore(self.views[router].record))
            except LeaseLost:
                assert router != self.holder or self.views[router].record.owner != self.owner
            except Cancelled:
                assert self.cancelled

    @precondition(lambda self: self.holder_is_up_to_date() and not self.cancelled)
    @rule(half=st.booleans())
    def lose(self, half: bool) -> None:
        """All of it, or what came after a snapshot of an earlier state of the same owner."""
        store = self.stores[0]
        if isinstance(store, MemoryStore):
            store.forget(self.session_id)
        elif isinstance(store, RedisStore):
            keys = session_keys(self.session_id)
            self.wait(store._redis.delete(*keys))
            if half and self.snapshot is not None:
                facts, tokens = self.snapshot
                self.wait(store._redis.hset(keys[0], mapping=facts))
                self.wait(store._redis.set(keys[1], tokens))
                now = (b"%d" % len(self.accepted), b"%d" % self.owner)
                self.lost = (facts[b"epoch"], facts[b"owner"]) != now
                return
        self.lost = True

    def holder_is_up_to_date(self) -> bool:
        view = self.views.get(self.holder)
        return (
            not self.lost
            and view is not None
            and view.record.owner == self.owner
            and view.record.epoch == len(self.accepted)
        )

    @precondition(lambda self: not self.lost)
    @rule()
    def remember(self) -> None:
        store = self.stores[0]
        if isinstance(store, RedisStore):
            keys = session_keys(self.session_id)
            self.snapshot = (
                self.wait(store._redis.hgetall(keys[0])),
                self.wait(store._redis.get(keys[1])),
            )

    @precondition(lambda self: self.lost)
    @rule()
    def the_holder_restores(self) -> None:
        store, view = self.stores[self.holder], self.views[self.holder]
        if not self.send(self.message(self.holder, 1)):
            try:
                self.wait(store.restore(view.record))
            except LeaseLost:
                # Somebody claimed what was left: that claim counts, with what it found.
                record = self.wait(store.claim(self.session_id))
                record = view.record._replace(owner=max(record.owner, view.record.owner) + 1)
                self.wait(store.restore(record))
                view.record, self.owner = record, record.owner
        self.lost = False

    @invariant()
    def nothing_is_lost_doubled_or_out_of_order(self) -> None:
        if self.lost or not hasattr(self, "session_id"):
            return
        record = self.wait(self.stores[1].load(self.session_id))
        tokens = tuple(token for message in self.accepted for token in message.token_ids)
        assert record.token_ids == self.prompt + tokens
        assert record.epoch == len(self.accepted)
        assert record.owner == self.owner


def run(make_stores: MakeStores, *, max_examples: int, phases: tuple[Phase, ...]) -> None:
    machine = type("Machine", (Routers,), {"make_stores": staticmethod(make_stores)})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            database=None,
            phases=phases,
            print_blob=False,
            report_multiple_bugs=False,
            suppress_health_check=(HealthCheck.too_slow, HealthCheck.filter_too_much),
        ),
    )


ALL = (Phase.generate, Phase.shrink)


def test_memory_keeps_its_promises() -> None:
    def stores() -> list[SessionStore]:
        return [MemoryStore()] * NUM_ROUTERS

    # Routers that share one memory are one holder: their numbers alone tell them apart.
    run(stores, max_examples=50, phases=ALL)


def redis_stores(url: str, kind: type[RedisStore] = RedisStore) -> MakeStores:
    # What happens when Redis is late is not the subject here.
    settings = RedisSettings(url, timeout_seconds=PATIENCE_SECONDS)
    return lambda: [
        kind(settings, holder=f"router-{n}", patience_seconds=PATIENCE_SECONDS)
        for n in range(NUM_ROUTERS)
    ]


def test_redis_keeps_its_promises(redis_server: str) -> None:
    run(redis_stores(redis_server), max_examples=40, phases=ALL)


PLANTED = {
    "the owner is not compared": (
        "commit",
        "if owner > mine or (owner == mine and found[5] ~= ARGV[6]) then",
        "if false then",
    ),
    "the epoch is not compared": (
        "commit",
        "if epoch ~= expected or found[2] ~= '' then",
        "if found[2] ~= '' then",
    ),
    "tokens are added twice": (
        "commit",
        "epoch = epoch + 1\n",
        "epoch = epoch + 1\n    redis.call('APPEND', KEYS[2], ARGV[2])\n",
    ),
    "a repetition is added again": (
        "commit",
        "if epoch ~= expected + 1 or found[3] ~= commit then",
        "if true then\n    if found[3] == commit then expected = epoch end",
    ),
    "a claim does not raise the owner": ("claim", "'owner', 1)", "'owner', 0)"),
    "restoring does not compare owners": ("restore", "        return -2\n", "        found = {}\n"),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_the_model_sees_a_planted_bug(redis_server: str, bug: str) -> None:
    file, line, planted = PLANTED[bug]
    script = resources.files("specinfer_router.store").joinpath(f"{file}.lua").read_text()
    # Not inside the block below, where a plant without a place would look like a bug that was seen.
    assert script.count(line) == 1

    class Planted(RedisStore):
        def script_text(self, name: str) -> str:
            text = super().script_text(name)
            return text.replace(line, planted) if name == file else text

    with pytest.raises((AssertionError, StaleEpoch)):
        run(redis_stores(redis_server, Planted), max_examples=300, phases=(Phase.generate,))
