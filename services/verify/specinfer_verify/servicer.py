"""VerifyService on the wire: checks, calls, translates. No tensors and no decisions here.

One stream carries frames of items of many sessions. Items go to the engine in the order they came;
results leave as they are made, those that are ready together in one frame.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from typing import Any

import grpc.aio

from specinfer.convert import (
    load_to_wire,
    sampling_from_wire,
    status_to_wire,
    tree_from_wire,
    verify_result_to_wire,
    worker_info_to_wire,
)
from specinfer.errors import InternalError, InvalidRequest, SpecinferError
from specinfer.messages import VerifyResult, WorkerInfo
from specinfer.v1 import verify_pb2, verify_pb2_grpc
from specinfer_engine.model import TokenizerFiles
from specinfer_verify.engine import VerifyEngine

SERVICE_NAME = "specinfer.v1.VerifyService"
ACCEPTANCE_RULES = ("match",)
MAX_UNANSWERED = 4096
TOKENIZER_PIECE_BYTES = 1 << 20

Context = grpc.aio.ServicerContext[Any, Any]

log = logging.getLogger(__name__)


class VerifyServicer(verify_pb2_grpc.VerifyServiceServicer):
    """Serves one engine.

    Args:
        engine: decides the tokens.
        info: what this worker is.
        tokenizer: what a router needs to turn tokens into text.
        eos_token_ids: tokens that end a text.
    """

    def __init__(
        self,
        engine: VerifyEngine,
        info: WorkerInfo,
        tokenizer: TokenizerFiles,
        eos_token_ids: Sequence[int],
    ) -> None:
        self._engine = engine
        self._info = info
        self._tokenizer = tokenizer
        self._eos_token_ids = tuple(eos_token_ids)

    async def Verify(
        self, request_iterator: AsyncIterator[verify_pb2.VerifyRequest], context: Context
    ) -> AsyncIterator[verify_pb2.VerifyResponse]:
        """Answer every item of every frame exactly once."""
        outbox = Outbox(MAX_UNANSWERED)
        # The outbox stands for the stream: sessions are its own until another one opens them.
        reader = asyncio.create_task(self._read(request_iterator, outbox))
        try:
            async for results in outbox.batches(reader):
                load = load_to_wire(self._engine.load())
                yield verify_pb2.VerifyResponse(results=results, load=load)
            await reader
        finally:
            reader.cancel()
            self._engine.close_owned(outbox)

    async def GetInfo(
        self, request: verify_pb2.VerifyServiceGetInfoRequest, context: Context
    ) -> verify_pb2.VerifyServiceGetInfoResponse:
        """What this worker is."""
        return verify_pb2.VerifyServiceGetInfoResponse(info=worker_info_to_wire(self._info))

    async def GetTokenizer(
        self, request: verify_pb2.GetTokenizerRequest, context: Context
    ) -> AsyncIterator[verify_pb2.GetTokenizerResponse]:
        """The tokenizer in pieces; the first one has the rest of what text needs."""
        content = self._tokenizer.tokenizer_json
        yield verify_pb2.GetTokenizerResponse(
            tokenizer_json=content[:TOKENIZER_PIECE_BYTES],
            chat_template=self._tokenizer.chat_template or "",
            eos_token_ids=self._eos_token_ids,
            bos_token=self._tokenizer.bos_token,
            eos_token=self._tokenizer.eos_token,
        )
        for start in range(TOKENIZER_PIECE_BYTES, len(content), TOKENIZER_PIECE_BYTES):
            piece = content[start : start + TOKENIZER_PIECE_BYTES]
            yield verify_pb2.GetTokenizerResponse(tokenizer_json=piece)

    async def _read(self, frames: AsyncIterator[verify_pb2.VerifyRequest], outbox: Outbox) -> None:
        async for frame in frames:
            for item in frame.items:
                await outbox.expect_one()
                self._submit(item, outbox)

    def _submit(self, item: verify_pb2.VerifyItem, outbox: Outbox) -> None:
        """Hand one item to the engine; a bad one is answered at once."""
        try:
            future = self._call(item, outbox)
        except SpecinferError as error:
            outbox.put(_failed(item, error))
            return
        future.add_done_callback(lambda done: outbox.put(_answered(item, done)))

    def _call(self, item: verify_pb2.VerifyItem, owner: object) -> Future[Any]:
        action = item.WhichOneof("action")
        if action == "step":
            tree = tree_from_wire(item.step.tree)
            return self._engine.step(item.session_id, item.epoch, tree)
        if action == "open":
            return self._open(item, owner)
        if action == "close":
            return self._engine.close(item.session_id)
        raise InvalidRequest("an item opens, steps or closes", field="action")

    def _open(self, item: verify_pb2.VerifyItem, owner: object) -> Future[None]:
        rule = item.open.acceptance_rule or ACCEPTANCE_RULES[0]
        if rule not in ACCEPTANCE_RULES:
            raise InvalidRequest(
                f"the acceptance rule is one of {', '.join(ACCEPTANCE_RULES)}, got {rule!r}",
                field="acceptance_rule",
            )
        return self._engine.open(
            item.session_id,
            item.epoch,
            tuple(item.open.token_ids),
            sampling_from_wire(item.open.sampling),
            item.open.num_prompt_tokens,
            item.open.num_logprobs if item.open.HasField("num_logprobs") else None,
            owner=owner,
        )


class Outbox:
    """Results on their way to one stream, put from any thread and taken in batches.

    Args:
        limit: most items read and not yet answered; reading waits beyond it, so a peer that sends
            and never reads holds itself up.
    """

    def __init__(self, limit: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._limit = limit
        self._lock = threading.Lock()
        self._results: list[verify_pb2.VerifyItemResult] = []
        self._num_expected = 0
        self._changed = asyncio.Event()
        self._room = asyncio.Event()

    async def expect_one(self) -> None:
        """Wait until one more item may be read."""
        while self._num_expected >= self._limit:
            self._room.clear()
            await self._room.wait()
        self._num_expected += 1

    def put(self, result: verify_pb2.VerifyItemResult) -> None:
        """Add a result, from any thread; the loop is woken once for a batch."""
        with self._lock:
            self._results.append(result)
            first = len(self._results) == 1
        if first:
            self._wake(self._changed.set)

    async def batches(
        self, reader: asyncio.Task[None]
    ) -> AsyncIterator[list[verify_pb2.VerifyItemResult]]:
        """Results that are ready together, until the reader is done and all is answered."""
        reader.add_done_callback(lambda _: self._changed.set())
        while not (reader.done() and (self._num_expected == 0 or reader.exception())):
            await self._changed.wait()
            self._changed.clear()
            with self._lock:
                results, self._results = self._results, []
            if results:
                self._num_expected -= len(results)
                self._room.set()
                yield results

    def _wake(self, callback: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:
            # The loop is closed: the process is ending and nobody reads the result.
            log.debug("a result came after the event loop had closed")


def _answered(
    item: verify_pb2.VerifyItem, future: Future[VerifyResult | None]
) -> verify_pb2.VerifyItemResult:
    error = future.exception()
    if error is not None:
        kind = error if isinstance(error, SpecinferError) else InternalError(str(error))
        return _failed(item, kind)
    result = future.result()
    if result is not None:
        return verify_result_to_wire(item, result)
    return verify_pb2.VerifyItemResult(
        item_id=item.item_id, session_id=item.session_id, epoch=item.epoch
    )


def _failed(item: verify_pb2.VerifyItem, error: SpecinferError) -> verify_pb2.VerifyItemResult:
    return verify_pb2.VerifyItemResult(
        item_id=item.item_id,
        session_id=item.session_id,
        epoch=item.epoch,
        status=status_to_wire(error),
    )
