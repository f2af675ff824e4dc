"""Who calls, and how much of the cluster they may use at once.

This module knows nothing of HTTP, gRPC or what is generated.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from specinfer.telemetry import TraceContext

MAX_PRIORITY = 100
# A user generates; an operator may also look at the cluster and end anybody's session.
USER, OPERATOR = ROLES = ("user", "operator")


@dataclass(frozen=True)
class KeyLimits:
    """Bounds of one API key; None sets no bound of its own.

    Attributes:
        max_streams: requests in progress or waiting at once.
        requests_per_minute: requests begun.
        tokens_per_minute: prompt and completion tokens together.
        max_priority: highest priority that requests may ask for.
    """

    max_streams: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_priority: int = 0


@dataclass(frozen=True)
class Caller:
    """Whoever made a call.

    Attributes:
        key_id: public name of the key, "" where no keys are asked for. Sessions belong to it.
        limits: of the key.
        seconds_left: until the caller's deadline when the call came, or None.
        role: one of ROLES.
        resumes: whether it goes on with a stream elsewhere when it is told to.
        trace: where its trace stands.
    """

    key_id: str = ""
    limits: KeyLimits = field(default_factory=KeyLimits)
    seconds_left: float | None = None
    role: str = USER
    resumes: bool = False
    trace: TraceContext = field(default_factory=TraceContext)


# Where no keys are asked for nobody stands below anybody.
ANYBODY = Caller(limits=KeyLimits(max_priority=MAX_PRIORITY), role=OPERATOR)
