"""The draft service over a real server: items and results, bad items alone, frames, draining."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import grpc.aio
import pytest
from torch import Tensor

from specinfer.convert import (
    draft_result_from_wire,
    worker_info_from_wire,
)
from specinfer.errors import InternalError, InvalidRequest, Unavailable
from specinfer.messages import ShapeQuery
from specinfer.sampling import SamplingParams
from specinfer.tree import TokenTree
from specinfer.v1 import draft_pb2, tree_pb2
from specinfer_draft.engine import DraftEngine
from specinfer_draft.servicer import SERVICE_NAME
from specinfer_engine.batch import SequenceRows
from tests.kit.draft_driver import GREEDY, table_drafter
from tests.kit.draft_service import (
    CHAIN,
    INFO,
    PROMPT,
    TIMEOUT,
    Service,
    opening,
    proposing,
    receive,
    send,
    served_drafter,
)
from tests.kit.stream_ends import StreamEnds


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    async with served_drafter() as served:
        yield served


def expected(service: Service, tokens: Sequence[int] = PROMPT) -> TokenTree:
    return service.bench.fresh_tree(list(tokens), GREEDY, CHAIN, len(PROMPT))


async def test_a_frame_may_open_propose_and_close(service: Service) -> None:
    stream = service.stream()
    close = draft_pb2.DraftItem(item_id=4, session_id="a", close=draft_pb2.CloseDraft())
    await send(stream, opening(1), proposing(2, epoch=5))
    results = await receive(stream, 2)
    assert not results[1].status.code
    answer = draft_result_from_wire(results[2])
    assert answer.epoch == 5
    assert answer.tree.token_ids == pytest.approx(expected(service).token_ids)
    assert answer.tree.parents == expected(service).parents
    assert results[2].session_id == "a"
    await send(stream, proposing(3, epoch=6, new=[4]), close, proposing(5, epoch=6))
    results = await receive(stream, 3)
    # The close came before the tree was grown, so the proposal was given up.
    assert results[3].status.reason in ("", "CANCELLED")
    assert not results[4].status.code
    assert results[5].status.reason == "NOT_FOUND"
    await stream.done_writing()
    assert await stream.read() is grpc.aio.EOF


BAD_ITEMS = [
    (draft_pb2.DraftItem(item_id=9, session_id="a"), "INVALID_REQUEST"),
    (proposing(9, "nobody"), "NOT_FOUND"),
    (proposing(9, known_len=50), "STALE_EPOCH"),
    (proposing(9, new=[11]), "INVALID_REQUEST"),
    (proposing(9, new=[2**31]), "INVALID_REQUEST"),
    (proposing(9, known_len=0), "INVALID_REQUEST"),
    (proposing(9, shape=ShapeQuery(max_nodes=5000)), "INVALID_REQUEST"),
    (proposing(9, shape=ShapeQuery(widths=(0,))), "INVALID_REQUEST"),
    (proposing(9, deadline_seconds=-1.0), "INVALID_REQUEST"),
    (proposing(9, deadline_seconds=float("nan")), "INVALID_REQUEST"),
    (
        draft_pb2.DraftItem(
            item_id=9,
            session_id="b",
            open=draft_pb2.OpenDraft(token_ids=[1], num_prompt_tokens=2),
        ),
        "INVALID_REQUEST",
    ),
    (
        draft_pb2.DraftItem(item_id=9, session_id="b", open=draft_pb2.OpenDraft()),
        "INVALID_REQUEST",
    ),
    (
        draft_pb2.DraftItem(
            item_id=9,
            session_id="b",
            open=draft_pb2.OpenDraft(
                token_ids=[1], sampling=tree_pb2.SamplingParams(temperature=-1.0)
            ),
        ),
        "INVALID_REQUEST",
    ),
]


@pytest.mark.parametrize(("bad", "reason"), BAD_ITEMS, ids=range(len(BAD_ITEMS)))
async def test_a_bad_item_fails_alone(
    service: Service, bad: draft_pb2.DraftItem, reason: str
) -> None:
    stream = service.stream()
    await send(stream, opening(1), opening(2, "c"), bad, proposing(3, "c"))
    results = await receive(stream, 4)
    assert results[9].status.reason == reason
    assert results[9].status.message
    assert not any(results[item_id].status.code for item_id in (1, 2, 3))
    assert draft_result_from_wire(results[3]).tree.token_ids == expected(service).token_ids
    await send(stream, proposing(4))
    assert not (await receive(stream, 1))[4].status.code


async def test_every_session_of_a_frame_is_answered_and_the_load_is_told(
    service: Service,
) -> None:
    stream = service.stream()
    names = [f"s{n}" for n in range(8)]
    await send(stream, *(opening(n, name) for n, name in enumerate(names)))
    await receive(stream, 8)
    await send(stream, *(proposing(n, name, new=[n]) for n, name in enumerate(names)))
    results: list[draft_pb2.DraftItemResult] = []
    async with asyncio.timeout(TIMEOUT):
        while len(results) < 8:
            frame = await stream.read()
            assert isinstance(frame, draft_pb2.DraftResponse)
            results.extend(frame.results)
            assert frame.load.num_sessions == 8
            assert 0 < frame.load.num_free_blocks < 64
    assert sorted(result.tree.token_ids[0] for result in results) == [*range(8)]


async def test_two_streams_get_their_own_results(service: Service) -> None:
    first, second = service.stream(), service.stream()
    await send(first, opening(1, "a"), proposing(2, "a"))
    await send(second, opening(1, "b"), proposing(2, "b", new=[7]))
    (one, two) = await receive(first, 2), await receive(second, 2)
    assert one[2].tree.token_ids[0] == 3
    assert two[2].tree.token_ids[0] == 7


async def test_a_client_that_leaves_harms_nobody(service: Service) -> None:
    service.runner.gate.clear()
    stream = service.stream()
    await send(stream, opening(1), proposing(2))
    await asyncio.to_thread(service.runner.entered.wait, TIMEOUT)
    stream.cancel()
    service.runner.gate.set()
    other = service.stream()
    await send(other, opening(1, "b"), proposing(2, "b"))
    assert not (await receive(other, 2))[2].status.code


@pytest.mark.parametrize("orderly", [True, False])
async def test_a_stream_takes_its_sessions_along(service: Service, orderly: bool) -> None:
    ends = StreamEnds(service.engine)
    leaving, staying = service.stream(), service.stream()
    await send(leaving, opening(1, "l"), opening(2, "m"))
    await receive(leaving, 2)
    await send(staying, opening(1, "s"))
    await receive(staying, 1)
    assert service.engine.load().num_sessions == 3
    if orderly:
        await leaving.done_writing()
    else:
        leaving.cancel()
    await ends.one()
    assert service.engine.load().num_sessions == 1
    await send(staying, proposing(2, "s"), proposing(3, "l"))
    results = await receive(staying, 2)
    assert not results[2].status.code
    assert results[3].status.reason == "NOT_FOUND"


async def test_a_session_opened_again_on_a_new_stream_outlives_the_old_one(
    service: Service,
) -> None:
    ends = StreamEnds(service.engine)
    old, new = service.stream(), service.stream()
    await send(old, opening(1, "a"), opening(2, "b"))
    await receive(old, 2)
    await send(new, opening(1, "a"))
    await receive(new, 1)
    old.cancel()
    await ends.one()
    assert service.engine.load().num_sessions == 1
    await send(new, proposing(2, "a"))
    assert not (await receive(new, 1))[2].status.code


async def test_info_tells_what_the_worker_is(service: Service) -> None:
    answer = await service.stub.GetInfo(draft_pb2.DraftServiceGetInfoRequest())
    assert worker_info_from_wire(answer.info) == INFO


async def test_a_draining_engine_ends_its_trees_and_takes_no_session(service: Service) -> None:
    stream = service.stream()
    await send(stream, opening(1), proposing(2))
    await receive(stream, 2)
    service.runner.entered.clear()
    service.runner.gate.clear()
    await send(stream, proposing(3, new=[4]))
    await asyncio.to_thread(service.runner.entered.wait, TIMEOUT)
    assert not await asyncio.to_thread(service.engine.drain, 0.0)
    await send(stream, opening(4, "late"))
    assert (await receive(stream, 1))[4].status.reason == "UNAVAILABLE"
    service.runner.gate.set()
    assert await asyncio.to_thread(service.engine.drain, TIMEOUT)
    results = await receive(stream, 1)
    assert draft_result_from_wire(results[3]).tree.token_ids[0] == 4
    assert service.engine.load().draining


async def test_a_pass_that_fails_ends_the_engine_and_answers_everybody(service: Service) -> None:
    stream = service.stream()
    await send(stream, opening(1))
    await receive(stream, 1)

    def broken(rows: Sequence[SequenceRows]) -> list[Tensor]:
        raise RuntimeError("no memory")

    service.runner.forward = broken  # type: ignore[method-assign]
    await send(stream, proposing(2), proposing(3, "nobody"))
    results = await receive(stream, 2)
    assert results[2].status.reason == "INTERNAL"
    assert not service.engine.healthy
    with pytest.raises(InternalError):
        service.engine.close("a")


async def test_an_engine_that_is_stopped_answers_what_is_pending() -> None:
    bench = table_drafter()
    engine = DraftEngine(bench.drafter, bench.blocks)
    future = engine.propose("a", 0, 1, (), CHAIN)
    with pytest.raises(InvalidRequest):
        engine.propose("a", 0, 1, (), CHAIN, float("inf"))
    engine.stop()
    with pytest.raises(Unavailable):
        future.result(0)
    with pytest.raises(Unavailable):
        engine.open("a", 0, PROMPT, GREEDY)


async def test_a_session_opened_later_counts_its_output_as_output(service: Service) -> None:
    sampling = SamplingParams(temperature=0.0, frequency_penalty=2.0)
    tokens = (*PROMPT, *expected(service).token_ids[1:] * 6)
    fresh = service.bench.fresh_tree(list(tokens), sampling, CHAIN, len(PROMPT))
    stream, trees = service.stream(), []
    for num_prompt_tokens in (len(PROMPT), 0, len(tokens)):
        start = opening(1, sampling=sampling)
        start.open.token_ids[:] = tokens
        start.open.num_prompt_tokens = num_prompt_tokens
        await send(stream, start, proposing(2, known_len=len(tokens)))
        results = await receive(stream, 2)
        trees.append(draft_result_from_wire(results[2]).tree.token_ids)
    assert trees[0] == fresh.token_ids
    assert trees[0] != trees[1] == trees[2]


async def test_a_malformed_frame_ends_its_stream_and_no_other(service: Service) -> None:
    good = service.stream()
    await send(good, opening(1))
    await receive(good, 1)
    broken = raw_stream(service, b"\xff\xff\xff")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in broken:
            pass
    assert caught.value.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.INVALID_ARGUMENT)
    await send(good, proposing(2))
    assert not (await receive(good, 1))[2].status.code


async def test_an_oversized_frame_is_refused(service: Service) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in raw_stream(service, b"\x0a" * (9 << 20)):
            pass
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    stream = service.stream()
    await send(stream, opening(1), proposing(2))
    told, tree = draft_result_from_wire((await receive(stream, 2))[2]).tree, expected(service)
    assert (told.token_ids, told.parents) == (tree.token_ids, tree.parents)
    assert told.scores == pytest.approx(tree.scores)  # float32 on the wire


async def test_what_a_former_owner_sends_is_refused_on_the_wire(service: Service) -> None:
    stream = service.stream()
    claimed, stale = opening(1), proposing(2)
    claimed.owner = 3
    await send(stream, claimed, stale)
    assert (await receive(stream, 2))[2].status.reason == "LEASE_LOST"
    mine = proposing(3)
    mine.owner = 3
    await send(stream, mine)
    assert not (await receive(stream, 1))[3].status.code


def raw_stream(service: Service, frame: bytes) -> Any:
    """A stream whose only frame is these bytes."""
    channel: Any = service.channel
    return channel.stream_stream(f"/{SERVICE_NAME}/Draft")(iter([frame]), timeout=TIMEOUT)
