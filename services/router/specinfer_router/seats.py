"""A session's place at a worker of each tier, and what happens when the worker fails it.

Losing a drafter costs guesses, losing a verifier costs time; neither costs a token. This module
knows nothing of text, stores or when a session ends.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from specinfer.errors import (
    InternalError,
    InvalidRequest,
    InvalidTree,
    NotFound,
    ResourceExhausted,
    SpecinferError,
    StaleEpoch,
    Unavailable,
)
from specinfer.messages import DraftResult, Grammar, ShapeQuery, VerifyResult
from specinfer.sampling import SamplingParams
from specinfer.tree import TokenTree
from specinfer_router.pool import WorkerPool
from specinfer_router.worker_links import DraftLink, VerifyLink

log = logging.getLogger(__name__)

MAX_REST_ROUNDS = 32
MAX_BACKOFF_SECONDS = 1.0


@dataclass(frozen=True)
class Guess:
    """What came of asking a drafter.

    Attributes:
        tree: the tree to verify; the root alone when there is no guess.
        root_only_reason: why there is none: "disabled", "budget", "no_drafter", "deadline",
            "draft_error" or "no_guess"; "" when there is one.
        seconds: time the round spent on asking.
        queue_seconds: waiting inside the worker.
        compute_seconds: the worker's compute.
        num_draft_nodes: nodes of the tree that the drafter brought, the root included; they come
            first.
        draft_depth: depth of the drafter's part of the tree.
        after_prefill: whether the drafter read the whole session first, which takes its time.
    """

    tree: TokenTree
    root_only_reason: str = ""
    seconds: float = 0.0
    queue_seconds: float = 0.0
    compute_seconds: float = 0.0
    num_draft_nodes: int = 1
    draft_depth: int = 0
    after_prefill: bool = False


@dataclass(frozen=True)
class Checked:
    """A verified round and the time it took, retries included."""

    result: VerifyResult
    seconds: float


class DraftSeat:
    """A session's place in the draft tier; it may be empty at any time."""

    def __init__(
        self,
        pool: WorkerPool[DraftLink],
        session_id: str,
        sampling: SamplingParams,
        *,
        num_prompt_tokens: int,
        vocab_size: int,
        deadline_seconds: float,
        grammar: Grammar | None = None,
    ) -> None:
        """Take down the session; nothing is sent before the first propose."""
        self._pool = pool
        self._session_id = session_id
        self._sampling = sampling
        self._num_prompt_tokens = num_prompt_tokens
        self._vocab_size = vocab_size
        self._deadline_seconds = deadline_seconds
        self._grammar = grammar
        self._link: DraftLink | None = None
        self._generation = 0
        self._known_len = 0
        self._late: asyncio.Future[DraftResult] | None = None
        self._num_failures = 0
        self._rest_rounds = 0

    async def propose(self, token_ids: Sequence[int], epoch: int, shape: ShapeQuery) -> Guess:
        """A tree below the last token, or the root alone with the reason. Raises nothing of ours.

        A tree that comes after the deadline is dropped, and until it has come the drafter is not
        asked again: a drafter that hangs costs a session one deadline, not one in each round.
        """
        root = TokenTree.root_only(token_ids[-1])
        if shape.max_nodes == 0:
            return Guess(root, "budget")
        if self._late is not None and not self._late.done():
            return Guess(root, "deadline")
        if self._rest_rounds > 0:
            self._rest_rounds -= 1
            return Guess(root, "draft_error")
        start = time.perf_counter()
        try:
            if not self._sit():
                return Guess(root, "no_drafter")
            after_prefill = self._known_len == 0
            answer = self._ask(token_ids, epoch, shape)
            await asyncio.wait((answer,), timeout=self._deadline_seconds)
            if not answer.done():
                self._late = answer
                return Guess(root, "deadline", time.perf_counter() - start)
            result = answer.result()
            tree = usable_tree(result, token_ids[-1], epoch, shape, self._vocab_size)
        except SpecinferError as error:
            self._fail(error, epoch)
            return Guess(root, "draft_error", time.perf_counter() - start)
        self._num_failures = 0
        reason = "" if tree.num_draft_tokens else "no_guess"
        seconds = time.perf_counter() - start
        return Guess(
            tree,
            reason,
            seconds,
            result.queue_seconds,
            result.compute_seconds,
            num_draft_nodes=len(tree),
            draft_depth=tree.max_depth,
            after_prefill=after_prefill,
        )

    def leave(self, epoch: int) -> None:
        """Give the place up and let the worker forget the session."""
        if self._link is None:
            return
        self._link.num_seats -= 1
        if self._link.connected and self._link.generation == self._generation:
            try:
                self._link.forget(self._session_id, epoch)
            except SpecinferError as error:
                log.warning("draft session %s was not closed: %s", self._session_id, error.message)
        self._link = None

    def _sit(self) -> bool:
        """Whether there is a drafter; a broken or restarted one is left for the best there is."""
        if self._link is not None:
            if self._link.connected and self._link.generation == self._generation:
                return True
            self._link.num_seats -= 1
        self._link = self._pool.choose()
        if self._link is None:
            return False
        self._link.num_seats += 1
        self._generation = self._link.generation
        self._known_len = 0
        return True

    def _ask(
        self, token_ids: Sequence[int], epoch: int, shape: ShapeQuery
    ) -> asyncio.Future[DraftResult]:
        link = self._link
        assert link is not None
        if self._known_len == 0:
            link.open(
                self._session_id,
                epoch,
                token_ids,
                self._sampling,
                self._num_prompt_tokens,
                grammar=self._grammar,
            )
            self._known_len = len(token_ids)
        known_len, self._known_len = self._known_len, len(token_ids)
        return link.propose(
            self._session_id,
            epoch,
            known_len,
            token_ids[known_len:],
            shape,
            self._deadline_seconds,
        )

    def _fail(self, error: SpecinferError, epoch: int) -> None:
        """Begin anew at the next ask, after a rest that grows with each failure in a row."""
        log.info("drafting for session %s failed: %s", self._session_id, error.message)
        self.leave(epoch)
        # A worker that went away is out of the pool at once and needs no rest.
        if not isinstance(error, Unavailable):
            self._rest_rounds = min(2**self._num_failures - 1, MAX_REST_ROUNDS)
            self._num_failures = min(self._num_failures + 1, 16)


