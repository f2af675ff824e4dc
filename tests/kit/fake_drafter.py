"""A draft worker without a model, on the real protocol, over real gRPC.

It knows the target's table and errs as often as it is told; a hostile one answers with whatever a
broken peer could send.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc.aio

from specinfer.convert import (
    draft_result_to_wire,
    shape_from_wire,
    status_to_wire,
    worker_info_to_wire,
)
from specinfer.errors import NotFound
from specinfer.messages import DraftResult, ShapeQuery
from specinfer.tree import TokenTree
from specinfer.v1 import draft_pb2, draft_pb2_grpc, tree_pb2
from tests.kit.fake_workers import VOCAB_SIZE, FakeSession, FakeWorker, next_token


@dataclass
class FakeDrafter(FakeWorker, draft_pb2_grpc.DraftServiceServicer):
    """A draft worker that knows the target's table.

    Attributes:
        skill: how often its first guess is right.
        hostile: answer with what a broken peer could send, chosen at random.
        fail: refuse every propose.
        max_proposes: proposes answered before the whole worker dies.
    """

    skill: float = 0.7
    hostile: bool = False
    fail: bool = False
    max_proposes: int = 10**9
    num_proposes: int = 0
    shapes: list[ShapeQuery] = field(default_factory=list)
    random: random.Random = field(default_factory=lambda: random.Random(7))

    def add_to(self, server: grpc.aio.Server) -> None:
        draft_pb2_grpc.add_DraftServiceServicer_to_server(self, server)

    async def Draft(
        self, request_iterator: Any, context: Any
    ) -> AsyncIterator[draft_pb2.DraftResponse]:
        async for results in self.answers(request_iterator):
            yield draft_pb2.DraftResponse(results=results, load=self.load())

    async def GetInfo(self, request: Any, context: Any) -> Any:
        return draft_pb2.DraftServiceGetInfoResponse(info=worker_info_to_wire(self.info))

    async def answer(self, item: draft_pb2.DraftItem) -> draft_pb2.DraftItemResult:
        kind = item.WhichOneof("action")
        plain = draft_pb2.DraftItemResult(item_id=item.item_id, session_id=item.session_id)
        if kind == "open":
            self.sessions[item.session_id] = FakeSession(
                list(item.open.token_ids), item.open.sampling.seed, item.epoch
            )
        elif kind == "close":
            self.sessions.pop(item.session_id, None)
        else:
            return await self._propose(item)
        return plain

    async def _propose(self, item: draft_pb2.DraftItem) -> draft_pb2.DraftItemResult:
        self.num_proposes += 1
        if self.num_proposes > self.max_proposes:
            await self.die()
        session = self.sessions.get(item.session_id)
        known = item.propose.known_len
        if session is None or self.fail or known > len(session.token_ids):
            error = NotFound("no such session here")
            return draft_pb2.DraftItemResult(
                item_id=item.item_id, session_id=item.session_id, status=status_to_wire(error)
            )
        session.token_ids[known:] = item.propose.new_token_ids
        shape = shape_from_wire(item.propose.shape)
        self.shapes.append(shape)
        tree = self._grow(session, shape)
        wire = draft_result_to_wire(item, DraftResult(item.epoch, tree, compute_seconds=1e-6))
        return self._spoil(wire) if self.hostile else wire

    def _grow(self, session: FakeSession, shape: ShapeQuery) -> TokenTree:
        """A random tree whose spine follows the table as far as skill goes."""
        token_ids, parents, depths = [session.token_ids[-1]], [-1], [0]
        spine = 0
        while len(token_ids) <= shape.max_nodes:
            on_spine = depths[spine] < shape.max_depth and self.random.random() < 0.7
            parent = spine if on_spine else self.random.randrange(len(token_ids))
            if depths[parent] >= shape.max_depth:
                break
            path = TokenTree(tuple(token_ids), tuple(parents)).path_token_ids(parent)
            right = next_token([*session.token_ids[:-1], *path], session.seed)
            guess = (
                right if self.random.random() < self.skill else self.random.randrange(VOCAB_SIZE)
            )
            if (parent, guess) in set(zip(parents, token_ids, strict=True)):
                break
            token_ids.append(guess)
            parents.append(parent)
            depths.append(depths[parent] + 1)
            if parent == spine and guess == right:
                spine = len(token_ids) - 1
        return TokenTree(tuple(token_ids), tuple(parents))

    def _spoil(self, wire: draft_pb2.DraftItemResult) -> draft_pb2.DraftItemResult:
        """What a broken or malicious drafter could send instead."""
        tree = wire.tree
        how = self.random.randrange(12)
        if how == 0:
            tree.parents[-1] = len(tree.parents) + 3
        elif how == 1:
            tree.token_ids[-1] = VOCAB_SIZE + 5
        elif how == 2:
            tree.token_ids.extend(range(1, 2000))
            tree.parents.extend([0] * 1999)
        elif how == 3:
            tree.token_ids[0] = (tree.token_ids[0] + 1) % VOCAB_SIZE
        elif how == 4:
            wire.epoch += self.random.choice([1, 7])
        elif how == 5:
            del tree.parents[-1:]
        elif how == 6:
            wire.ClearField("tree")
        elif how == 7:
            wire.session_id = "somebody else"
        elif how == 8:
            chain = [tree.token_ids[0], *(self.random.randrange(VOCAB_SIZE) for _ in range(60))]
            wire.tree.CopyFrom(
                tree_pb2.TokenTree(token_ids=chain, parents=range(-1, len(chain) - 1))
            )
        elif how == 9:
            wire.status.code = "NO SUCH CODE"
        elif how == 10 and len(tree.token_ids) > 2:
            tree.token_ids[2], tree.parents[2] = tree.token_ids[1], tree.parents[1]
        return wire
