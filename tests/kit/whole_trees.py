"""A drafter over a real model that grows whole trees, or level by level, driven pass by pass."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from specinfer.messages import DraftResult, ShapeQuery
from specinfer.sampling import SamplingParams
from specinfer.tree import TokenTree
from specinfer_draft.drafters.limits import DrafterLimits
from specinfer_draft.drafters.model import ModelDrafter
from specinfer_draft.drafters.session import ProposeQuery
from specinfer_draft.drafters.static_growth import StaticGrowths, TreePlan
from specinfer_engine.blocks import BlockManager
from specinfer_engine.graphs import Capture
from specinfer_engine.model import LoadedModel
from specinfer_engine.runner import Runner
from tests.kit.draft_driver import Clock

NUM_BLOCKS, BLOCK_SIZE = 96, 4
GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(temperature=0.8, seed=11)
CUT = SamplingParams(temperature=0.9, top_k=40, top_p=0.7, min_p=0.01, seed=12)


def shape_of(widths: tuple[int, ...]) -> ShapeQuery:
    """A tree of these widths and room for it."""
    return ShapeQuery(TreePlan(widths).num_nodes, len(widths), widths)


@dataclass
class Bench:
    """A drafter over a real model."""

    drafter: ModelDrafter
    blocks: BlockManager
    runner: Runner
    growths: StaticGrowths | None
    clock: Clock

    def propose(
        self,
        session_id: str,
        tokens: Sequence[int],
        shape: ShapeQuery,
        *,
        known: int,
        deadline: float = math.inf,
    ) -> Future[DraftResult]:
        """Hand a proposal in below the last of `tokens`, `known` of which are held."""
        future: Future[DraftResult] = Future()
        query = ProposeQuery(0, known, tuple(tokens[known:]), shape, self.clock(), deadline)
        self.drafter.propose(session_id, query, future)
        return future

    def work(self) -> int:
        """Passes until nothing is left to do; how many there were."""
        count = 0
        while self.drafter.run_pass():
            count += 1
        return count


def drafter_of(
    loaded: LoadedModel,
    capture: Capture | None = None,
    *,
    num_blocks: int = NUM_BLOCKS,
    clock: Clock | None = None,
) -> Bench:
    """A drafter that grows whole trees with a capture, and level by level without."""
    runner = Runner(loaded, num_blocks=num_blocks, block_size=BLOCK_SIZE, capture=capture)
    blocks, clock = BlockManager(num_blocks, BLOCK_SIZE), clock or Clock()
    limits = DrafterLimits(loaded.vocab_size, 200, max_tree_nodes=256, spread=0.7)
    growths = None
    if runner.graphs is not None:
        growths = StaticGrowths(
            runner.graphs, loaded.vocab_size, loaded.device, spread=limits.spread
        )
    drafter = ModelDrafter(
        runner, blocks, limits, clock=clock, device=loaded.device, growths=growths
    )
    return Bench(drafter, blocks, runner, growths, clock)


def rounds(
    bench: Bench,
    samplings: Sequence[SamplingParams],
    shapes: Sequence[ShapeQuery],
    num_rounds: int = 4,
) -> tuple[list[TokenTree], int]:
    """Trees of sessions that propose together, with other tokens each round, and the passes that
    they waited for. Prompts, and what is accepted, are of several lengths."""
    choose, trees, num_passes = random.Random(5), list[TokenTree](), 0
    vocab_size = bench.drafter.limits.vocab_size
    prompts = [
        [choose.randrange(vocab_size) for _ in range(3 + 5 * i)] for i in range(len(samplings))
    ]
    for index, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
        bench.drafter.open(str(index), 0, prompt, sampling)
    bench.work()
    for turn in range(num_rounds):
        futures = []
        for index, prompt in enumerate(prompts):
            known = len(prompt)
            prompt += [choose.randrange(vocab_size) for _ in range((turn + index) % 4)]
            shape = shapes[index % len(shapes)]
            futures.append(bench.propose(str(index), prompt, shape, known=known))
        num_passes += bench.work()
        trees += [future.result(0).tree for future in futures]
    return trees, num_passes