class VerifySeat:
    """A session's place in the verify tier."""

    def __init__(
        self,
        pool: WorkerPool[VerifyLink],
        session_id: str,
        sampling: SamplingParams,
        *,
        num_prompt_tokens: int,
        num_logprobs: int | None,
        vocab_size: int,
        grammar: Grammar | None = None,
        affinity_key: str = "",
        max_tries: int = 4,
        step_seconds: float = 120.0,
        failover_seconds: float = 30.0,
    ) -> None:
        """Take down the session; nothing is sent before the first step.

        Args:
            pool: the verify tier.
            session_id: id of the session.
            sampling: how tokens are drawn.
            num_prompt_tokens: tokens of the prompt.
            num_logprobs: most probable tokens to report, or None.
            vocab_size: tokens the target knows.
            grammar: what the completion has to match, or None.
            affinity_key: sessions with the same one share a worker where its load allows.
            max_tries: workers tried for one round.
            step_seconds: a worker that takes longer for a round is taken to be lost.
            failover_seconds: how long to wait for a worker when none is ready.
        """
        self._pool = pool
        self._session_id = session_id
        self._sampling = sampling
        self._num_prompt_tokens = num_prompt_tokens
        self._num_logprobs = num_logprobs
        self._vocab_size = vocab_size
        self._grammar = grammar
        self._affinity_key = affinity_key
        self._max_tries = max_tries
        self._step_seconds = step_seconds
        self._failover_seconds = failover_seconds
        self._link: VerifyLink | None = None
        self._generation = 0

    @property
    def num_sharing(self) -> int:
        """Sessions of this router at the same worker, ours included."""
        return self._link.num_seats if self._link is not None else 1

    async def step(self, token_ids: Sequence[int], epoch: int, tree: TokenTree) -> Checked:
        """Have a tree checked. A round that fails is run again from the committed tokens.

        Raises:
            Unavailable: no worker finished the round within the tries allowed.
            ResourceExhausted: every worker tried was full.
            InvalidRequest: the session itself cannot be served.
        """
        start = time.perf_counter()
        failed: VerifyLink | None = None
        attempt = 0
        while True:
            try:
                opening = await self._sit(token_ids, epoch, failed)
                result = await self._ask(opening, epoch, tree)
                check_result(result, tree, epoch, self._vocab_size)
                assert self._link is not None
                self._link.trust()
                return Checked(result, time.perf_counter() - start)
            except InvalidRequest:
                # Perhaps the tree, never the root alone: that is what the user asked for.
                if tree.num_draft_tokens == 0:
                    raise
                tree = TokenTree.root_only(token_ids[-1])
                self.leave(epoch)
                continue
            except (Unavailable, NotFound, StaleEpoch, ResourceExhausted, InternalError) as error:
                failed, lost = self._link, error
                log.warning("round %d of %s failed: %s", epoch, self._session_id, error.message)
                attempt += 1
                if attempt == self._max_tries:
                    raise _last_error(lost) from lost
            self.leave(epoch)
            pause = min(MAX_BACKOFF_SECONDS, 0.005 * 4**attempt)
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))

    def leave(self, epoch: int) -> None:
        """Give the place up and let the worker free the session's KV."""
        if self._link is None:
            return
        self._link.num_seats -= 1
        if self._link.connected and self._link.generation == self._generation:
            try:
                self._link.forget(self._session_id, epoch)
            except SpecinferError as error:
                log.warning("verify session %s was not closed: %s", self._session_id, error.message)
        self._link = None

    async def _sit(
        self, token_ids: Sequence[int], epoch: int, avoid: VerifyLink | None
    ) -> asyncio.Future[None] | None:
        """Have a place; the future of opening it when it is new. It leaves in the step's frame."""
        if self._link is not None:
            if self._link.connected and self._link.generation == self._generation:
                return None
            self._link.num_seats -= 1
            self._link = None
        link = await self._pool.wait(
            avoid,
            seconds=self._failover_seconds,
            affinity_key=self._affinity_key,
            token_ids=token_ids,
        )
        self._link, self._generation = link, link.generation
        link.num_seats += 1
        return link.open(
            self._session_id,
            epoch,
            token_ids,
            self._num_prompt_tokens,
            self._sampling,
            self._num_logprobs,
            grammar=self._grammar,
        )

    async def _ask(
        self, opening: asyncio.Future[None] | None, epoch: int, tree: TokenTree
    ) -> VerifyResult:
        assert self._link is not None
        asked = time.monotonic()
        stepping = self._link.step(self._session_id, epoch, tree)
        try:
            async with asyncio.timeout(self._step_seconds):
                # Why a session was not taken says more than that the worker does not know it.
                if opening is not None:
                    await opening
                return await stepping
        except TimeoutError as error:
            self._link.distrust(asked)
            raise Unavailable(
                f"the verify worker at {self._link.address} took more than "
                f"{self._step_seconds:g} s for a round"
            ) from error


