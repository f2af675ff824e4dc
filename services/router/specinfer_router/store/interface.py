"""What a session store promises, whatever holds the data.

A record is enough to go on with a session on any worker and through any router: with the same
tokens, sampling and seed the continuation is the same. Tensors, trees and block tables are never
stored. This module knows nothing of Redis.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from specinfer.errors import StaleEpoch
from specinfer.messages import Grammar, SpeculationOptions
from specinfer.sampling import SamplingParams, StopConditions

# The reader left; whoever resumes the session goes on with it.
ABANDONED = "abandoned"
# The session broke; resuming it tries again.
ERROR = "error"
# Ended for good by its user.
CANCELLED = "cancelled"
RESUMABLE = ("", ABANDONED, ERROR)

MAX_DOCUMENT_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class SessionTerms:
    """What a session was opened with; it never changes.

    Attributes:
        model_hash: checkpoint whose tokens these are.
        num_prompt_tokens: how many of the record's tokens are the prompt.
        sampling: how tokens are drawn, with the seed in use.
        stop: when it ends, with `max_tokens` set.
        request_id: of the request that opened it.
        key_id: API key that it belongs to, or "".
        num_logprobs: most probable tokens to report, or None.
        grammar: what the output has to match, or None.
        speculation: how to speculate.
        prediction: tokens that the output is expected to be like.
        affinity_key: sessions with the same one share a verify worker where its load allows.
        detail: whether each round's tree is sent along.
        unattended: whether it runs on without a reader, so that routers take it over by themselves
            when the one that ran it has died.
    """

    model_hash: str
    num_prompt_tokens: int
    sampling: SamplingParams
    stop: StopConditions = field(default_factory=StopConditions)
    request_id: str = ""
    key_id: str = ""
    num_logprobs: int | None = None
    grammar: Grammar | None = None
    speculation: SpeculationOptions = field(default_factory=SpeculationOptions)
    prediction: tuple[int, ...] = ()
    affinity_key: str = ""
    detail: bool = False
    unattended: bool = False


class SessionRecord(NamedTuple):
    """What a store keeps of one session.

    Attributes:
        session_id: id of the session; letters, digits, "-" and "_".
        terms: what it was opened with.
        token_ids: prompt and committed output.
        epoch: commits so far.
        owner: how often the session was claimed; only the last owner may commit. The fencing token.
        finish_reason: "stop", "length", CANCELLED, ABANDONED or ERROR; "" while the session runs.
    """

    session_id: str
    terms: SessionTerms
    token_ids: tuple[int, ...]
    epoch: int = 0
    owner: int = 0
    finish_reason: str = ""

    @property
    def output_ids(self) -> tuple[int, ...]:
        """The committed output."""
        return self.token_ids[self.terms.num_prompt_tokens :]


@dataclass(frozen=True)
class SessionSummary:
    """What an operator sees of a session; no text of it.

    Attributes:
        session_id: id of the session.
        key_id: API key that it belongs to, or "".
        model_hash: checkpoint that runs it.
        epoch: commits so far.
        num_tokens: prompt and committed output.
        num_prompt_tokens: how many of them are the prompt.
        finish_reason: as in the record; "" while it runs.
        owner: how often it was claimed.
        holder: id of the router that holds it or did so last.
        lease_seconds: how long that router still counts as alive; 0 when its lease has run out.
        ttl_seconds: how long the session is still kept.
        request_id: of the request that opened it.
        max_tokens: longest output that it may have; 0 for as long as the model allows.
        unattended: whether it runs on without a reader.
    """

    session_id: str
    key_id: str
    model_hash: str
    epoch: int
    num_tokens: int
    num_prompt_tokens: int
    finish_reason: str
    owner: int
    holder: str
    lease_seconds: float
    ttl_seconds: float
    request_id: str = ""
    max_tokens: int = 0
    unattended: bool = False


@dataclass(frozen=True)
class SessionFilter:
    """Which sessions an operator asks for.

    Attributes:
        key_id: only those of this key; "" takes all.
        resumable_only: only those that have not ended for good.
    """

    key_id: str = ""
    resumable_only: bool = False

    def takes(self, summary: SessionSummary) -> bool:
        """Whether this is one of them."""
        return (not self.key_id or summary.key_id == self.key_id) and (
            not self.resumable_only or summary.finish_reason in RESUMABLE
        )


EVERY_SESSION = SessionFilter()


@dataclass(frozen=True)
class SessionPage:
    """Sessions that were found.

    Attributes:
        found: in no order.
        partial_reason: why others that were asked for may be missing, or "".
    """

    found: tuple[SessionSummary, ...] = ()
    partial_reason: str = ""

    def __iter__(self) -> Iterator[SessionSummary]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)


class Behind(StaleEpoch):
    """The store holds an older state than its owner saw committed: it has lost data."""


class SessionStore(Protocol):
    """Keeps session records, and small documents, for a while after their last change.

    Every method may raise Unavailable when the store cannot be reached. Every method may be called
    again with the same arguments: the second call changes nothing that matters.
    """

    @property
    def away_seconds(self) -> float:
        """How long it could not be reached, and what runs here has been in memory alone; or 0."""
        ...

    async def create(self, record: SessionRecord) -> None:
        """Keep a new session at epoch 0.

        Raises:
            StaleEpoch: another session has this id.
            ResourceExhausted: the store is full.
        """
        ...

    async def commit(
        self,
        session_id: str,
        epoch: int,
        token_ids: Sequence[int],
        finish_reason: str = "",
        *,
        owner: int = 0,
    ) -> int:
        """Add the tokens that lead from `epoch` to the next one, which is returned.

        Raises:
            Cancelled: the session was ended by its user.
            LeaseLost: `owner` is not its last one any more.
            Behind: the store has lost commits that it had answered for; `restore` mends it.
            StaleEpoch: the session is not at `epoch` and this is no repetition of its last commit.
            NotFound: no such session, or it has expired.
        """
        ...

    async def claim(self, session_id: str, *, orphaned_only: bool = False) -> SessionRecord:
        """Take a session over: its record with a new owner, running again if it was resumable.

        From now on nobody who owned it before can commit. A reader that resumes always takes over;
        a router that looks for sessions of dead ones asks with `orphaned_only`.

        Raises:
            LeaseLost: with `orphaned_only`, the session's lease still runs, or it has ended.
            NotFound: no such session, or it has expired.
        """
        ...

    async def restore(self, record: SessionRecord, *, known_owner: int | None = None) -> None:
        """Put a session back that the store has lost, or holds an older state of.

        `known_owner` is the owner number that the store itself gave last, where `record.owner` was
        counted without it. The same or a later state of the same owner stays as it is.

        Raises:
            LeaseLost: somebody else has claimed the session since.
            Cancelled: its user has ended it.
        """
        ...

    async def orphans(self, limit: int) -> Sequence[str]:
        """At most `limit` ids of unattended sessions whose router seems dead; `claim` decides."""
        ...

    async def summary(self, session_id: str) -> SessionSummary:
        """What an operator sees of one session; raises NotFound."""
        ...

    async def sessions(self, limit: int, wanted: SessionFilter = EVERY_SESSION) -> SessionPage:
        """At most `limit` of the sessions wanted, in no order; for operators, not for each round.

        It looks at as many as it takes, within bounds that `partial_reason` tells of.
        """
        ...

    async def finish(
        self, session_id: str, finish_reason: str, *, owner: int | None = None
    ) -> None:
        """Mark a session as finished without tokens; a reason that stands already stays.

        With an `owner` that is not the last one any more nothing happens. CANCELLED also replaces a
        reason that could be resumed. A session that is gone already is none of the caller's worry.
        """
        ...

    async def load(self, session_id: str) -> SessionRecord:
        """The record of a session; raises NotFound."""
        ...

    async def tail(self, session_id: str, num_tokens: int) -> tuple[tuple[int, ...], int, str]:
        """Tokens after the first `num_tokens`, the epoch and the finish reason; raises NotFound.

        It costs what is new, however long the session is.
        """
        ...

    async def put_document(self, name: str, text: str) -> None:
        """Keep a text under a name, replacing what was there.

        Raises:
            InvalidRequest: it is larger than MAX_DOCUMENT_BYTES, or the name is none.
        """
        ...

    async def get_document(self, name: str) -> str:
        """The text under a name; raises NotFound."""
        ...

    async def delete_document(self, name: str) -> None:
        """Forget the text under a name; there need be none."""
        ...

    async def check(self) -> None:
        """Raise Unavailable, saying what to do, unless the store can be reached."""
        ...

    async def close(self) -> None:
        """Give connections up."""
        ...
