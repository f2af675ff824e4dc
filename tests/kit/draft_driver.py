"""Drives a model drafter as a router would, with a table model as the target's own sampler.

The drafter is called on the test's thread, pass by pass, so a test decides what shares a pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from torch import Tensor

from specinfer.grammar import GrammarState
from specinfer.messages import DraftResult, ShapeQuery
from specinfer.sampling import SamplingParams
from specinfer.tree import TokenTree
from specinfer_draft.drafters.limits import DrafterLimits
from specinfer_draft.drafters.model import ModelDrafter
from specinfer_draft.drafters.session import ProposeQuery
from specinfer_draft.grow import NO_THRIFT, Thrift
from specinfer_engine.acceptance import Walk, match_walk
from specinfer_engine.blocks import BlockManager
from specinfer_engine.grammar import constrain
from specinfer_engine.logits import process_logits
from tests.kit.table_models import TableModel, TableRunner

GREEDY = SamplingParams(temperature=0.0)
SHAPE = ShapeQuery(max_nodes=8, max_depth=4, branch=3)


@dataclass
class Clock:
    """Time that moves only when a test moves it."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Bench:
    """A drafter over a table model, with its runner, pool and clock."""

    drafter: ModelDrafter
    runner: TableRunner
    blocks: BlockManager
    clock: Clock
    model: TableModel

    def propose(
        self,
        session_id: str,
        known_len: int,
        new_token_ids: Sequence[int] = (),
        *,
        shape: ShapeQuery = SHAPE,
        epoch: int = 0,
        deadline: float = math.inf,
    ) -> Future[DraftResult]:
        """Hand a proposal in; errors are raised as the engine's thread would see them."""
        future: Future[DraftResult] = Future()
        query = ProposeQuery(
            epoch, known_len, tuple(new_token_ids), shape, self.clock.now, deadline
        )
        self.drafter.propose(session_id, query, future)
        return future

    def work(self) -> int:
        """Passes until nothing is left to do; how many there were."""
        before = self.runner.num_passes
        while self.drafter.run_pass():
            assert self.runner.num_passes < before + 10_000
        return self.runner.num_passes - before

    def tree(
        self,
        session_id: str,
        known_len: int,
        new_token_ids: Sequence[int] = (),
        *,
        shape: ShapeQuery = SHAPE,
        epoch: int = 0,
    ) -> TokenTree:
        """The tree of a proposal made alone."""
        future = self.propose(session_id, known_len, new_token_ids, shape=shape, epoch=epoch)
        self.work()
        return future.result(0).tree

    def fresh_tree(
        self, tokens: Sequence[int], sampling: SamplingParams, shape: ShapeQuery, num_prompt: int
    ) -> TokenTree:
        """The tree that a drafter which has never seen anything else grows."""
        other = table_drafter(self.model.vocab_size, model=self.model)
        other.drafter.open("fresh", 0, tokens[:num_prompt], sampling)
        return other.tree("fresh", num_prompt, tokens[num_prompt:], shape=shape)


def table_drafter(
    vocab_size: int = 11,
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    model: TableModel | None = None,
    make_runner: Callable[[TableModel, int, int], TableRunner] = TableRunner,
    thrift: Thrift = NO_THRIFT,
    **limits: float,
) -> Bench:
    """A drafter whose KV pool holds tokens, so that a wrong slot changes its guesses."""
    model = model or TableModel(vocab_size)
    runner = make_runner(model, num_blocks, block_size)
    blocks, clock = BlockManager(num_blocks, block_size), Clock()
    bounds = {"max_model_len": 200, "max_rows": 64, "prefill_rows": 8, "max_tree_nodes": 32}
    chosen = DrafterLimits(
        vocab_size=model.vocab_size,
        thrift=thrift,
        **(bounds | limits),  # type: ignore[arg-type]
    )
    drafter = ModelDrafter(runner, blocks, chosen, clock=clock)
    return Bench(drafter, runner, blocks, clock, model)


@dataclass
class Target:
    """The target's side of a round: walks a tree with its own seeded draws."""

    model: TableModel
    sampling: SamplingParams
    tokens: list[int]
    grammar: GrammarState | None = None
    num_prompt: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_prompt = len(self.tokens)

    def walk(self, tree: TokenTree) -> Walk:
        """What the target confirms of a tree below its last token."""

        def law(node: int) -> Tensor:
            path = tree.path_token_ids(node)[1:]
            context = [*self.tokens, *path]
            output = context[self.num_prompt :]
            row = self.model.logits(context)
            if self.grammar is not None:
                row = constrain(row, self.grammar, output)
            return process_logits(row, self.sampling, self.tokens[: self.num_prompt], output)

        return match_walk(
            tree,
            law,
            base_len=len(self.tokens) - 1,
            seed=self.sampling.seed,
            greedy=self.sampling.greedy,
        )

    def commit(self, tree: TokenTree) -> list[int]:
        """Walk a tree and take what it confirms; the tokens committed."""
        walk = self.walk(tree)
        new = [*(tree.token_ids[node] for node in walk.path), walk.tail]
        self.tokens += new
        return new
