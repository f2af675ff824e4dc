"""The real engines and the real router in one process, over a model whose passes are stated waits.

A pass is a wait, so that what overlaps with what decides the speed and the machine does not. The
text follows a rule, which the drafter guesses by a stated chance. This module knows nothing of what
is compared.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import cast
from unittest.mock import patch

import torch
from prometheus_client import CollectorRegistry
from torch import Tensor

from specinfer.messages import ShapeQuery, StepCost, WorkerInfo
from specinfer.metrics import RouterMetrics
from specinfer.step_curve import StepCurve
from specinfer_bench.load.simulated import guess, next_token
from specinfer_bench.local import LocalCluster, LocalDraftLink, LocalVerifyLink, running
from specinfer_bench.simulated_workers import simulated_info, tokenizer_json
from specinfer_draft.drafters.limits import DrafterLimits
from specinfer_draft.drafters.model import ModelDrafter
from specinfer_draft.engine import DraftEngine
from specinfer_engine.batch import SequenceRows
from specinfer_engine.blocks import BlockManager
from specinfer_router.asking import Asking, Question
from specinfer_router.cluster import Cluster
from specinfer_router.guess import Guess
from specinfer_router.opening import SeatLimits
from specinfer_router.policy import StaticShape
from specinfer_router.pool import WorkerPool
from specinfer_router.router import Router, RouterLimits
from specinfer_router.seats import DraftSeat
from specinfer_router.store import MemoryStore
from specinfer_router.tokenizer import ServedTokenizer
from specinfer_router.worker_links import DraftLink, VerifyLink
from specinfer_verify.checks import Limits
from specinfer_verify.engine import VerifyEngine

INFO: WorkerInfo = simulated_info("verify")
NUM_BLOCKS, BLOCK_SIZE = 512, 16
MAX_ROWS = 256
CHAIN = ShapeQuery(max_nodes=4, max_depth=4, widths=(1, 1, 1, 1))
SURE = 30.0


@dataclass(frozen=True)
class World:
    """What takes how long, and what lies beside what.

    Attributes:
        verify_seconds: a pass of the target, whatever is in it.
        draft_seconds: a pass of the drafter, which is one level of a tree.
        commit_seconds: the store's answer to a commit.
        acceptance: chance that a guess is right whose parent is.
        beside: whether the next propose leaves beside the commit, or after it.
        ahead: whether the drafter goes on while the target verifies.
        gathers: whether a pass waits for sessions that are due.
    """

    verify_seconds: float = 0.040
    draft_seconds: float = 0.004
    commit_seconds: float = 0.0
    acceptance: float = 0.9
    beside: bool = True
    ahead: bool = False
    gathers: bool = True


class StatedRunner:
    """A model that is a rule: the next token follows from the last one and its place.

    Args:
        seconds: of a pass.
        acceptance: chance that it says what the target says; 1 is the target.
    """

    def __init__(self, seconds: float, acceptance: float = 1.0) -> None:
        self._seconds = seconds
        self._acceptance = acceptance

    def forward(self, rows: Sequence[SequenceRows]) -> list[Tensor]:
        """Wait, then the logits asked for, float32 [len(logit_rows), vocab_size] a sequence."""
        time.sleep(self._seconds)
        return [self._logits(part) for part in rows]

    def compact(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Nothing is kept: a row says its token and place itself."""

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """As `compact`."""

    def _logits(self, part: SequenceRows) -> Tensor:
        logits = torch.zeros(len(part.logit_rows), INFO.vocab_size)
        for at, row in enumerate(part.logit_rows):
            token, place = part.token_ids[row], part.context_len + part.depths[row]
            logits[at, guess(token, place, self._acceptance)] = SURE
        return logits


class InLineSeat(DraftSeat):
    """Asks the drafter when the answer is waited for: after the commit, not beside it."""

    def ask(
        self, token_ids: Sequence[int], epoch: int, shape: ShapeQuery, *, traceparent: str = ""
    ) -> Asking:
        """Only remember what is to be asked."""
        return Asking(Question(token_ids, epoch, shape, 0.0, 0.0, traceparent), None, [])

    async def answer(self, asking: Asking) -> Guess:
        """Ask now, and wait."""
        asked = asking.question
        return await super().answer(
            super().ask(asked.token_ids, asked.epoch, asked.shape, traceparent=asked.traceparent)
        )


class DistantStore(MemoryStore):
    """A store whose commits take a stated time, as over a network."""

    def __init__(self, commit_seconds: float) -> None:
        super().__init__()
        self._commit_seconds = commit_seconds

    async def commit(
        self,
        session_id: str,
        epoch: int,
        token_ids: Sequence[int],
        finish_reason: str = "",
        *,
        owner: int = 0,
    ) -> int:
        """As the store in memory, later."""
        await asyncio.sleep(self._commit_seconds)
        return await super().commit(session_id, epoch, token_ids, finish_reason, owner=owner)


@contextmanager
def stated_router(world: World) -> Iterator[Router]:
    """A router over engines of such a world, which end with the block."""
    with ExitStack() as stack:
        verifier, drafter = _verifier(world), _drafter(world)
        for engine in (verifier, drafter):
            stack.enter_context(running(engine))
        if not world.beside:
            stack.enter_context(patch("specinfer_router.opening.DraftSeat", InLineSeat))
        router = _router(world, LocalVerifyLink(verifier, INFO), LocalDraftLink(drafter, INFO))
        stack.callback(router.close)
        yield router


def _verifier(world: World) -> VerifyEngine:
    limits = Limits(INFO.vocab_size, INFO.max_model_len, max_rows=MAX_ROWS)
    blocks = BlockManager(NUM_BLOCKS, BLOCK_SIZE)
    engine = VerifyEngine(StatedRunner(world.verify_seconds), blocks, limits)
    if world.gathers:
        points = (StepCost(rows, 0, world.verify_seconds) for rows in (1, MAX_ROWS))
        engine.gather_with(StepCurve(tuple(points)))
    return engine


def _drafter(world: World) -> DraftEngine:
    limits = DrafterLimits(INFO.vocab_size, INFO.max_model_len, ahead=world.ahead)
    blocks = BlockManager(NUM_BLOCKS, BLOCK_SIZE)
    runner = StatedRunner(world.draft_seconds, world.acceptance)
    return DraftEngine(ModelDrafter(runner, blocks, limits), blocks)


def _router(world: World, verify: LocalVerifyLink, draft: LocalDraftLink) -> Router:
    cluster = LocalCluster(
        INFO,
        WorkerPool([cast(VerifyLink, verify)], asyncio.Event()),
        WorkerPool([cast(DraftLink, draft)], asyncio.Event()),
    )
    return Router(
        cast(Cluster, cluster),
        store=DistantStore(world.commit_seconds),
        tokenizer=ServedTokenizer(tokenizer_json()),
        policy=StaticShape(CHAIN),
        metrics=RouterMetrics(CollectorRegistry(), INFO.model_name),
        version=INFO.version,
        # However busy the machine is, each round waits for its tree.
        limits=RouterLimits(seats=SeatLimits(propose_seconds=10.0)),
    )


def right_tokens(last: int, count: int) -> list[int]:
    """What the target says after a token."""
    found = [last]
    while len(found) <= count:
        found.append(next_token(found[-1]))
    return found[1:]
