"""A verify worker without a model, on the real protocol, over real gRPC; and what fakes share.

The target is a table: its next token is a function of all tokens before it and of the seed, so that
a single wrong token anywhere changes everything after it.
"""

from __future__ import annotations

import asyncio
import hashlib
import zlib
from array import array
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc.aio

from specinfer.convert import (
    status_to_wire,
    tree_from_wire,
    verify_result_to_wire,
    worker_info_to_wire,
)
from specinfer.errors import (
    InvalidTree,
    LeaseLost,
    NotFound,
    ResourceExhausted,
    SpecinferError,
    StaleEpoch,
)
from specinfer.messages import (
    StepCost,
    TokenLogprob,
    VerifyResult,
    WorkerInfo,
)
from specinfer.rpc import SERVER_OPTIONS
from specinfer.tree import TokenTree
from specinfer.v1 import tree_pb2, verify_pb2, verify_pb2_grpc
from tests.kit.tokenizers import byte_level_tokenizer

TOKENIZER_JSON = byte_level_tokenizer().to_str().encode()
VOCAB_SIZE = byte_level_tokenizer().get_vocab_size()
EOS = 0
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def next_token(token_ids: Sequence[int], seed: int) -> int:
    """The target's token after these: never the end token, which a test has to plant."""
    return 1 + zlib.crc32(array("Q", [seed, *token_ids]).tobytes()) % (VOCAB_SIZE - 1)


def continuation(token_ids: Sequence[int], num_tokens: int, seed: int = 0) -> tuple[int, ...]:
    """What plain decoding of the table gives."""
    tokens = list(token_ids)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens, seed))
    return tuple(tokens[len(token_ids) :])


def info_of(worker_id: str, **changes: Any) -> WorkerInfo:
    """A worker's description, the same for both tiers unless changed."""
    facts: dict[str, Any] = {
        "worker_id": worker_id,
        "model_name": "table",
        "model_hash": "model",
        "tokenizer_hash": hashlib.sha256(TOKENIZER_JSON).hexdigest(),
        "vocab_size": VOCAB_SIZE,
        "dtype": "float32",
        "device": "cpu",
        "max_model_len": 512,
        "max_sessions": 64,
        "max_tree_nodes": 32,
        "num_blocks": 256,
        "block_size": 16,
        "row_invariant": True,
        "acceptance_rules": ("match",),
        "step_costs": (StepCost(1, 0, 0.001), StepCost(8, 0, 0.0015), StepCost(32, 0, 0.006)),
    }
    return WorkerInfo(**(facts | changes))


@dataclass
class FakeSession:
    token_ids: list[int]
    seed: int
    epoch: int = 0
    num_prompt_tokens: int = 0
    num_logprobs: int | None = None
    last: VerifyResult | None = None


