"""Workers without models, on the real protocol: a pass is a wait of a stated length.

    python -m specinfer_bench.simulated_workers --verify-seconds 0.05 --draft-seconds 0.01

Serves both tiers from one process and prints their addresses as one line of JSON. A pass takes all
items that wait and answers them in one frame, as the real workers do; a tree is a chain of made-up
tokens of which the target confirms the first few. This module knows nothing of what is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import grpc.aio
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from specinfer.convert import worker_info_to_wire
from specinfer.messages import StepCost, WorkerInfo
from specinfer.outbox import Outbox
from specinfer.rpc import SERVER_OPTIONS
from specinfer.server import fastest_loop
from specinfer.turns import Turns, read_frames
from specinfer.v1 import (
    draft_pb2,
    draft_pb2_grpc,
    tree_pb2,
    verify_pb2,
    verify_pb2_grpc,
)

MODULE = "specinfer_bench.simulated_workers"
FIRST_TOKEN = 10
NUM_TOKENS = 200
MAX_FRAME_RESULTS = 256
# Of a pass of each tier, as the workers say when they are asked what they are.
STEP_SECONDS = {"draft": 0.0005, "verify": 0.05}


@dataclass(frozen=True)
class Simulation:
    """How the workers behave.

    Attributes:
        draft_seconds, verify_seconds: length of a pass of each tier; 0 answers at once.
        accepted: guesses that the target confirms in each round.
    """

    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    accepted: int = 3


class Asker(Protocol):
    """Whoever waits for a result."""

    def put(self, result: Any) -> None:
        """Bring it, from any thread."""
        ...


class Passes:
    """One tier's passes: one at a time, each with everything that waits when it begins.

    A pass is made in a thread of its own, as an engine's is, and lasts as long as it should to some
    tenths of a millisecond: an event loop's timers are off by up to one.

    Args:
        seconds: length of a pass; 0 answers at once, without the thread.
        finish: told the results of a pass before they are sent.
    """

    def __init__(
        self, seconds: float, finish: Callable[[list[Any]], None] = lambda results: None
    ) -> None:
        self._seconds = seconds
        self._finish = finish
        self._thread = ThreadPoolExecutor(1)
        self._waiting: list[tuple[Asker, Any]] = []
        self._task: asyncio.Task[None] | None = None

    def add(self, asker: Asker, result: Any) -> None:
        """Answer with `result` at the end of the next pass."""
        self._waiting.append((asker, result))
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while self._waiting:
            taken, self._waiting = self._waiting, []
            if self._seconds:
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(self._thread, self._pass, taken)
            else:
                await asyncio.sleep(0)
                self._answer(taken)
        self._task = None

    def _pass(self, taken: Sequence[tuple[Asker, Any]]) -> None:
        time.sleep(self._seconds)
        self._answer(taken)

    def _answer(self, taken: Sequence[tuple[Asker, Any]]) -> None:
        self._finish([result for _, result in taken])
        for asker, result in taken:
            asker.put(result)


async def answers(frames: Any, handle: Any) -> AsyncIterator[list[Any]]:
    """Results in frames; `handle(item, outbox)` sees to it that each item gets one."""
    outbox = Outbox[Any](max_unanswered=4096, max_batch=MAX_FRAME_RESULTS)
    turns = Turns[Any](lambda item: handle(item, outbox))
    reader = asyncio.create_task(read_frames(frames, outbox.expect_one, turns))
    reader.add_done_callback(lambda _: outbox.close())
    try:
        async for results in outbox.batches():
            yield results
    finally:
        reader.cancel()


class SimulatedDrafter(draft_pb2_grpc.DraftServiceServicer):
    """Guesses a chain below every root."""

    def __init__(self, simulation: Simulation) -> None:
        self._passes = Passes(simulation.draft_seconds)
        self._roots: dict[str, int] = {}

    async def Draft(
        self, request_iterator: Any, context: Any
    ) -> AsyncIterator[draft_pb2.DraftResponse]:
        """Answer items in frames."""
        async for results in answers(request_iterator, self._handle):
            yield draft_pb2.DraftResponse(results=results, load=tree_pb2.WorkerLoad())

    async def GetInfo(self, request: Any, context: Any) -> Any:
        """What this worker is."""
        return draft_pb2.DraftServiceGetInfoResponse(
            info=worker_info_to_wire(simulated_info("draft"))
        )

    def _handle(self, item: draft_pb2.DraftItem, outbox: Outbox[Any]) -> None:
        result = draft_pb2.DraftItemResult(
            item_id=item.item_id, session_id=item.session_id, epoch=item.epoch
        )
        kind = item.WhichOneof("action")
        if kind != "propose":
            if kind == "open":
                self._roots[item.session_id] = item.open.token_ids[-1]
            else:
                self._roots.pop(item.session_id, None)
            outbox.put(result)
            return
        root = self._roots[item.session_id]
        if item.propose.new_token_ids:
            root = self._roots[item.session_id] = item.propose.new_token_ids[-1]
        length = 1 + min(item.propose.shape.max_nodes, item.propose.shape.max_depth)
        result.tree.token_ids.extend([root, *(_token(item.epoch, at) for at in range(1, length))])
        result.tree.parents.extend(range(-1, length - 1))
        self._passes.add(outbox, result)


class SimulatedVerifier(verify_pb2_grpc.VerifyServiceServicer):
    """Confirms the first few nodes of every tree's first path."""

    def __init__(self, simulation: Simulation) -> None:
        self._passes = Passes(simulation.verify_seconds, self._tell_pass)
        # A pass that answers at once says the seconds of its step costs all the same, so that
        # trees are chosen as they would be in a cluster.
        self._told_seconds = simulation.verify_seconds or STEP_SECONDS["verify"]
        self._accepted = simulation.accepted

    async def Verify(
        self, request_iterator: Any, context: Any
    ) -> AsyncIterator[verify_pb2.VerifyResponse]:
        """Answer items in frames."""
        async for results in answers(request_iterator, self._handle):
            yield verify_pb2.VerifyResponse(results=results, load=tree_pb2.WorkerLoad())

    async def GetInfo(self, request: Any, context: Any) -> Any:
        """What this worker is."""
        return verify_pb2.VerifyServiceGetInfoResponse(
            info=worker_info_to_wire(simulated_info("verify"))
        )

    async def GetTokenizer(
        self, request: Any, context: Any
    ) -> AsyncIterator[verify_pb2.GetTokenizerResponse]:
        """A tokenizer of single bytes."""
        yield verify_pb2.GetTokenizerResponse(tokenizer_json=tokenizer_json(), eos_token_ids=[0])

    def _handle(self, item: verify_pb2.VerifyItem, outbox: Outbox[Any]) -> None:
        result = verify_pb2.VerifyItemResult(item_id=item.item_id, session_id=item.session_id)
        if item.WhichOneof("action") != "step":
            outbox.put(result)
            return
        tree = item.step.tree
        num_accepted = min(self._accepted, len(tree.token_ids) - 1)
        tail = _token(item.epoch, len(tree.token_ids))
        result.epoch = item.epoch + 1
        result.num_rows = len(tree.token_ids)
        result.accepted.extend(range(1, num_accepted + 1))
        result.token_ids.extend([*tree.token_ids[1 : num_accepted + 1], tail])
        self._passes.add(outbox, result)

    def _tell_pass(self, results: list[verify_pb2.VerifyItemResult]) -> None:
        """What a session's result says of the pass that it shared."""
        num_rows = sum(result.num_rows for result in results)
        for result in results:
            result.num_rows, result.compute_seconds = num_rows, self._told_seconds


