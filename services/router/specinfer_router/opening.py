"""From a request to a session: check it, make tokens of it, and put the loop's parts together.

A session is opened anew, or again from what the store keeps of it. This module knows nothing of
admission, streams or the wire.
"""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

from specinfer.errors import Mismatch, SpecinferError
from specinfer.grammar import GrammarChecker
from specinfer.messages import GenerateRequest, Started
from specinfer.metrics import RouterMetrics
from specinfer.telemetry import current_span
from specinfer_router.checks import check_request, check_token_ids, completion_room
from specinfer_router.cluster import Cluster
from specinfer_router.completion import Completion
from specinfer_router.hedging import HedgeBudget
from specinfer_router.policy import TreeShapePolicy
from specinfer_router.replay import Replay
from specinfer_router.seats import DraftSeat, VerifySeat
from specinfer_router.session import Session, SessionLimits, beyond_the_end
from specinfer_router.store import ABANDONED, SessionRecord, SessionStore, SessionTerms
from specinfer_router.store.interface import RESUMABLE
from specinfer_router.tokenizer import ServedTokenizer


@dataclass(frozen=True)
class SeatLimits:
    """How long workers may take.

    Attributes:
        propose_seconds: a drafter that takes longer is not waited for.
        step_seconds: a verify worker that takes longer for a round counts as hung; 0 derives it
            from what its passes cost.
        failover_seconds: how long a session waits for a verify worker when none is ready.
        plain_seconds: how long tokens may take that come together without guesses.
    """

    propose_seconds: float = 0.1
    step_seconds: float = 0.0
    failover_seconds: float = 30.0
    plain_seconds: float = 0.08