def usable_tree(
    result: DraftResult, root: int, epoch: int, shape: ShapeQuery, vocab_size: int
) -> TokenTree:
    """The drafter's tree when it answers what was asked; raises InvalidTree or StaleEpoch.

    A tree with too many nodes is cut, which is lossless where the target draws every token.
    """
    if result.epoch != epoch:
        raise StaleEpoch(f"a tree for epoch {result.epoch}, asked for {epoch}")
    tree = result.tree
    if tree.token_ids[0] != root:
        raise InvalidTree(f"a tree below token {tree.token_ids[0]}, asked below {root}")
    tree.check_vocabulary(vocab_size)
    tree = tree.truncate(shape.max_nodes + 1)
    if tree.max_depth > shape.max_depth:
        raise InvalidTree(f"a tree of depth {tree.max_depth}, asked for {shape.max_depth}")
    return tree


def check_result(result: VerifyResult, tree: TokenTree, epoch: int, vocab_size: int) -> None:
    """Raise InternalError unless the result is one of this tree: a path of it and a tail."""
    if result.epoch != epoch + 1:
        raise InternalError(f"a result that leads to epoch {result.epoch}, not {epoch + 1}")
    if len(result.token_ids) != len(result.accepted) + 1:
        raise InternalError(f"{len(result.accepted)} accepted, {len(result.token_ids)} tokens")
    parent = 0
    for node, token_id in zip(result.accepted, result.token_ids, strict=False):
        if not parent < node < len(tree) or tree.parents[node] != parent:
            raise InternalError(f"accepted node {node} is no child of node {parent}")
        if tree.token_ids[node] != token_id:
            raise InternalError(f"accepted node {node} carries another token than the result")
        parent = node
    if max(result.token_ids) >= vocab_size:
        raise InternalError(f"a token outside the vocabulary of {vocab_size}")


def _last_error(error: SpecinferError) -> SpecinferError:
    """What the user is told: full stays full, all else is nobody there."""
    if isinstance(error, ResourceExhausted):
        return ResourceExhausted(error.message, retry_after=error.retry_after or 1.0)
    if isinstance(error, Unavailable):
        return error
    return Unavailable(f"the verify tier failed a round again and again: {error.message}")
