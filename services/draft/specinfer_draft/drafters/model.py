"""The model drafter: a small model on the shared engine grows trees for many sessions at once.

Each pass carries the next level of every tree that grows, so a tree of depth d costs d passes and
many trees cost hardly more than one; sessions join and leave at any pass. The first pass of a tree
takes the tokens committed since the last one along with the root (algorithms.md 1.4). This module
knows nothing of gRPC or threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from specinfer.errors import Cancelled, InvalidRequest, NotFound, ResourceExhausted, StaleEpoch
from specinfer.grammar import GrammarState
from specinfer.messages import DraftResult
from specinfer.sampling import SamplingParams
from specinfer.tree import MAX_TREE_NODES
from specinfer_draft.drafters.forecast import DrawForecast, rank
from specinfer_draft.drafters.passes import PassPlanner, Plan, Share
from specinfer_draft.drafters.session import DraftSession, Growth, ProposeQuery, fit_shape
from specinfer_draft.grow import NO_THRIFT, Candidates, GrowingTree, Thrift, Wave, check_shape
from specinfer_engine.batch import SequenceRows
from specinfer_engine.blocks import BlockManager
from specinfer_engine.sequence import SequenceState
from specinfer_engine.thread import set_exception, set_result

MAX_SESSION_ID_LENGTH = 256


class DraftRunner(Protocol):
    """What the drafter needs of a model: passes over rows, and copies inside the KV pool."""

    def forward(self, rows: Sequence[SequenceRows]) -> list[Tensor]:
        """Raw logits of the rows asked for, float [len(logit_rows), vocab_size] a sequence."""
        ...

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy blocks to blocks; all sources are read first."""
        ...


@dataclass(frozen=True)
class DrafterLimits:
    """Bounds and habits of a model drafter.

    Attributes:
        vocab_size: tokens the model knows.
        max_model_len: longest session in tokens.
        max_sessions: most sessions open at once; one more closes the least recently used.
        max_tree_nodes: largest tree grown, root included.
        max_rows: most rows of a pass.
        prefill_rows: most rows of prompts in a pass that carries trees too.
        thrift: when best-first growing is no longer worth its cost.
        spread: scale of the difference between target's and drafter's logits (see `forecast`).

    Raises:
        InvalidRequest: when a bound makes no sense.
    """

    vocab_size: int
    max_model_len: int
    max_sessions: int = 256
    max_tree_nodes: int = 64
    max_rows: int = 512
    prefill_rows: int = 128
    thrift: Thrift = NO_THRIFT
    spread: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.max_tree_nodes <= min(self.max_rows, MAX_TREE_NODES):
            raise InvalidRequest(
                f"max_tree_nodes is between 1 and max_rows and at most {MAX_TREE_NODES}, got "
                f"{self.max_tree_nodes}",
                field="max_tree_nodes",
            )
        if self.max_sessions < 1 or not 1 <= self.prefill_rows <= self.max_rows:
            raise InvalidRequest(
                "max_sessions is at least 1 and prefill_rows between 1 and max_rows",
                field="prefill_rows",
            )
        if not self.spread > 0.0:
            raise InvalidRequest(f"spread is positive, got {self.spread}", field="spread")


