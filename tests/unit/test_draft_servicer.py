"""The draft service over a real server: items and results, bad items alone, frames, draining."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc.aio
import pytest
from torch import Tensor

from specinfer.convert import (
    draft_result_from_wire,
    grammar_to_wire,
    sampling_to_wire,
    status_error,
    worker_info_from_wire,
)
from specinfer.errors import InternalError, InvalidRequest, NotFound, Unavailable
from specinfer.grammar import GrammarChecker
from specinfer.messages import Grammar, ShapeQuery, WorkerInfo
from specinfer.rpc import open_channel
from specinfer.sampling import SamplingParams
from specinfer.server import RpcServer, build_server
from specinfer.tree import TokenTree
from specinfer.v1 import draft_pb2, draft_pb2_grpc, tree_pb2
from specinfer_draft.engine import DraftEngine
from specinfer_draft.servicer import SERVICE_NAME, DraftServicer
from specinfer_engine.batch import SequenceRows
from tests.kit.draft_driver import GREEDY, Bench, table_drafter
from tests.kit.grammars import HeldCompiler, token_ids_of
from tests.kit.stream_ends import StreamEnds
from tests.kit.table_models import TableModel, TableRunner

TIMEOUT = 20.0
PROMPT = (1, 2, 3)
LETTERS = ("<|end|>", *"abcdefghij")
CHAIN = ShapeQuery(max_nodes=4, max_depth=4, widths=(1, 1, 1, 1))
INFO = WorkerInfo("draft-1", "tiny", "h", "t", 11, "float32", "cpu", 200, 256, 32, 64, 4, True)

Stream = grpc.aio.StreamStreamCall[Any, Any]


class GatedRunner(TableRunner):
    """Computes only while its gate is open."""

    def __init__(self, model: TableModel, num_blocks: int, block_size: int) -> None:
        super().__init__(model, num_blocks, block_size)
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def forward(self, rows: Sequence[SequenceRows]) -> list[Tensor]:
        self.entered.set()
        assert self.gate.wait(TIMEOUT)
        return super().forward(rows)


@dataclass
class Service:
    """A served engine and a channel to it."""

    bench: Bench
    runner: GatedRunner
    engine: DraftEngine
    server: RpcServer
    stub: Any
    compiler: HeldCompiler

    def stream(self) -> Stream:
        call: Stream = self.stub.Draft()
        return call


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    bench = table_drafter(make_runner=GatedRunner)
    assert isinstance(bench.runner, GatedRunner)
    engine = DraftEngine(bench.drafter, bench.blocks, clock=bench.clock, max_pending=64)
    server = build_server("127.0.0.1:0", [SERVICE_NAME])
    compiler = HeldCompiler(LETTERS)
    compiler.gate.set()
    servicer = DraftServicer(engine, INFO, GrammarChecker(compiler))
    draft_pb2_grpc.add_DraftServiceServicer_to_server(servicer, server.server)
    engine.start()
    await server.start()
    async with open_channel(f"127.0.0.1:{server.port}") as channel:
        stub = draft_pb2_grpc.DraftServiceStub(channel)
        yield Service(bench, bench.runner, engine, server, stub, compiler)
    bench.runner.gate.set()
    compiler.gate.set()
    await server.drain(0)
    await asyncio.to_thread(engine.stop)


def opening(
    item_id: int,
    session_id: str = "a",
    sampling: SamplingParams = GREEDY,
    grammar: Grammar | None = None,
) -> draft_pb2.DraftItem:
    start = draft_pb2.OpenDraft(
        token_ids=PROMPT, sampling=sampling_to_wire(sampling), grammar=grammar_to_wire(grammar)
    )
    return draft_pb2.DraftItem(item_id=item_id, session_id=session_id, open=start)


def proposing(
    item_id: int,
    session_id: str = "a",
    *,
    known_len: int = 3,
    new: Sequence[int] = (),
    epoch: int = 0,
    shape: ShapeQuery = CHAIN,
    deadline_seconds: float = 0.0,
) -> draft_pb2.DraftItem:
    query = draft_pb2.ShapeQuery(
        max_nodes=shape.max_nodes, max_depth=shape.max_depth, widths=shape.widths
    )
    propose = draft_pb2.ProposeTree(
        known_len=known_len, new_token_ids=new, shape=query, deadline_seconds=deadline_seconds
    )
    return draft_pb2.DraftItem(item_id=item_id, session_id=session_id, epoch=epoch, propose=propose)


async def send(stream: Stream, *items: draft_pb2.DraftItem) -> None:
    await stream.write(draft_pb2.DraftRequest(items=items))


async def receive(stream: Stream, count: int) -> dict[int, draft_pb2.DraftItemResult]:
    """Results of `count` items by item id, each exactly once."""
    results: dict[int, draft_pb2.DraftItemResult] = {}
    async with asyncio.timeout(TIMEOUT):
        while len(results) < count:
            frame = await stream.read()
            assert isinstance(frame, draft_pb2.DraftResponse)
            for result in frame.results:
                assert result.item_id not in results
                results[result.item_id] = result
    return results


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


async def test_a_tree_stays_within_the_sessions_grammar(service: Service) -> None:
    stream = service.stream()
    grammar = Grammar("regex", "([bd][aceg]){8}")
    await send(stream, opening(1, grammar=grammar), proposing(2))
    results = await receive(stream, 2)
    assert not results[1].status.code
    tree = draft_result_from_wire(results[2]).tree
    assert tree.max_depth == 4
    state = service.compiler.compile(grammar).start()
    for node in range(1, len(tree)):
        *before, token_id = tree.path_token_ids(node)[1:]
        assert token_id in (token_ids_of(state.mask_after(before)) or [])
    assert tree != expected(service)
    await stream.done_writing()


async def test_a_bad_grammar_is_answered_by_its_name(service: Service) -> None:
    stream = service.stream()
    await send(stream, opening(1, grammar=Grammar("regex", "(a")), proposing(2), opening(3, "b"))
    results = await receive(stream, 3)
    error = status_error(results[1].status)
    assert isinstance(error, InvalidRequest)
    assert "unclosed" in error.message
    assert isinstance(status_error(results[2].status), NotFound)
    assert not results[3].status.code
    await stream.done_writing()


async def test_a_slow_grammar_holds_up_its_own_session_alone(service: Service) -> None:
    service.compiler.gate.clear()
    stream, grammar = service.stream(), Grammar("regex", "[bd]{9}")
    slow = (opening(1, "slow", grammar=grammar), proposing(2, "slow"))
    await send(stream, *slow, opening(3, "b"), proposing(4, "b"))
    assert set(await receive(stream, 2)) == {3, 4}
    await stream.done_writing()  # what was sent is answered all the same
    service.compiler.gate.set()
    results = await receive(stream, 2)
    assert not results[1].status.code
    assert draft_result_from_wire(results[2]).tree.max_depth == 4
    assert await stream.read() == grpc.aio.EOF


async def test_a_stream_that_ends_meanwhile_opens_nothing(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.compiler.gate.clear()
    opened: list[str] = []
    real = service.engine.open

    def noted(session_id: str, *arguments: Any, **options: Any) -> Any:
        opened.append(session_id)
        return real(session_id, *arguments, **options)

    monkeypatch.setattr(service.engine, "open", noted)
    stream = service.stream()
    await send(stream, opening(1, "left", grammar=Grammar("regex", "b+")), opening(2, "b"))
    assert set(await receive(stream, 1)) == {2}
    stream.cancel()
    other = service.stream()
    service.compiler.gate.set()
    await send(other, opening(1, "c", grammar=Grammar("regex", "b+")))
    assert not (await receive(other, 1))[1].status.code
    assert opened == ["b", "c"]
    await other.done_writing()
