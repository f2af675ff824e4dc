"""Every error that specinfer raises, and the gRPC status each one travels as.

    SpecinferError
    ├── InvalidRequest            INVALID_ARGUMENT     the caller must change something
    │   ├── InvalidTree           INVALID_ARGUMENT     a token tree that is none
    │   └── InvalidCheckpoint     FAILED_PRECONDITION  a model folder that cannot be served
    ├── NotFound                  NOT_FOUND            unknown model or session
    ├── Unauthenticated           UNAUTHENTICATED      no key, or one that is not known
    ├── PermissionDenied          PERMISSION_DENIED    a key that may not do this
    ├── StaleEpoch                ABORTED              the session has moved on
    │   └── LeaseLost             ABORTED              somebody else owns the session now
    ├── Mismatch                  FAILED_PRECONDITION  parts that do not belong together
    ├── ResourceExhausted         RESOURCE_EXHAUSTED   full for now; retry later
    │   └── ReaderStalled         RESOURCE_EXHAUSTED   a stream that was not read; resume it
    ├── Unavailable               UNAVAILABLE          nobody can serve this now; retry
    │   └── RouterLeaving         UNAVAILABLE          the router shuts down; go on at another one
    ├── DeadlineExceeded          DEADLINE_EXCEEDED    the caller's time ran out
    ├── Cancelled                 CANCELLED            the caller left
    ├── ClientClosed              -                    a closed client was used
    └── InternalError             INTERNAL             our fault

This module knows nothing of gRPC objects, sessions or tensors; `rpc.py` puts the codes on the wire.
"""

from __future__ import annotations

from typing import ClassVar


class SpecinferError(Exception):
    """Base of all errors; `str(error)` says what happened and what to do about it.

    Attributes:
        code: name of the gRPC status code the error travels as.
        reason: stable, upper-case name for programs.
        retryable: whether the same call may succeed later without any change.
        field: name of the request field at fault, or "".
        request_id: id of the request that failed, or "".
        retry_after: seconds to wait before a retry, or None.
    """

    code: ClassVar[str] = "INTERNAL"
    reason: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        field: str = "",
        request_id: str = "",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.request_id = request_id
        self.retry_after = retry_after


class InvalidRequest(SpecinferError):
    """A request that cannot be served as it is; `field` names what to change."""

    code = "INVALID_ARGUMENT"
    reason = "INVALID_REQUEST"


class InvalidTree(InvalidRequest):
    """Arrays that do not describe a token tree."""

    reason = "INVALID_TREE"


class InvalidCheckpoint(InvalidRequest):
    """A model folder that is missing, truncated, pickled or of an unsupported kind."""

    code = "FAILED_PRECONDITION"
    reason = "INVALID_CHECKPOINT"


class NotFound(SpecinferError):
    """A model or session that this cluster does not have."""

    code = "NOT_FOUND"
    reason = "NOT_FOUND"


class Unauthenticated(SpecinferError):
    """A call without a key, or with one that is not known."""

    code = "UNAUTHENTICATED"
    reason = "UNAUTHENTICATED"


class PermissionDenied(SpecinferError):
    """A call with a key that may not make it."""

    code = "PERMISSION_DENIED"
    reason = "PERMISSION_DENIED"


class StaleEpoch(SpecinferError):
    """An item for an epoch that the session has left."""

    code = "ABORTED"
    reason = "STALE_EPOCH"


class LeaseLost(StaleEpoch):
    """Somebody else has claimed the session; whoever reads this must let go of it."""

    reason = "LEASE_LOST"


class Mismatch(SpecinferError):
    """Parts that do not belong together, such as a drafter with another tokenizer."""

    code = "FAILED_PRECONDITION"
    reason = "MISMATCH"


class ResourceExhausted(SpecinferError):
    """The cluster is full at the moment; `retry_after` says when to try again."""

    code = "RESOURCE_EXHAUSTED"
    reason = "RESOURCE_EXHAUSTED"
    retryable = True


class ReaderStalled(ResourceExhausted):
    """A stream that nobody read was cut off; resuming it at its offset goes on with it."""

    reason = "READER_STALLED"


class Unavailable(SpecinferError):
    """Nobody can serve the request at the moment."""

    code = "UNAVAILABLE"
    reason = "UNAVAILABLE"
    retryable = True


class RouterLeaving(Unavailable):
    """The router that was asked shuts down: others go on with its streams and take its requests."""

    reason = "ROUTER_LEAVING"


class DeadlineExceeded(SpecinferError):
    """The caller's deadline passed before the answer was complete."""

    code = "DEADLINE_EXCEEDED"
    reason = "DEADLINE_EXCEEDED"


class Cancelled(SpecinferError):
    """The caller gave the request up."""

    code = "CANCELLED"
    reason = "CANCELLED"


class ClientClosed(SpecinferError):
    """A client was used after `close`."""

    code = "FAILED_PRECONDITION"
    reason = "CLIENT_CLOSED"


class InternalError(SpecinferError):
    """A fault of specinfer's own."""


_KINDS: tuple[type[SpecinferError], ...] = (
    InvalidRequest,
    InvalidTree,
    InvalidCheckpoint,
    NotFound,
    Unauthenticated,
    PermissionDenied,
    StaleEpoch,
    LeaseLost,
    Mismatch,
    ResourceExhausted,
    ReaderStalled,
    Unavailable,
    RouterLeaving,
    DeadlineExceeded,
    Cancelled,
    ClientClosed,
    InternalError,
)


def error_class(reason: str, code: str = "INTERNAL") -> type[SpecinferError]:
    """The class for a reason from the wire; an unknown reason falls back to its status code."""
    for kind in _KINDS:
        if kind.reason == reason:
            return kind
    for kind in _KINDS:
        if kind.code == code:
            return kind
    return InternalError