class SessionOpener:
    """Builds sessions for one cluster, store and tokenizer."""

    def __init__(
        self,
        cluster: Cluster,
        *,
        store: SessionStore,
        tokenizer: ServedTokenizer,
        policy: TreeShapePolicy,
        metrics: RouterMetrics,
        grammars: GrammarChecker,
        max_tree_nodes: int,
        limits: SeatLimits,
        num_running: Callable[[], int],
    ) -> None:
        """Take down what every session is made with; `num_running`: requests that are let in."""
        self._cluster = cluster
        self._store = store
        self._tokenizer = tokenizer
        self._policy = policy
        self._metrics = metrics
        self._grammars = grammars
        self._max_tree_nodes = max_tree_nodes
        self._limits = limits
        self._num_running = num_running
        self.hedges = HedgeBudget()

    @property
    def max_tree_nodes(self) -> int:
        """Largest tree, root included, that this cluster takes."""
        return min(self._max_tree_nodes, self._cluster.max_tree_nodes)

    def check(self, request: GenerateRequest) -> None:
        """Refuse what can be refused without any work.

        Raises:
            NotFound, InvalidRequest: see `check_request`.
        """
        check_request(request, self._cluster.target, self.max_tree_nodes)

    async def record(
        self, request: GenerateRequest, key_id: str, *, unattended: bool = False
    ) -> SessionRecord:
        """A record for a checked request, not kept anywhere yet.

        Raises:
            InvalidRequest: a prompt that is none, or too long with what is asked for; a grammar
                that cannot be used.
            ResourceExhausted: too many grammars wait to be compiled.
        """
        if request.grammar is not None:
            with current_span().child("compile grammar"):
                await self._grammars.check(request.grammar)
        target = self._cluster.target
        with current_span().child("tokenize"):
            prompt_ids = await self._prompt_ids(request)
        max_tokens = completion_room(
            len(prompt_ids), request.stop.max_tokens, self._cluster.max_session_tokens
        )
        sampling, stop = request.sampling, request.stop
        # What is as it was given need not be made and checked again.
        if request.random_seed:
            sampling = replace(sampling, seed=secrets.randbits(63))
        if stop.max_tokens != max_tokens:
            stop = replace(stop, max_tokens=max_tokens)
        terms = SessionTerms(
            model_hash=target.model_hash,
            num_prompt_tokens=len(prompt_ids),
            sampling=sampling,
            stop=stop,
            request_id=request.request_id,
            key_id=key_id,
            num_logprobs=request.num_logprobs,
            grammar=request.grammar,
            speculation=request.speculation,
            prediction=await self._prediction_ids(request.prediction, max_tokens),
            affinity_key=request.affinity_key,
            detail=request.detail,
            unattended=unattended,
        )
        return SessionRecord(uuid.uuid4().hex, terms, tuple(prompt_ids))

    def started(self, record: SessionRecord, request_id: str = "") -> Started:
        """The first event of a session's stream."""
        return Started(
            request_id=request_id or record.terms.request_id,
            session_id=record.session_id,
            model=self._cluster.target.model_name,
            seed=record.terms.sampling.seed,
            num_prompt_tokens=record.terms.num_prompt_tokens,
            model_hash=record.terms.model_hash,
        )

    async def open(self, record: SessionRecord, leaving: Callable[[], bool]) -> Session:
        """A new session that the store knows; no worker does yet."""
        await self._store.create(record)
        return self._session(record, self.completion(record), leaving)

    def check_resume(self, record: SessionRecord, offset: int) -> None:
        """Refuse what cannot be resumed.

        A store that has lost its last moments may hold fewer tokens than a reader has seen; they
        are made again.

        Raises:
            Mismatch: this cluster serves another model than the one that began.
            InvalidRequest: the session can never have `offset` tokens.
        """
        if record.terms.model_hash != self._cluster.target.model_hash:
            raise Mismatch("the session was begun by another model than the one that is served")
        most = num_tokens = len(record.output_ids)
        if record.finish_reason in RESUMABLE:
            room = self._cluster.max_session_tokens - record.terms.num_prompt_tokens
            most = max(num_tokens, min(record.terms.stop.max_tokens or room, room))
        if not 0 <= offset <= most:
            raise beyond_the_end(offset, num_tokens)

    def reopen(
        self,
        record: SessionRecord,
        offset: int,
        leaving: Callable[[], bool],
        *,
        whole: bool = False,
    ) -> tuple[Session, Replay]:
        """A claimed session's loop, to be run once its replay was read to the end.

        Rounds are cut at the offset. With `whole` what comes before it is told as well.
        """
        completion = self.completion(record)
        seat = None
        if record.terms.num_logprobs is not None and offset < len(record.output_ids):
            seat = self._verify_seat(record, f"{record.session_id}.again")
        session = self._session(record, completion, leaving, offset, whole=whole)
        return session, Replay(record, completion, offset, seat, whole=whole)

    def completion(self, record: SessionRecord) -> Completion:
        """Text and end of a session, before its first token."""
        stop = record.terms.stop
        eos_token_ids = self._tokenizer.eos_token_ids
        prompt_ids = record.token_ids[: record.terms.num_prompt_tokens]
        return Completion(
            self._tokenizer.vocabulary.detokenizer(prompt_ids),
            stops=stop.stop,
            stop_token_ids=frozenset(stop.stop_token_ids),
            eos_token_ids=frozenset() if stop.ignore_eos else eos_token_ids,
            max_tokens=stop.max_tokens or self._cluster.max_session_tokens,
        )

    async def _prompt_ids(self, request: GenerateRequest) -> list[int]:
        if request.messages is not None:
            return await self._tokenizer.encode_chat(request.messages, request.tools)
        if request.prompt is not None:
            return await self._tokenizer.encode(request.prompt)
        token_ids = list(request.token_ids or ())
        check_token_ids(token_ids, self._cluster.target.vocab_size, "token_ids")
        return token_ids

    async def _prediction_ids(self, prediction: str, max_tokens: int) -> tuple[int, ...]:
        if not prediction:
            return ()
        token_ids = await self._tokenizer.encode(prediction, field="prediction", special=False)
        # What lies further on cannot be reached, whatever is inserted before it.
        return tuple(token_ids[: 2 * max_tokens])

    def _session(
        self,
        record: SessionRecord,
        completion: Completion,
        leaving: Callable[[], bool],
        offset: int = 0,
        *,
        whole: bool = False,
    ) -> Session:
        max_session_tokens = self._cluster.max_session_tokens
        return Session(
            record,
            completion=completion,
            drafter=self._draft_seat(record),
            verifier=self._verify_seat(record),
            store=self._store,
            policy=self._policy,
            limits=SessionLimits(
                max_session_tokens, self.max_tree_nodes, self._limits.plain_seconds
            ),
            metrics=self._metrics,
            token_texts=self._tokenizer.vocabulary.token_texts,
            lost_before=offset,
            tell_lost=whole,
            leaving=leaving,
            num_at_once=self._num_at_once,
        )

    def _num_at_once(self) -> int:
        """Sessions of a verify worker when all that were let in have a place."""
        return -(-self._num_running() // max(1, self._cluster.verifiers.num_ready))

    def _draft_seat(self, record: SessionRecord) -> DraftSeat:
        return DraftSeat(
            self._cluster.drafters,
            record.session_id,
            record.terms.sampling,
            num_prompt_tokens=record.terms.num_prompt_tokens,
            vocab_size=self._cluster.target.vocab_size,
            deadline_seconds=self._limits.propose_seconds,
            owner=record.owner,
            hedges=self.hedges,
            grammar=record.terms.grammar,
        )

    def _verify_seat(self, record: SessionRecord, session_id: str = "") -> VerifySeat:
        terms = record.terms
        return VerifySeat(
            self._cluster.verifiers,
            session_id or record.session_id,
            terms.sampling,
            num_prompt_tokens=terms.num_prompt_tokens,
            num_logprobs=terms.num_logprobs,
            vocab_size=self._cluster.target.vocab_size,
            grammar=terms.grammar,
            affinity_key=terms.affinity_key,
            owner=record.owner,
            step_seconds=self._limits.step_seconds,
            failover_seconds=self._limits.failover_seconds,
        )


@dataclass(frozen=True)
class GivenUpUnlessRun:
    """Around what runs a session: one whose loop never began is left for others to resume.

    Attributes:
        store: where it lives.
        record: as it was when it was opened.
        session: its loop.
    """

    store: SessionStore
    record: SessionRecord
    session: Session

    async def __aenter__(self) -> None:
        """Nothing is done yet."""

    async def __aexit__(self, *raised: object) -> None:
        """Give it up where nobody ran it."""
        if not self.session.begun and not self.record.finish_reason:
            with suppress(SpecinferError):
                await self.store.finish(self.record.session_id, ABANDONED, owner=self.record.owner)