def _token(epoch: int, at: int) -> int:
    return FIRST_TOKEN + (7 * epoch + at) % NUM_TOKENS


@cache
def tokenizer_json() -> bytes:
    """Of single bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|end|>": 0} | {letter: at for at, letter in enumerate(letters, start=1)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str().encode()


def simulated_info(tier: str) -> WorkerInfo:
    """What a worker of a tier says it is."""
    return WorkerInfo(
        worker_id=f"simulated-{tier}",
        model_name="simulated",
        model_hash="simulated",
        tokenizer_hash=hashlib.sha256(tokenizer_json()).hexdigest(),
        vocab_size=257,
        dtype="float32",
        device="simulated",
        max_model_len=8192,
        max_sessions=1024,
        max_tree_nodes=64,
        num_blocks=65536,
        block_size=16,
        row_invariant=True,
        acceptance_rules=("match",),
        step_costs=(StepCost(1, 0, STEP_SECONDS[tier]), StepCost(1024, 0, STEP_SECONDS[tier])),
    )


async def serve(simulation: Simulation, addresses: tuple[str, str]) -> None:
    """Serve both tiers at these addresses, draft first, until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    drafter = grpc.aio.server(options=SERVER_OPTIONS)
    draft_pb2_grpc.add_DraftServiceServicer_to_server(SimulatedDrafter(simulation), drafter)
    verifier = grpc.aio.server(options=SERVER_OPTIONS)
    verify_pb2_grpc.add_VerifyServiceServicer_to_server(SimulatedVerifier(simulation), verifier)
    ready = {}
    for name, server, address in zip(
        ("draft", "verify"), (drafter, verifier), addresses, strict=True
    ):
        port = server.add_insecure_port(address)
        ready[name] = address if address.startswith("unix:") else f"127.0.0.1:{port}"
        await server.start()
    print(json.dumps(ready), flush=True)
    await stop.wait()
    await asyncio.gather(drafter.stop(0), verifier.stop(0))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--draft", default="127.0.0.1:0", help="address of the draft tier")
    parser.add_argument("--verify", default="127.0.0.1:0", help="address of the verify tier")
    parser.add_argument("--draft-seconds", type=float, default=0.0, help="length of a draft pass")
    parser.add_argument("--verify-seconds", type=float, default=0.0, help="length of a verify pass")
    parser.add_argument("--accepted", type=int, default=3, help="guesses confirmed in a round")
    return parser.parse_args()


def main() -> None:
    """Serve until told to stop."""
    given = _arguments()
    simulation = Simulation(given.draft_seconds, given.verify_seconds, given.accepted)
    # Where passes take no time, a faster loop would only tear apart what a worker answers together.
    loop_factory = fastest_loop() if simulation.verify_seconds else None
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(serve(simulation, (given.draft, given.verify)))


if __name__ == "__main__":
    main()
