"""The two kinds of link: what a router asks of a draft worker and of a verify worker.

Thin over `links.py`: each method builds one item of the wire. This module knows nothing of rounds,
retries or which worker is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc.aio

from specinfer.convert import (
    draft_result_from_wire,
    fill_shape,
    fill_tree,
    grammar_to_wire,
    sampling_to_wire,
    verify_result_from_wire,
    worker_info_from_wire,
)
from specinfer.errors import ResourceExhausted
from specinfer.messages import DraftResult, Grammar, ShapeQuery, VerifyResult, WorkerInfo
from specinfer.rpc import error_from_rpc
from specinfer.sampling import SamplingParams
from specinfer.tree import TokenTree
from specinfer.v1 import draft_pb2, draft_pb2_grpc, verify_pb2, verify_pb2_grpc
from specinfer_router.answer import Answer
from specinfer_router.crowd import RecentMost
from specinfer_router.links import WorkerLink

MAX_TOKENIZER_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class TokenizerFiles:
    """What a verify worker says of its tokenizer.

    Attributes:
        tokenizer_json: bytes of tokenizer.json.
        chat_template: jinja2 template of a conversation, or "".
        eos_token_ids: tokens that end a text.
        bos_token: begin token's text, or "".
        eos_token: end token's text, or "".
    """

    tokenizer_json: bytes
    chat_template: str
    eos_token_ids: tuple[int, ...]
    bos_token: str
    eos_token: str


class DraftLink(WorkerLink[draft_pb2.DraftRequest]):
    """A stream to a draft worker. Methods raise as `WorkerLink._send` does."""

    tier = "draft"

    def open(
        self,
        session_id: str,
        epoch: int,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        num_prompt_tokens: int,
        *,
        grammar: Grammar | None = None,
        owner: int = 0,
        traceparent: str = "",
    ) -> Answer[None]:
        """Let the worker follow a session whose last token is the root."""
        frame, item_id = draft_pb2.DraftRequest(), self._item_id()
        frame.items.add(
            item_id=item_id,
            session_id=session_id,
            epoch=epoch,
            owner=owner,
            traceparent=traceparent,
            open=draft_pb2.OpenDraft(
                token_ids=token_ids,
                sampling=sampling_to_wire(sampling),
                num_prompt_tokens=num_prompt_tokens,
                grammar=grammar_to_wire(grammar),
            ),
        )
        return self._send(frame, item_id, session_id, _nothing)

    def propose(
        self,
        session_id: str,
        epoch: int,
        known_len: int,
        new_token_ids: Sequence[int],
        shape: ShapeQuery,
        deadline_seconds: float,
        *,
        owner: int = 0,
        traceparent: str = "",
    ) -> Answer[DraftResult]:
        """Ask for a tree below the last of the new tokens, or of the known ones."""
        frame, item_id = draft_pb2.DraftRequest(), self._item_id()
        item = frame.items.add()
        _address(item, item_id, session_id, epoch, owner, traceparent)
        # Filled in place: a message that is given to another one is copied by way of its bytes.
        propose = item.propose
        propose.known_len = known_len
        propose.new_token_ids.extend(new_token_ids)
        propose.deadline_seconds = deadline_seconds
        fill_shape(propose.shape, shape)
        return self._send(frame, item_id, session_id, draft_result_from_wire)

    def forget(self, session_id: str, epoch: int, *, owner: int = 0) -> Answer[None]:
        """Let the worker drop a session."""
        frame, item_id = draft_pb2.DraftRequest(), self._item_id()
        frame.items.add(
            item_id=item_id,
            session_id=session_id,
            epoch=epoch,
            owner=owner,
            close=draft_pb2.CloseDraft(),
        )
        return self._send(frame, item_id, session_id, _nothing, patient=True)

    async def _fetch_info(self, seconds: float) -> WorkerInfo:
        stub = draft_pb2_grpc.DraftServiceStub(self._channel)
        answer = await stub.GetInfo(draft_pb2.DraftServiceGetInfoRequest(), timeout=seconds)
        return worker_info_from_wire(answer.info)

    def _open_stream(self) -> grpc.aio.StreamStreamCall[bytes, Any]:
        method: grpc.aio.StreamStreamMultiCallable[bytes, Any] = self._channel.stream_stream(
            "/specinfer.v1.DraftService/Draft",
            response_deserializer=draft_pb2.DraftResponse.FromString,
        )
        return method()


class VerifyLink(WorkerLink[verify_pb2.VerifyRequest]):
    """A stream to a verify worker. Methods raise as `WorkerLink._send` does.

    Attributes:
        recent_seats: how many sessions of ours used it of late.
    """

    tier = "verify"

    def __init__(self, address: str, **options: Any) -> None:
        """As `WorkerLink`."""
        super().__init__(address, **options)
        self.recent_seats = RecentMost()

    def open(
        self,
        session_id: str,
        epoch: int,
        token_ids: Sequence[int],
        num_prompt_tokens: int,
        sampling: SamplingParams,
        num_logprobs: int | None,
        *,
        grammar: Grammar | None = None,
        owner: int = 0,
        traceparent: str = "",
    ) -> Answer[None]:
        """Bring a session to the worker; its last token is the root."""
        frame, item_id = verify_pb2.VerifyRequest(), self._item_id()
        frame.items.add(
            item_id=item_id,
            session_id=session_id,
            epoch=epoch,
            owner=owner,
            traceparent=traceparent,
            open=verify_pb2.OpenVerify(
                token_ids=token_ids,
                num_prompt_tokens=num_prompt_tokens,
                sampling=sampling_to_wire(sampling),
                num_logprobs=num_logprobs,
                grammar=grammar_to_wire(grammar),
            ),
        )
        return self._send(frame, item_id, session_id, _nothing)

    def step(
        self,
        session_id: str,
        epoch: int,
        tree: TokenTree,
        *,
        num_tokens: int = 1,
        owner: int = 0,
        traceparent: str = "",
    ) -> Answer[VerifyResult]:
        """Have a tree checked and what it confirms committed to the worker's KV.

        Below a root alone up to `num_tokens` tokens are decoded.
        """
        frame, item_id = verify_pb2.VerifyRequest(), self._item_id()
        item = frame.items.add()
        _address(item, item_id, session_id, epoch, owner, traceparent)
        step = item.step
        fill_tree(step.tree, tree)
        step.num_tokens = num_tokens
        return self._send(frame, item_id, session_id, verify_result_from_wire)

    def forget(self, session_id: str, epoch: int, *, owner: int = 0) -> Answer[None]:
        """Let the worker give a session's KV up."""
        frame, item_id = verify_pb2.VerifyRequest(), self._item_id()
        frame.items.add(
            item_id=item_id,
            session_id=session_id,
            epoch=epoch,
            owner=owner,
            close=verify_pb2.CloseVerify(),
        )
        return self._send(frame, item_id, session_id, _nothing, patient=True)

    async def fetch_tokenizer(self, seconds: float = 60.0) -> TokenizerFiles:
        """The target's tokenizer; raises the worker's error, or ResourceExhausted if it is huge."""
        stub = verify_pb2_grpc.VerifyServiceStub(self._channel)
        pieces: list[verify_pb2.GetTokenizerResponse] = []
        num_bytes = 0
        try:
            async for piece in stub.GetTokenizer(verify_pb2.GetTokenizerRequest(), timeout=seconds):
                num_bytes += piece.ByteSize()
                if num_bytes > MAX_TOKENIZER_BYTES:
                    raise ResourceExhausted(
                        f"the tokenizer at {self.address} exceeds {MAX_TOKENIZER_BYTES} bytes"
                    )
                pieces.append(piece)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        first = pieces[0] if pieces else verify_pb2.GetTokenizerResponse()
        return TokenizerFiles(
            tokenizer_json=b"".join(piece.tokenizer_json for piece in pieces),
            chat_template=first.chat_template,
            eos_token_ids=tuple(first.eos_token_ids),
            bos_token=first.bos_token,
            eos_token=first.eos_token,
        )

    async def _fetch_info(self, seconds: float) -> WorkerInfo:
        stub = verify_pb2_grpc.VerifyServiceStub(self._channel)
        answer = await stub.GetInfo(verify_pb2.VerifyServiceGetInfoRequest(), timeout=seconds)
        return worker_info_from_wire(answer.info)

    def _open_stream(self) -> grpc.aio.StreamStreamCall[bytes, Any]:
        method: grpc.aio.StreamStreamMultiCallable[bytes, Any] = self._channel.stream_stream(
            "/specinfer.v1.VerifyService/Verify",
            response_deserializer=verify_pb2.VerifyResponse.FromString,
        )
        return method()


def _address(
    item: draft_pb2.DraftItem | verify_pb2.VerifyItem,
    item_id: int,
    session_id: str,
    epoch: int,
    owner: int,
    traceparent: str,
) -> None:
    """Say whose round an item is of; of every round, and by keywords it takes twice as long."""
    item.item_id = item_id
    item.session_id = session_id
    item.epoch = epoch
    item.owner = owner
    item.traceparent = traceparent


def _nothing(result: Any) -> None:
    """Opening and forgetting bring no value back."""
