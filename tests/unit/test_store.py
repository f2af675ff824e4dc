"""What every session store promises, run on memory and on a real Redis alike."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator

import pytest

from specinfer.errors import (
    Cancelled,
    InvalidRequest,
    NotFound,
    ResourceExhausted,
    StaleEpoch,
)
from specinfer.messages import Grammar, SpeculationOptions
from specinfer.redis_connection import RedisSettings
from specinfer.sampling import SamplingParams, StopConditions
from specinfer_router.store import (
    ABANDONED,
    CANCELLED,
    ERROR,
    MemoryStore,
    RedisStore,
    SessionRecord,
    SessionStore,
    SessionTerms,
)
from specinfer_router.store.documents import MemoryDocuments
from specinfer_router.store.interface import MAX_DOCUMENT_BYTES


def record_of(session_id: str = "", num_tokens: int = 3) -> SessionRecord:
    return SessionRecord(
        session_id=session_id or uuid.uuid4().hex,
        terms=SessionTerms(
            model_hash="cafe",
            num_prompt_tokens=num_tokens,
            sampling=SamplingParams(
                temperature=0.8, top_p=0.9, logit_bias={7: -1.5}, seed=2**62 + 1
            ),
            stop=StopConditions(max_tokens=9, stop=("\n", "é"), stop_token_ids=(4,)),
            request_id="r1",
            key_id="k1",
            num_logprobs=2,
            grammar=Grammar("regex", "a+"),
            speculation=SpeculationOptions(widths=(2, 1)),
            prediction=(3, 4),
            affinity_key="team",
            detail=True,
        ),
        token_ids=tuple(range(num_tokens)),
    )


@pytest.fixture(params=["memory", "redis"])
async def store(
    request: pytest.FixtureRequest,
) -> AsyncIterator[SessionStore]:
    built: SessionStore
    if request.param == "memory":
        built = MemoryStore()
    else:
        built = RedisStore(RedisSettings(request.getfixturevalue("redis_server")))
    await built.check()
    yield built
    await built.close()


async def test_a_record_comes_back_as_it_was_kept(store: SessionStore) -> None:
    record = record_of(num_tokens=20_000)
    await store.create(record)
    assert await store.load(record.session_id) == record


async def test_commits_add_tokens_and_count_epochs(store: SessionStore) -> None:
    record = record_of()
    await store.create(record)
    assert await store.commit(record.session_id, 0, [11, 12]) == 1
    assert await store.commit(record.session_id, 1, [2**32 - 1], "stop") == 2
    kept = await store.load(record.session_id)
    assert kept.token_ids == (0, 1, 2, 11, 12, 2**32 - 1)
    assert (kept.epoch, kept.finish_reason) == (2, "stop")


async def test_the_same_commit_again_changes_nothing(store: SessionStore) -> None:
    record = record_of()
    await store.create(record)
    for _ in range(3):
        assert await store.commit(record.session_id, 0, [11, 12], "length") == 1
    assert (await store.load(record.session_id)).token_ids == (0, 1, 2, 11, 12)


@pytest.mark.parametrize(
    ("epoch", "token_ids", "finish_reason"),
    [(0, [11], ""), (0, [11, 13], ""), (0, [11, 12], "stop"), (2, [5], ""), (7, [5], "")],
    ids=["shorter", "other", "other end", "ahead", "far ahead"],
)
async def test_a_commit_for_another_epoch_is_refused(
    store: SessionStore, epoch: int, token_ids: list[int], finish_reason: str
) -> None:
    record = record_of()
    await store.create(record)
    await store.commit(record.session_id, 0, [11, 12])
    with pytest.raises(StaleEpoch):
        await store.commit(record.session_id, epoch, token_ids, finish_reason)
    assert (await store.load(record.session_id)).token_ids == (0, 1, 2, 11, 12)


async def test_nothing_is_added_to_a_finished_session(store: SessionStore) -> None:
    record = record_of()
    await store.create(record)
    await store.commit(record.session_id, 0, [11], "stop")
    with pytest.raises(StaleEpoch):
        await store.commit(record.session_id, 1, [12])


async def test_the_first_finish_reason_stays(store: SessionStore) -> None:
    record = record_of()
    await store.create(record)
    await store.finish(record.session_id, "cancelled")
    await store.finish(record.session_id, "error")
    kept = await store.load(record.session_id)
    assert (kept.finish_reason, kept.epoch) == ("cancelled", 0)


async def test_finishing_a_session_that_is_gone_is_quiet(store: SessionStore) -> None:
    await store.finish(uuid.uuid4().hex, "cancelled")
    with pytest.raises(NotFound):
        await store.load("gone")
    with pytest.raises(NotFound):
        await store.commit("gone", 0, [1])


async def test_create_may_be_repeated_but_an_id_is_never_shared(store: SessionStore) -> None:
    record = record_of()
    await store.create(record)
    await store.create(record)
    with pytest.raises(StaleEpoch):
        await store.create(record_of(record.session_id, num_tokens=4))
    await store.commit(record.session_id, 0, [11])
    with pytest.raises(StaleEpoch):
        await store.create(record)


async def test_of_concurrent_committers_one_wins(store: SessionStore) -> None:
    record = record_of()
    await store.create(record)
    outcomes = await asyncio.gather(
        *(store.commit(record.session_id, 0, [100 + writer]) for writer in range(20)),
        return_exceptions=True,
    )
    assert outcomes.count(1) == 1
    assert sum(isinstance(outcome, StaleEpoch) for outcome in outcomes) == 19
    winner = 100 + outcomes.index(1)
    assert (await store.load(record.session_id)).token_ids == (0, 1, 2, winner)


async def test_sessions_do_not_touch_each_other(store: SessionStore) -> None:
    records = [record_of() for _ in range(8)]
    for record in records:
        await store.create(record)
    await asyncio.gather(
        *(
            store.commit(record.session_id, 0, [number])
            for number, record in enumerate(records, start=50)
        )
    )
    for number, record in enumerate(records, start=50):
        assert (await store.load(record.session_id)).token_ids == (0, 1, 2, number)


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_memory_forgets_after_its_time_and_commits_renew_it() -> None:
    clock = Clock()
    store = MemoryStore(ttl_seconds=10, clock=clock)
    silent, busy = record_of(), record_of()
    await store.create(silent)
    await store.create(busy)
    clock.now = 6
    await store.commit(busy.session_id, 0, [1])
    clock.now = 12
    assert (await store.load(busy.session_id)).epoch == 1
    with pytest.raises(NotFound):
        await store.load(silent.session_id)
    await store.create(record_of())
    assert len(store) == 2


@pytest.mark.parametrize("finish", [True, False])
async def test_memory_is_bounded_and_running_sessions_stay(finish: bool) -> None:
    store = MemoryStore(max_sessions=3)
    records = [record_of() for _ in range(3)]
    for record in records:
        await store.create(record)
    if not finish:
        with pytest.raises(ResourceExhausted) as full:
            await store.create(record_of())
        assert full.value.retry_after
        return
    await store.finish(records[1].session_id, "stop")
    await store.create(record_of())
    assert len(store) == 3
    with pytest.raises(NotFound):
        await store.load(records[1].session_id)
    assert (await store.load(records[0].session_id)).epoch == 0


async def test_whoever_claims_a_session_is_the_only_one_who_commits(store: SessionStore) -> None:
    record = record_of()
    await store.create(record)
    await store.commit(record.session_id, 0, [11])
    claimed = await store.claim(record.session_id)
    assert (claimed.owner, claimed.epoch, claimed.output_ids) == (1, 1, (11,))
    with pytest.raises(StaleEpoch, match="taken over"):
        await store.commit(record.session_id, 1, [12])
    # Nor may the old owner end what the new one goes on with, or repeat its last commit.
    await store.finish(record.session_id, ABANDONED, owner=0)
    with pytest.raises(StaleEpoch, match="taken over"):
        await store.commit(record.session_id, 0, [11])
    assert await store.commit(record.session_id, 1, [13], "stop", owner=1) == 2
    assert (await store.load(record.session_id)).output_ids == (11, 13)


@pytest.mark.parametrize("reason", [ABANDONED, ERROR])
async def test_a_broken_session_runs_again_once_claimed(store: SessionStore, reason: str) -> None:
    record = record_of()
    await store.create(record)
    await store.finish(record.session_id, reason, owner=0)
    with pytest.raises(StaleEpoch):
        await store.commit(record.session_id, 0, [11])
    assert (await store.claim(record.session_id)).finish_reason == ""
    assert await store.commit(record.session_id, 0, [11], owner=1) == 1


@pytest.mark.parametrize("reason", ["stop", "length", CANCELLED])
async def test_what_ended_stays_ended_when_claimed(store: SessionStore, reason: str) -> None:
    record = record_of()
    await store.create(record)
    await store.finish(record.session_id, reason)
    assert (await store.claim(record.session_id)).finish_reason == reason


async def test_a_cancelled_session_tells_its_run_so(store: SessionStore) -> None:
    record = record_of()
    await store.create(record)
    await store.finish(record.session_id, ABANDONED, owner=0)
    await store.finish(record.session_id, CANCELLED)
    with pytest.raises(Cancelled):
        await store.commit(record.session_id, 0, [11])


async def test_an_unknown_session_cannot_be_claimed(store: SessionStore) -> None:
    with pytest.raises(NotFound):
        await store.claim("nobody")


async def test_documents_come_back_until_they_are_deleted(store: SessionStore) -> None:
    await store.put_document("response:a1", "one")
    await store.put_document("response:a1", "zwei ü")
    assert await store.get_document("response:a1") == "zwei ü"
    await store.delete_document("response:a1")
    await store.delete_document("response:a1")
    with pytest.raises(NotFound):
        await store.get_document("response:a1")


@pytest.mark.parametrize(
    ("name", "text"), [("no spaces", ""), ("", ""), ("big", "x" * (MAX_DOCUMENT_BYTES + 1))]
)
async def test_documents_are_bounded(store: SessionStore, name: str, text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await store.put_document(name, text)
    assert caught.value.field == "name"


async def test_memory_keeps_no_more_tokens_than_it_may() -> None:
    store = MemoryStore(max_tokens=100)
    first, second, third = (record_of(num_tokens=40) for _ in range(3))
    await store.create(first)
    await store.create(second)
    with pytest.raises(ResourceExhausted):
        await store.create(third)
    await store.finish(first.session_id, "stop")
    await store.create(third)
    with pytest.raises(NotFound):
        await store.load(first.session_id)
    assert (await store.load(second.session_id)).token_ids == second.token_ids


def test_documents_in_memory_expire_and_make_room() -> None:
    now = 0.0
    documents = MemoryDocuments(max_bytes=10, ttl_seconds=5.0, clock=lambda: now)
    documents.put("a", "1234")
    documents.put("b", "1234")
    documents.put("c", "1234")
    with pytest.raises(NotFound):
        documents.get("a")
    assert documents.get("b") == documents.get("c") == "1234"
    now = 5.0
    with pytest.raises(NotFound):
        documents.get("c")


async def test_the_tail_is_what_is_new(store: SessionStore) -> None:
    record = record_of()
    await store.create(record)
    await store.commit(record.session_id, 0, [11, 12])
    assert await store.tail(record.session_id, 3) == ((11, 12), 1, "")
    assert await store.tail(record.session_id, 4) == ((12,), 1, "")
    assert await store.tail(record.session_id, 5) == ((), 1, "")
    await store.finish(record.session_id, ABANDONED)
    assert await store.tail(record.session_id, 9) == ((), 1, ABANDONED)
    with pytest.raises(NotFound):
        await store.tail("nobody", 0)
