"""What operators are told of a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from specinfer.messages.workers import WorkerStatus

OK, WARNING, FAILED, SKIPPED = VERDICTS = ("ok", "warning", "failed", "skipped")


@dataclass(frozen=True)
class RouterStatus:
    """A router and what it has counted since its start.

    Attributes:
        router_id: name that its leases bear.
        version: specinfer's version.
        model_name: model that is served, or "" before a verify worker has answered.
        uptime_seconds: since its start.
        not_ready_reason: why new requests would fail, or "".
        num_running: sessions in progress.
        num_waiting: requests that wait for a place.
        num_requests: requests ended, by outcome.
        num_tokens: tokens generated.
        num_rounds: rounds committed.
        num_draft_tokens: tokens that drafters guessed.
        num_accepted_tokens: guessed tokens that the target confirmed.
        num_root_only_rounds: rounds without a guess, by reason.
        plain_round_seconds: what one token costs without guesses; 0 while nothing is known.
        store: where sessions are kept, or "" for the router's memory.
        store_ready: whether the store answers.
        store_away_seconds: how long the store has been away; 0 when it is not, or when that has
            only been seen now.
    """

    router_id: str
    version: str
    model_name: str = ""
    uptime_seconds: float = 0.0
    not_ready_reason: str = ""
    num_running: int = 0
    num_waiting: int = 0
    num_requests: Mapping[str, int] = field(default_factory=dict)
    num_tokens: int = 0
    num_rounds: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_root_only_rounds: Mapping[str, int] = field(default_factory=dict)
    plain_round_seconds: float = 0.0
    store: str = ""
    store_ready: bool = True
    store_away_seconds: float = 0.0


@dataclass(frozen=True)
class ClusterStatus:
    """A router and every worker that it knows, at one moment."""

    router: RouterStatus
    workers: tuple[WorkerStatus, ...] = ()


@dataclass(frozen=True)
class SessionStatus:
    """What the store knows of one session, without its tokens.

    Attributes:
        session_id: id of the session.
        request_id: of the request that opened it.
        key_id: key that it belongs to, or "".
        model_hash: checkpoint whose tokens these are.
        num_prompt_tokens: tokens of the prompt.
        num_output_tokens: tokens committed after it.
        max_tokens: most of those.
        epoch: commits so far.
        owner: how often it was claimed.
        holder: router that holds it, or "".
        lease_seconds: left of the holder's lease; 0 when it has run out.
        ttl_seconds: until it is forgotten.
        finish_reason: how it ended, or "" while it runs.
        unattended: whether it runs on without a reader.
    """

    session_id: str
    request_id: str = ""
    key_id: str = ""
    model_hash: str = ""
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    max_tokens: int = 0
    epoch: int = 0
    owner: int = 0
    holder: str = ""
    lease_seconds: float = 0.0
    ttl_seconds: float = 0.0
    finish_reason: str = ""
    unattended: bool = False


@dataclass(frozen=True)
class SessionListing:
    """Some sessions.

    Attributes:
        sessions: in no order.
        partial_reason: why sessions that were asked for may be missing, or "".
    """

    sessions: tuple[SessionStatus, ...] = ()
    partial_reason: str = ""

    @property
    def partial(self) -> bool:
        """Whether sessions that were asked for may be missing."""
        return bool(self.partial_reason)


@dataclass(frozen=True)
class CancelOutcome:
    """What stands after a session was to be cancelled.

    Attributes:
        finish_reason: "cancelled", or how the session had ended before.
        had_ended: whether it had ended for good before; nothing was changed then.
    """

    finish_reason: str
    had_ended: bool = False


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: what was looked at, such as "redis policy".
        verdict: one of VERDICTS.
        detail: what was found.
        remedy: what to do about it, or "".
    """

    check: str
    verdict: str
    detail: str
    remedy: str = ""
