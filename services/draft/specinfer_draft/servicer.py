"""DraftService on the wire: checks, calls, translates. No tensors and no decisions here.

One stream carries frames of items of many sessions. Items go to the engine in the order they came;
results leave as they are made, those that are ready together in one frame. A grammar is compiled on
another thread; its session's later items wait for it, those of others do not.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import grpc.aio

from specinfer.convert import (
    draft_result_to_wire,
    grammar_from_wire,
    load_to_wire,
    sampling_from_wire,
    shape_from_wire,
    status_to_wire,
    worker_info_to_wire,
)
from specinfer.errors import InternalError, InvalidRequest, SpecinferError
from specinfer.grammar import GrammarChecker, GrammarState
from specinfer.messages import DraftResult, WorkerInfo
from specinfer.outbox import Outbox, split_frames
from specinfer.rpc import MAX_MESSAGE_BYTES
from specinfer.telemetry import Telemetry
from specinfer.telemetry.work import trace_work
from specinfer.turns import Turns, read_frames
from specinfer.v1 import draft_pb2, draft_pb2_grpc
from specinfer_draft.engine import DraftEngine

SERVICE_NAME = "specinfer.v1.DraftService"
MAX_UNANSWERED = 4096
MAX_FRAME_RESULTS = 256
# Leaves room for what surrounds the results.
MAX_FRAME_BYTES = MAX_MESSAGE_BYTES // 2

Context = grpc.aio.ServicerContext[Any, Any]
Frames = AsyncIterator[draft_pb2.DraftRequest]


@dataclass(frozen=True)
class Answer:
    """An item and what came of it: a DraftResult, None for an open or a close, or an error."""

    item: draft_pb2.DraftItem
    outcome: DraftResult | SpecinferError | None


class DraftServicer(draft_pb2_grpc.DraftServiceServicer):
    """Serves one engine.

    Args:
        engine: grows the trees.
        info: what this worker is.
        grammars: compiles what outputs have to match.
        telemetry: where spans go, or None.
    """

    def __init__(
        self,
        engine: DraftEngine,
        info: WorkerInfo,
        grammars: GrammarChecker,
        telemetry: Telemetry | None = None,
    ) -> None:
        self._engine = engine
        self._info = info
        self._grammars = grammars
        self._telemetry = telemetry or Telemetry()

    async def Draft(
        self, request_iterator: Frames, context: Context
    ) -> AsyncIterator[draft_pb2.DraftResponse]:
        """Answer every item of every frame exactly once."""
        outbox = Outbox[Answer](max_unanswered=MAX_UNANSWERED, max_batch=MAX_FRAME_RESULTS)
        # The outbox stands for the stream: sessions are its own until another one opens them.
        turns = Turns[draft_pb2.DraftItem](lambda item: self._handle(item, outbox))
        reader = asyncio.create_task(read_frames(request_iterator, outbox.expect_one, turns))
        reader.add_done_callback(lambda _: outbox.close())
        try:
            async for answers in outbox.batches():
                # Translated here and not where they are put: the engine's thread has trees to grow.
                for results in split_frames(map(_result, answers), MAX_FRAME_BYTES):
                    load = load_to_wire(self._engine.load())
                    yield draft_pb2.DraftResponse(results=results, load=load)
            await reader
        finally:
            reader.cancel()
            turns.cancel()
            self._engine.close_stream(outbox)

    async def GetInfo(
        self, request: draft_pb2.DraftServiceGetInfoRequest, context: Context
    ) -> draft_pb2.DraftServiceGetInfoResponse:
        """What this worker is."""
        return draft_pb2.DraftServiceGetInfoResponse(info=worker_info_to_wire(self._info))

    def _handle(
        self, item: draft_pb2.DraftItem, outbox: Outbox[Answer]
    ) -> Coroutine[Any, Any, None] | None:
        if item.open.HasField("grammar"):
            return self._open_with_grammar(item, outbox)
        self._submit(item, outbox)
        return None

    async def _open_with_grammar(self, item: draft_pb2.DraftItem, outbox: Outbox[Answer]) -> None:
        try:
            num_prompt = item.open.num_prompt_tokens or len(item.open.token_ids)
            grammar = grammar_from_wire(item.open.grammar)
            state = await self._grammars.begin(grammar, item.open.token_ids[num_prompt:])
        except SpecinferError as error:
            outbox.put(Answer(item, error))
            return
        self._submit(item, outbox, state)

    def _submit(
        self,
        item: draft_pb2.DraftItem,
        outbox: Outbox[Answer],
        grammar: GrammarState | None = None,
    ) -> None:
        """Hand one item to the engine; a bad one is answered at once."""
        try:
            future = self._call(item, outbox, grammar)
        except SpecinferError as error:
            outbox.put(Answer(item, error))
            return
        trace_work(self._telemetry, f"draft {item.WhichOneof('action')}", item, future)
        future.add_done_callback(lambda done: outbox.put(Answer(item, _outcome(done))))

    def _call(
        self, item: draft_pb2.DraftItem, stream: object, grammar: GrammarState | None
    ) -> Future[Any]:
        action = item.WhichOneof("action")
        if action == "propose":
            propose = item.propose
            return self._engine.propose(
                item.session_id,
                item.epoch,
                propose.known_len,
                propose.new_token_ids,
                shape_from_wire(propose.shape),
                propose.deadline_seconds,
                owner=item.owner,
            )
        if action == "open":
            sampling = sampling_from_wire(item.open.sampling)
            return self._engine.open(
                item.session_id,
                item.epoch,
                item.open.token_ids,
                sampling,
                item.open.num_prompt_tokens,
                grammar=grammar,
                owner=item.owner,
                stream=stream,
            )
        if action == "close":
            return self._engine.close(item.session_id, owner=item.owner)
        raise InvalidRequest("an item opens, proposes or closes", field="action")


def _outcome(future: Future[Any]) -> DraftResult | SpecinferError | None:
    error = future.exception()
    if error is None:
        result: DraftResult | None = future.result()
        return result
    return error if isinstance(error, SpecinferError) else InternalError(str(error))


def _result(answer: Answer) -> draft_pb2.DraftItemResult:
    item, outcome = answer.item, answer.outcome
    if isinstance(outcome, DraftResult):
        return draft_result_to_wire(item, outcome)
    status = None if outcome is None else status_to_wire(outcome)
    return draft_pb2.DraftItemResult(
        item_id=item.item_id, session_id=item.session_id, epoch=item.epoch, status=status
    )
