"""A cluster whose target costs what we say: for loads that a small machine could not bear.

    python -m specinfer_bench.load sweep --simulated

The router is the real one, and so are the frames. Workers are waits: a pass takes the larger of a
floor, which stands for reading the weights, and a time for each row, which stands for arithmetic. A
guess is right by a chance that its place decides, whoever asks. This module knows nothing of loads.
"""

from __future__ import annotations

import asyncio
import json
import signal
from dataclasses import dataclass, replace
from typing import Any

import grpc.aio

from specinfer.convert import worker_info_from_wire, worker_info_to_wire
from specinfer.messages import StepCost
from specinfer.outbox import Outbox
from specinfer.rpc import SERVER_OPTIONS
from specinfer.v1 import draft_pb2, draft_pb2_grpc, verify_pb2, verify_pb2_grpc
from specinfer_bench.simulated_workers import (
    FIRST_TOKEN,
    NUM_TOKENS,
    Asker,
    Passes,
    SimulatedDrafter,
    SimulatedVerifier,
    Simulation,
)

PROFILED_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
WRONG_GUESS = 1
# Of the trees that are asked for by default.
LEVELS = 8
# Who is due may be late, and what is waited for is certain.
CAUTION = 1.25


@dataclass(frozen=True)
class SimulatedCosts:
    """What takes how long, and how good guesses are.

    Attributes:
        floor_seconds: shortest pass of the target.
        row_seconds: of its passes with many rows, for each row.
        draft_seconds: a tree, of all sessions that wait for one.
        return_seconds: longest wait for sessions that were answered a moment ago.
        acceptance: chance that a guess is right whose parent is.
    """

    floor_seconds: float = 0.040
    row_seconds: float = 0.00125
    draft_seconds: float = 0.005
    return_seconds: float = 0.010
    acceptance: float = 0.8

    def pass_seconds(self, num_rows: int) -> float:
        """A pass of the target."""
        return max(self.floor_seconds, num_rows * self.row_seconds)


def next_token(token: int) -> int:
    """What the target says after a token."""
    return FIRST_TOKEN + (token * 7 + 3) % NUM_TOKENS


def guess(token: int, place: int, acceptance: float) -> int:
    """What the drafter guesses at a place of the text, after the right token."""
    # A fixed sequence that fills the unit interval evenly: right as often as it should be.
    right = (place * 0.6180339887498949) % 1.0 < acceptance
    return next_token(token) if right else WRONG_GUESS


class RowPasses(Passes):
    """Passes of a target, as long as their rows take.

    Like the real worker's, a pass waits for those of the pass before where two passes would cost
    more than the wait and one.
    """

    def __init__(self, costs: SimulatedCosts) -> None:
        super().__init__(costs.floor_seconds)
        self._costs = costs

    def add(self, asker: Asker, result: Any) -> None:
        """Answer with `result` at the end of the next pass, and with what it waited and took."""
        result.queue_seconds -= asyncio.get_running_loop().time()
        super().add(asker, result)

    async def _run(self) -> None:
        clock, answered = asyncio.get_running_loop().time, 0
        while self._waiting:
            if self._saved(answered) > CAUTION * self._costs.return_seconds:
                await asyncio.sleep(self._costs.return_seconds)
            taken, self._waiting = self._waiting, []
            rows = sum(result.num_rows for _, result in taken)
            start = clock()
            await asyncio.sleep(self._costs.pass_seconds(rows))
            for asker, result in taken:
                result.queue_seconds += start
                result.compute_seconds, result.num_rows = clock() - start, rows
                asker.put(result)
            answered = rows
        self._task = None

    def _saved(self, answered: int) -> float:
        """Seconds that one pass with those just answered saves against one for each."""
        rows = sum(result.num_rows for _, result in self._waiting)
        cost = self._costs.pass_seconds
        return cost(rows) + cost(answered) - cost(rows + answered) if answered else 0.0


class CostlyVerifier(SimulatedVerifier):
    """Walks trees with the rule of `next_token`."""

    def __init__(self, costs: SimulatedCosts) -> None:
        super().__init__(Simulation())
        self._costs = costs
        self._passes = RowPasses(costs)

    async def GetInfo(self, request: Any, context: Any) -> Any:
        """What this worker is, with what its passes cost."""
        answer = await super().GetInfo(request, context)
        costs = tuple(StepCost(rows, 0, self._costs.pass_seconds(rows)) for rows in PROFILED_ROWS)
        info = replace(worker_info_from_wire(answer.info), step_costs=costs)
        return verify_pb2.VerifyServiceGetInfoResponse(info=worker_info_to_wire(info))

    def _handle(self, item: verify_pb2.VerifyItem, outbox: Outbox[Any]) -> None:
        result = verify_pb2.VerifyItemResult(item_id=item.item_id, session_id=item.session_id)
        if item.WhichOneof("action") != "step":
            outbox.put(result)
            return
        chain = item.step.tree.token_ids
        result.epoch = item.epoch + 1
        result.num_rows = len(chain)
        token = next_token(chain[0])
        for node, guessed in enumerate(chain[1:], start=1):
            if guessed != token:
                break
            result.accepted.append(node)
            result.token_ids.append(token)
            token = next_token(token)
        result.token_ids.append(token)
        self._passes.add(outbox, result)


class FallibleDrafter(SimulatedDrafter):
    """Guesses chains that are right for a while."""

    def __init__(self, costs: SimulatedCosts) -> None:
        super().__init__(Simulation(draft_seconds=costs.draft_seconds))
        self._costs = costs
        self._acceptance = costs.acceptance

    async def GetInfo(self, request: Any, context: Any) -> Any:
        """What this worker is, with what a level of its trees costs at most."""
        answer = await super().GetInfo(request, context)
        cost = StepCost(1, 0, self._costs.draft_seconds / LEVELS)
        info = replace(worker_info_from_wire(answer.info), step_costs=(cost,))
        return draft_pb2.DraftServiceGetInfoResponse(info=worker_info_to_wire(info))

    def _handle(self, item: draft_pb2.DraftItem, outbox: Outbox[Any]) -> None:
        if item.WhichOneof("action") != "propose":
            super()._handle(item, outbox)
            return
        session = item.session_id
        if item.propose.new_token_ids:
            self._roots[session] = item.propose.new_token_ids[-1]
        length = item.propose.known_len + len(item.propose.new_token_ids)
        shape = item.propose.shape
        chain = [self._roots[session]]
        for depth in range(min(shape.max_nodes, shape.max_depth)):
            chain.append(guess(chain[-1], length + depth, self._acceptance))
        result = draft_pb2.DraftItemResult(
            item_id=item.item_id, session_id=session, epoch=item.epoch
        )
        result.tree.token_ids.extend(chain)
        result.tree.parents.extend(range(-1, len(chain) - 1))
        self._passes.add(outbox, result)


async def serve(costs: SimulatedCosts) -> None:
    """Serve both tiers and print their addresses as one line of JSON, until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    drafter, verifier = (grpc.aio.server(options=SERVER_OPTIONS) for _ in range(2))
    draft_pb2_grpc.add_DraftServiceServicer_to_server(FallibleDrafter(costs), drafter)
    verify_pb2_grpc.add_VerifyServiceServicer_to_server(CostlyVerifier(costs), verifier)
    ready = {}
    for name, server in (("draft", drafter), ("verify", verifier)):
        ready[name] = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
    print(json.dumps(ready), flush=True)
    await stop.wait()
    await asyncio.gather(drafter.stop(0), verifier.stop(0))


if __name__ == "__main__":
    asyncio.run(serve(SimulatedCosts()))
