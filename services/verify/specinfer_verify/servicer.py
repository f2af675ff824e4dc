"""VerifyService on the wire: checks, calls, translates. No tensors and no decisions here.

One stream carries frames of items of many sessions. Items go to the engine in the order they came;
results leave as they are made, those that are ready together in one frame. A grammar is compiled on
another thread; its session's later items wait for it, those of others do not.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import grpc.aio

from specinfer.convert import (
    grammar_from_wire,
    load_to_wire,
    sampling_from_wire,
    status_to_wire,
    tree_from_wire,
    verify_result_to_wire,
    worker_info_to_wire,
)
from specinfer.errors import InternalError, InvalidRequest, SpecinferError
from specinfer.grammar import GrammarChecker, GrammarCompiler, GrammarState
from specinfer.messages import VerifyResult, WorkerInfo
from specinfer.outbox import Outbox, split_frames
from specinfer.rpc import MAX_MESSAGE_BYTES
from specinfer.telemetry import Telemetry
from specinfer.telemetry.work import trace_work
from specinfer.turns import Turns, read_frames
from specinfer.v1 import verify_pb2, verify_pb2_grpc
from specinfer_engine.checkpoint import TokenizerFiles
from specinfer_verify.engine import VerifyEngine

SERVICE_NAME = "specinfer.v1.VerifyService"
ACCEPTANCE_RULES = ("match",)
MAX_UNANSWERED = 4096
MAX_FRAME_RESULTS = 256
# Leaves room for what surrounds the results.
MAX_FRAME_BYTES = MAX_MESSAGE_BYTES // 2
TOKENIZER_PIECE_BYTES = 1 << 20

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True)
class Answer:
    """An item and what came of it: a VerifyResult, None for an open or a close, or an error."""

    item: verify_pb2.VerifyItem
    outcome: VerifyResult | SpecinferError | None


class VerifyServicer(verify_pb2_grpc.VerifyServiceServicer):
    """Serves one engine.

    Args:
        engine: decides the tokens.
        info: what this worker is.
        tokenizer: what a router needs to turn tokens into text.
        eos_token_ids: tokens that end a text.
        telemetry: where spans go, or None.
    """

    def __init__(
        self,
        engine: VerifyEngine,
        info: WorkerInfo,
        tokenizer: TokenizerFiles,
        eos_token_ids: Sequence[int],
        telemetry: Telemetry | None = None,
    ) -> None:
        self._engine = engine
        self._info = info
        self._tokenizer = tokenizer
        self._eos_token_ids = tuple(eos_token_ids)
        self._telemetry = telemetry or Telemetry()
        self._grammars = GrammarChecker(
            GrammarCompiler(tokenizer.tokenizer_json, info.vocab_size, self._eos_token_ids)
        )

    async def Verify(
        self, request_iterator: AsyncIterator[verify_pb2.VerifyRequest], context: Context
    ) -> AsyncIterator[verify_pb2.VerifyResponse]:
        """Answer every item of every frame exactly once."""
        outbox = Outbox[Answer](max_unanswered=MAX_UNANSWERED, max_batch=MAX_FRAME_RESULTS)
        # The outbox stands for the stream: sessions are its own until another one opens them.
        turns = Turns[verify_pb2.VerifyItem](lambda item: self._handle(item, outbox))
        reader = asyncio.create_task(read_frames(request_iterator, outbox.expect_one, turns))
        reader.add_done_callback(lambda _: outbox.close())
        try:
            async for answers in outbox.batches():
                # Translated here and not where they are put: the engine's thread has passes to run.
                for results in split_frames(map(_result, answers), MAX_FRAME_BYTES):
                    load = load_to_wire(self._engine.load())
                    yield verify_pb2.VerifyResponse(results=results, load=load)
            await reader
        finally:
            reader.cancel()
            turns.cancel()
            self._engine.close_stream(outbox)

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

    def _handle(
        self, item: verify_pb2.VerifyItem, outbox: Outbox[Answer]
    ) -> Coroutine[Any, Any, None] | None:
        if item.open.HasField("grammar"):
            return self._open_with_grammar(item, outbox)
        self._submit(item, outbox)
        return None

    async def _open_with_grammar(self, item: verify_pb2.VerifyItem, outbox: Outbox[Answer]) -> None:
        try:
            output_ids = item.open.token_ids[item.open.num_prompt_tokens :]
            grammar = grammar_from_wire(item.open.grammar)
            state = await self._grammars.begin(grammar, output_ids)
        except SpecinferError as error:
            outbox.put(Answer(item, error))
            return
        self._submit(item, outbox, state)

    def _submit(
        self,
        item: verify_pb2.VerifyItem,
        outbox: Outbox[Answer],
        grammar: GrammarState | None = None,
    ) -> None:
        """Hand one item to the engine; a bad one is answered at once."""
        try:
            future = self._call(item, outbox, grammar)
        except SpecinferError as error:
            outbox.put(Answer(item, error))
            return
        trace_work(self._telemetry, f"verify {item.WhichOneof('action')}", item, future)
        future.add_done_callback(lambda done: outbox.put(Answer(item, _outcome(done))))

    def _call(
        self, item: verify_pb2.VerifyItem, stream: object, grammar: GrammarState | None
    ) -> Future[Any]:
        action = item.WhichOneof("action")
        if action == "step":
            tree = tree_from_wire(item.step.tree)
            num_tokens = item.step.num_tokens or 1
            return self._engine.step(
                item.session_id, item.epoch, tree, num_tokens=num_tokens, owner=item.owner
            )
        if action == "open":
            return self._open(item, stream, grammar)
        if action == "close":
            return self._engine.close(item.session_id, owner=item.owner)
        raise InvalidRequest("an item opens, steps or closes", field="action")

    def _open(
        self, item: verify_pb2.VerifyItem, stream: object, grammar: GrammarState | None
    ) -> Future[None]:
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
            grammar=grammar,
            owner=item.owner,
            stream=stream,
        )


def _outcome(future: Future[Any]) -> VerifyResult | SpecinferError | None:
    error = future.exception()
    if error is None:
        result: VerifyResult | None = future.result()
        return result
    return error if isinstance(error, SpecinferError) else InternalError(str(error))


def _result(answer: Answer) -> verify_pb2.VerifyItemResult:
    item, outcome = answer.item, answer.outcome
    if isinstance(outcome, VerifyResult):
        return verify_result_to_wire(item, outcome)
    status = None if outcome is None else status_to_wire(outcome)
    return verify_pb2.VerifyItemResult(
        item_id=item.item_id, session_id=item.session_id, epoch=item.epoch, status=status
    )
