"""A draft worker over a table model behind a real server, and the items that a router sends it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc.aio
from torch import Tensor

from specinfer.convert import grammar_to_wire, sampling_to_wire
from specinfer.grammar import GrammarChecker
from specinfer.messages import Grammar, ShapeQuery, WorkerInfo
from specinfer.rpc import open_channel
from specinfer.sampling import SamplingParams
from specinfer.server import RpcServer, build_server
from specinfer.v1 import draft_pb2, draft_pb2_grpc
from specinfer_draft.engine import DraftEngine
from specinfer_draft.servicer import SERVICE_NAME, DraftServicer
from specinfer_engine.batch import SequenceRows
from tests.kit.draft_driver import GREEDY, Bench, table_drafter
from tests.kit.grammars import HeldCompiler
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
    channel: grpc.aio.Channel
    stub: Any
    compiler: HeldCompiler

    def stream(self) -> Stream:
        call: Stream = self.stub.Draft()
        return call


@asynccontextmanager
async def served_drafter() -> AsyncIterator[Service]:
    """A drafter over a table model behind a real server."""
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
        yield Service(bench, bench.runner, engine, server, channel, stub, compiler)
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