class ModelDrafter:
    """Grows trees with a model; see the package for the four calls.

    Args:
        runner: the model and its KV pool.
        blocks: the pool's bookkeeping.
        limits: bounds and habits.
        clock: seconds, the clock of the queries' deadlines.
        device: where the runner's logits lie.
    """

    def __init__(
        self,
        runner: DraftRunner,
        blocks: BlockManager,
        limits: DrafterLimits,
        *,
        clock: Callable[[], float] = time.perf_counter,
        device: torch.device | str = "cpu",
    ) -> None:
        self.limits = limits
        self._runner = runner
        self._blocks = blocks
        self._clock = clock
        self._device = device
        self._planner = PassPlanner(
            blocks, max_rows=limits.max_rows, prefill_rows=limits.prefill_rows
        )
        self._wave_seconds = 0.0
        self._answers: list[tuple[Future[DraftResult], DraftResult]] = []

    @property
    def num_sessions(self) -> int:
        """Sessions open."""
        return len(self._planner.sessions)

    @property
    def num_growing(self) -> int:
        """Proposals that are being worked on."""
        return len(self._planner.growing)

    def open(
        self,
        session_id: str,
        epoch: int,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        num_prompt_tokens: int = 0,
        *,
        grammar: GrammarState | None = None,
        owner: object | None = None,
    ) -> None:
        """Start to follow a session; what was known under its name is replaced.

        The first `num_prompt_tokens` tokens are the prompt and the rest is output; 0 means that all
        are the prompt. Guesses stay within `grammar`, a state of this session alone. `owner` has
        the session from now on, for `close_owned`.

        Raises:
            InvalidRequest: when the tokens or the sampling do not fit the model.
            StaleEpoch: when the session is known here at a later epoch.
            ResourceExhausted: when every session here has a proposal going.
        """
        if not 1 <= len(session_id) <= MAX_SESSION_ID_LENGTH:
            raise InvalidRequest(
                f"a session id has 1 to {MAX_SESSION_ID_LENGTH} characters", field="session_id"
            )
        if not token_ids:
            raise InvalidRequest("a session needs at least one token", field="token_ids")
        self._check_tokens(token_ids)
        if len(token_ids) > self.limits.max_model_len:
            raise InvalidRequest(
                f"{len(token_ids)} tokens are more than the drafter's {self.limits.max_model_len}",
                field="token_ids",
            )
        if not 0 <= num_prompt_tokens <= len(token_ids):
            raise InvalidRequest(
                f"{num_prompt_tokens} of {len(token_ids)} tokens cannot be the prompt",
                field="num_prompt_tokens",
            )
        vocab_size, num_prompt = self.limits.vocab_size, num_prompt_tokens or len(token_ids)
        forecast = DrawForecast(sampling, vocab_size, num_prompt, self._device, grammar)
        known = self._planner.sessions.get(session_id)
        if known is not None and epoch < known.epoch:
            raise StaleEpoch(f"session {session_id[:256]} is at epoch {known.epoch}, not {epoch}")
        self.close(session_id)
        self._make_place()
        state = SequenceState(self._blocks, token_ids)
        self._planner.add(DraftSession(session_id, epoch, state, forecast, owner=owner))

    def propose(self, session_id: str, query: ProposeQuery, future: Future[DraftResult]) -> None:
        """Take what was committed and begin to grow a tree below the root.

        Raises:
            NotFound: when the session is not open here; open it again.
            StaleEpoch: when the query is older than the session or speaks of tokens not held.
            InvalidRequest: when the shape or a token is none.
        """
        session = self._planner.sessions.get(session_id)
        if session is None:
            raise NotFound(f"no session {session_id[:256]} here; open it again")
        check_shape(query.shape)
        self._check_tokens(query.new_token_ids)
        num_tokens = query.known_len + len(query.new_token_ids)
        if num_tokens > self.limits.max_model_len:
            # The model has no such position, and a pass that fails ends the engine for everybody.
            raise InvalidRequest(
                f"{num_tokens} tokens are more than the drafter's {self.limits.max_model_len}",
                field="new_token_ids",
            )
        # Checked before anything changes: an error answers this call alone.
        session.check(query)
        self._drop_growth(session, "a newer proposal for the session came")
        session.advance(query)
        shape = fit_shape(
            query.shape,
            max_nodes=self.limits.max_tree_nodes - 1,
            # A node is looked at only where its own position fits; its children need none.
            max_depth=self.limits.max_model_len - num_tokens + 1,
        )
        root = session.state.token_ids[-1]
        session.growth = Growth(query, future, root, shape, self.limits.thrift)
        session.forecast.begin(session.state.token_ids)
        self._planner.start_growing(session)
        if session.growth.wave is None:
            self._finish(session)
            self._deliver()

    def close(self, session_id: str) -> None:
        """Forget a session; an unknown one is fine."""
        session = self._planner.sessions.get(session_id)
        if session is not None:
            self._drop_growth(session, "the session was closed")
            self._planner.remove(session_id)

    def close_owned(self, owner: object) -> None:
        """Forget the sessions that `owner` was the last one to open."""
        for session in list(self._planner.sessions.values()):
            if session.owner is owner:
                self.close(session.session_id)

    @torch.inference_mode()
    def run_pass(self) -> bool:
        """Answer what is late, then one pass for the rest. Returns whether anything was done."""
        start = self._clock()
        num_late = self._finish_late(start)
        plan = self._planner.plan()
        num_stuck = self._finish_stuck()
        self._deliver()
        if not plan:
            return num_late + num_stuck > 0
        shares = list(plan.values())
        candidates = self._look(shares, self._forward(plan))
        end = self._clock()
        if not any(share.num_chunk for share in shares):
            # Half new, half old: follows a changing load within a few passes.
            self._wave_seconds += 0.5 * (end - start - self._wave_seconds)
        for share, found in zip(shares, candidates, strict=True):
            self._take(share, found, start, end)
        self._deliver()
        return True

    def _forward(self, plan: Plan) -> list[Tensor]:
        """Logits of the rows wanted, [num_wanted, vocab_size] a share."""
        sources = [block for share in plan.values() for block in share.copies.sources]
        targets = [block for share in plan.values() for block in share.copies.targets]
        if sources:
            self._runner.copy_blocks(sources, targets)
        return self._runner.forward([share.rows for share in plan.values()])

    def _look(self, shares: Sequence[Share], logits: Sequence[Tensor]) -> list[list[Candidates]]:
        """Candidates of every row wanted, for each share; one top-k for the whole pass."""
        forecasts, branch = [], 0
        for share, rows in zip(shares, logits, strict=True):
            growth = share.session.growth
            if share.rows.logit_rows and growth is not None and growth.wave is not None:
                forecasts.append(_forecast(share.session, growth.tree, growth.wave, rows))
                branch = max(branch, growth.wave.branch)
        if not forecasts:
            return [[] for _ in shares]
        z = forecasts[0] if len(forecasts) == 1 else torch.cat(forecasts)
        ranked = iter(rank(z, branch, self.limits.spread))
        return [[next(ranked) for _ in share.rows.logit_rows] for share in shares]

    def _take(
        self, share: Share, candidates: Sequence[Candidates], start: float, end: float
    ) -> None:
        """Book one share of a pass."""
        session = share.session
        if share.num_chunk:
            session.state.commit(range(share.num_chunk))
        growth = session.growth
        if growth is None:
            return
        growth.compute_seconds += end - start
        if growth.first_pass is None:
            growth.first_pass = start
        if candidates:
            growth.take(candidates)
            if growth.wave is None:
                self._finish(session)

    def _finish_late(self, now: float) -> int:
        """Answer proposals whose next pass would end past their deadline; how many there were.

        A proposal that had no pass yet gets one as long as there is any time left.
        """
        num_late = 0
        for session in self._planner.growing:
            growth = session.growth
            if growth is None:
                continue
            expected = 0.0 if growth.first_pass is None else self._wave_seconds
            if now + expected >= growth.query.deadline:
                self._finish(session)
                num_late += 1
        if num_late:
            # Otherwise one slow pass would end every tree after its first level for ever.
            self._wave_seconds *= 0.75
        return num_late

    def _finish_stuck(self) -> int:
        """Answer proposals that the pool is too small for; how many there were."""
        stuck, self._planner.stuck = self._planner.stuck, []
        for session in stuck:
            self._finish(session)
        return len(stuck)

    def _finish(self, session: DraftSession) -> None:
        """End a session's proposal with the best of what was found; `_deliver` hands it out."""
        growth = session.growth
        assert growth is not None
        self._planner.stop_growing(session)
        first_pass = self._clock() if growth.first_pass is None else growth.first_pass
        result = DraftResult(
            growth.query.epoch,
            growth.result(),
            queue_seconds=max(0.0, first_pass - growth.query.arrival),
            compute_seconds=growth.compute_seconds,
        )
        self._answers.append((growth.future, result))

    def _deliver(self) -> None:
        """Hand out what is finished in one go, so that it can leave in one frame."""
        for future, result in self._answers:
            set_result(future, result)
        self._answers.clear()

    def _drop_growth(self, session: DraftSession, reason: str) -> None:
        growth = session.growth
        if growth is not None:
            self._planner.stop_growing(session)
            set_exception(growth.future, Cancelled(reason))

    def _make_place(self) -> None:
        """Close the least recently used session that grows nothing when all places are taken."""
        if self.num_sessions < self.limits.max_sessions:
            return
        for session in self._planner.sessions.values():
            if session.growth is None:
                self.close(session.session_id)
                return
        raise ResourceExhausted(
            f"all {self.limits.max_sessions} sessions of this drafter are busy", retry_after=0.1
        )

    def _check_tokens(self, token_ids: Sequence[int]) -> None:
        for token_id in (min(token_ids), max(token_ids)) if token_ids else ():
            if not 0 <= token_id < self.limits.vocab_size:
                raise InvalidRequest(
                    f"token {token_id} is outside the vocabulary of {self.limits.vocab_size}",
                    field="token_ids",
                )


def _forecast(session: DraftSession, tree: GrowingTree, wave: Wave, logits: Tensor) -> Tensor:
    """Forecasts at the nodes of a wave, [num_nodes, vocab_size]."""
    paths = [tree.path_token_ids(node) for node in wave.nodes]
    # The root stands at len(state) - 1 and decides the token at len(state).
    positions = [len(session.state) + tree.depths[node] for node in wave.nodes]
    return session.forecast.forecast(logits, paths, positions)