@dataclass
class FakeWorker:
    """What both fakes share: a server that can be killed and started again on its port.

    Attributes:
        info: what the worker says it is.
        frames: (action, session id) of the items of each frame that came.
        gate: cleared, the worker answers nothing until it is set again.
        streams: streams opened so far.
        slow_actions: kinds of items that it takes `slow_seconds` for.
    """

    info: WorkerInfo
    frames: list[list[tuple[str, str]]] = field(default_factory=list)
    sessions: dict[str, FakeSession] = field(default_factory=dict)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    streams: int = 0
    port: int = 0
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    draining: bool = False
    slow_actions: frozenset[str] = frozenset()
    slow_seconds: float = 0.0
    _server: grpc.aio.Server | None = None
    _dying: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        self.gate.set()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Serve, on the same port as before when there was one."""
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        self.add_to(self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def kill(self) -> None:
        """End at once and forget every session."""
        assert self._server is not None
        await self._server.stop(0)
        self._server = None
        self.sessions.clear()

    async def die(self) -> None:
        """End in the middle of an answer, which never comes."""
        self._dying = asyncio.create_task(self.kill())
        await asyncio.Event().wait()

    async def stop(self) -> None:
        if self._server is not None:
            await self.kill()

    def add_to(self, server: grpc.aio.Server) -> None:
        raise NotImplementedError

    async def answer(self, item: Any) -> Any:
        raise NotImplementedError

    async def answers(self, request_iterator: Any) -> AsyncIterator[list[Any]]:
        """The results of each frame."""
        self.streams += 1
        async for frame in request_iterator:
            self.frames.append(
                [(item.WhichOneof("action"), item.session_id) for item in frame.items]
            )
            self.arrived.set()
            await self.gate.wait()
            if any(item.WhichOneof("action") in self.slow_actions for item in frame.items):
                await asyncio.sleep(self.slow_seconds)
            yield [result for item in frame.items if (result := await self.answer(item))]

    async def wait_for(self, action: str, number: int) -> None:
        """Wait until so many items of a kind have come."""
        async with asyncio.timeout(10):
            while self.actions()[action] < number:
                self.arrived.clear()
                await self.arrived.wait()

    def actions(self) -> Counter[str]:
        """How many items of each kind came."""
        return Counter(action for frame in self.frames for action, _ in frame)

    def load(self) -> tree_pb2.WorkerLoad:
        return tree_pb2.WorkerLoad(num_sessions=len(self.sessions), draining=self.draining)


@dataclass
class FakeVerifier(FakeWorker, verify_pb2_grpc.VerifyServiceServicer):
    """A verify worker whose target is the table.

    Attributes:
        eos_at: completion length after which the target says the end token.
        break_steps: steps, counted from 1, at which the whole worker dies instead of answering.
        max_step_nodes: larger trees are refused, whatever the info says.
        lie: what to do wrong in results: "tokens", "epoch", "path" or "".
        lose_at: step, counted from 1, from which on somebody else owns every session.
        most_plain_tokens: most tokens that one step without guesses brings, if it asks for them.
    """

    eos_at: int = 10**9
    break_steps: frozenset[int] = frozenset()
    max_step_nodes: int = 10**9
    lie: str = ""
    lose_at: int = 10**9
    most_plain_tokens: int = 1
    num_steps: int = 0
    num_rows: list[int] = field(default_factory=list)
    chat_template: str = CHAT_TEMPLATE

    def add_to(self, server: grpc.aio.Server) -> None:
        verify_pb2_grpc.add_VerifyServiceServicer_to_server(self, server)

    async def Verify(
        self, request_iterator: Any, context: Any
    ) -> AsyncIterator[verify_pb2.VerifyResponse]:
        async for results in self.answers(request_iterator):
            yield verify_pb2.VerifyResponse(results=results, load=self.load())

    async def GetInfo(self, request: Any, context: Any) -> Any:
        return verify_pb2.VerifyServiceGetInfoResponse(info=worker_info_to_wire(self.info))

    async def GetTokenizer(
        self, request: Any, context: Any
    ) -> AsyncIterator[verify_pb2.GetTokenizerResponse]:
        half = len(TOKENIZER_JSON) // 2
        yield verify_pb2.GetTokenizerResponse(
            tokenizer_json=TOKENIZER_JSON[:half],
            chat_template=self.chat_template,
            eos_token_ids=[EOS],
            eos_token="<|end|>",
        )
        yield verify_pb2.GetTokenizerResponse(tokenizer_json=TOKENIZER_JSON[half:])

    async def answer(self, item: verify_pb2.VerifyItem) -> verify_pb2.VerifyItemResult:
        try:
            result = self._do(item)
        except SpecinferError as error:
            return verify_pb2.VerifyItemResult(
                item_id=item.item_id, session_id=item.session_id, status=status_to_wire(error)
            )
        if self.num_steps in self.break_steps and item.WhichOneof("action") == "step":
            await self.die()
        if result is None:
            return verify_pb2.VerifyItemResult(item_id=item.item_id, session_id=item.session_id)
        return self._tell(item, result)

    def _do(self, item: verify_pb2.VerifyItem) -> VerifyResult | None:
        kind = item.WhichOneof("action")
        if kind == "open":
            if len(self.sessions) >= self.info.max_sessions:
                raise ResourceExhausted("full")
            opened = item.open
            self.sessions[item.session_id] = FakeSession(
                list(opened.token_ids),
                opened.sampling.seed,
                item.epoch,
                opened.num_prompt_tokens,
                opened.num_logprobs if opened.HasField("num_logprobs") else None,
            )
            return None
        if kind == "close":
            self.sessions.pop(item.session_id, None)
            return None
        return self._step(item)

    def _step(self, item: verify_pb2.VerifyItem) -> VerifyResult:
        self.num_steps += 1
        if self.num_steps >= self.lose_at:
            raise LeaseLost("somebody has claimed the session")
        session = self.sessions.get(item.session_id)
        if session is None:
            raise NotFound("no such session")
        if item.epoch == session.epoch - 1 and session.last is not None:
            return session.last
        if item.epoch != session.epoch:
            raise StaleEpoch(f"at {session.epoch}, asked for {item.epoch}")
        tree = tree_from_wire(item.step.tree)
        tree.check_vocabulary(VOCAB_SIZE)
        self.num_rows.append(len(tree))
        if tree.token_ids[0] != session.token_ids[-1] or len(tree) > self.max_step_nodes:
            raise InvalidTree("not a tree of this session")
        if len(session.token_ids) - 1 + tree.max_depth >= self.info.max_model_len:
            raise InvalidTree("a tree past the model's length")
        num_tokens = min(max(1, item.step.num_tokens), self.most_plain_tokens)
        session.last = self._walk(session, tree, num_tokens)
        session.token_ids.extend(session.last.token_ids)
        session.epoch += 1
        return session.last

    def _walk(self, session: FakeSession, tree: TokenTree, num_tokens: int) -> VerifyResult:
        node = 0
        path: list[int] = []
        tokens: list[int] = []
        while True:
            token = self._target([*session.token_ids, *tokens], session)
            tokens.append(token)
            if len(tree) == 1 and len(tokens) < num_tokens and token != EOS:
                continue
            if token not in tree.children[node]:
                break
            node = tree.children[node][token]
            path.append(node)
        logprobs = [
            TokenLogprob(token, -0.5, ((token, -0.5),) * session.num_logprobs)
            for token in tokens
            if session.num_logprobs is not None
        ]
        return VerifyResult(
            session.epoch + 1,
            tuple(path),
            tuple(tokens),
            tuple(logprobs),
            num_cached_tokens=2 if session.epoch == 0 else 0,
            num_rows=len(tree),
            compute_seconds=1e-6,
        )

    def _target(self, token_ids: Sequence[int], session: FakeSession) -> int:
        if len(token_ids) - session.num_prompt_tokens == self.eos_at:
            return EOS
        return next_token(token_ids, session.seed)

    def _tell(
        self, item: verify_pb2.VerifyItem, result: VerifyResult
    ) -> verify_pb2.VerifyItemResult:
        wire = verify_result_to_wire(item, result)
        if self.lie == "tokens":
            wire.token_ids.append(1)
        elif self.lie == "epoch":
            wire.epoch += 1
        elif self.lie == "path":
            wire.accepted.append(900)
            wire.token_ids.append(1)
        return wire
