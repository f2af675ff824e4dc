"""The draft engine: proposals in from any thread, trees out, with one thread that does the work.

Public methods return futures; the drafter is touched on the engine's thread alone. This module
knows nothing of gRPC, models or how a tree grows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from specinfer.errors import InvalidRequest, Unavailable
from specinfer.grammar import GrammarState
from specinfer.messages import DraftResult, ShapeQuery, WorkerLoad
from specinfer.metrics import DraftMetrics
from specinfer.sampling import SamplingParams
from specinfer_draft.drafters.model import ModelDrafter
from specinfer_draft.drafters.session import ProposeQuery
from specinfer_engine.blocks import BlockManager
from specinfer_engine.thread import EngineThread


class DraftEngine:
    """Owns the thread that a drafter runs on.

    Args:
        drafter: grows the trees.
        blocks: the drafter's pool, for the load report.
        clock: the drafter's clock, in seconds.
        max_pending: most items handed in and not yet answered.
        on_failure: called on the engine's thread when a pass has failed.
    """

    def __init__(
        self,
        drafter: ModelDrafter,
        blocks: BlockManager,
        *,
        clock: Callable[[], float] = time.perf_counter,
        max_pending: int = 4096,
        on_failure: Callable[[], None] | None = None,
    ) -> None:
        self._drafter = drafter
        self._blocks = blocks
        self._clock = clock
        self._draining = False
        self._thread = EngineThread(
            "draft-engine", drafter.run_pass, max_pending=max_pending, on_failure=on_failure
        )

    def start(self) -> None:
        """Start the engine's thread."""
        self._thread.start()

    def prepare_with(self, prepare: Callable[[], object]) -> None:
        """Call `prepare` on the engine's thread when it starts; to be called before `start`."""
        self._thread.prepare = prepare

    def count_with(self, metrics: DraftMetrics) -> None:
        """Count what the drafter does; to be called before `start`."""
        self._drafter.count_with(metrics)

    @property
    def healthy(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.healthy

    def load(self) -> WorkerLoad:
        """How busy the engine is; a snapshot that may be taken from any thread."""
        return WorkerLoad(
            num_sessions=self._drafter.num_sessions,
            num_waiting=self._drafter.num_growing,
            num_free_blocks=self._blocks.num_free_blocks,
            draining=self._draining or not self.healthy,
        )

    def open(
        self,
        session_id: str,
        epoch: int,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        num_prompt_tokens: int = 0,
        *,
        grammar: GrammarState | None = None,
        owner: int = 0,
        stream: object | None = None,
    ) -> Future[None]:
        """Start to follow a session, or replace what is known of it.

        Args:
            session_id: the router's name for it.
            epoch: commits so far.
            token_ids: prompt and output; the last one is the root.
            sampling: how the target draws, seed included.
            num_prompt_tokens: how many of `token_ids` are the prompt; 0 means all.
            grammar: a state of this session alone, for what its output has to match, or None.
            owner: how often the session was claimed; what lower owners send is refused from now on.
            stream: which stream has the session from now on, for `close_stream`.

        The future fails with InvalidRequest, LeaseLost, ResourceExhausted or Unavailable.
        """
        if self._draining:
            raise Unavailable("this drafter takes no new session")
        tokens = tuple(token_ids)
        return self._thread.call(
            lambda: self._drafter.open(
                session_id,
                epoch,
                tokens,
                sampling,
                num_prompt_tokens,
                grammar=grammar,
                owner=owner,
                stream=stream,
            )
        )

    def propose(
        self,
        session_id: str,
        epoch: int,
        known_len: int,
        new_token_ids: Sequence[int],
        shape: ShapeQuery,
        deadline_seconds: float = 0.0,
        *,
        owner: int = 0,
    ) -> Future[DraftResult]:
        """Take what was committed since and grow a tree below the root.

        Args:
            session_id: an open session.
            epoch: commits that the session has seen; it comes back with the tree.
            known_len: tokens that the drafter is expected to hold; it drops what it holds beyond.
            new_token_ids: tokens committed after those; the last one is the root.
            shape: which tree to grow.
            deadline_seconds: from now, after which the tree is of no use; what is there by then is
                the answer, the root alone if need be. 0 sets no deadline.
            owner: how often the session was claimed.

        The future fails with NotFound, StaleEpoch, LeaseLost, InvalidRequest, Cancelled or
        InternalError.
        """
        arrival = self._clock()
        if not math.isfinite(deadline_seconds) or deadline_seconds < 0.0:
            raise InvalidRequest(
                f"deadline_seconds is a number of at least 0, got {deadline_seconds}",
                field="deadline_seconds",
            )
        deadline = arrival + deadline_seconds if deadline_seconds else math.inf
        query = ProposeQuery(epoch, known_len, tuple(new_token_ids), shape, arrival, deadline)
        return self._thread.submit(
            lambda future: self._drafter.propose(session_id, query, future, owner=owner)
        )

    def close(self, session_id: str, *, owner: int = 0) -> Future[None]:
        """Forget a session; an unknown one is fine, a lost one fails with LeaseLost."""
        return self._thread.call(lambda: self._drafter.close(session_id, owner=owner))

    def close_stream(self, stream: object) -> None:
        """Forget the sessions that `stream` was the last one to open; returns at once."""
        self._thread.tell(lambda: self._drafter.close_stream(stream))

    def drain(self, timeout: float) -> bool:
        """Refuse new sessions and wait for what is pending; whether it all ended in time."""
        self._draining = True
        return self._thread.wait_idle(timeout)

    def stop(self) -> None:
        """End the thread; what is pending fails with Unavailable."""
        self._draining = True
        self._thread.stop()
