"""Settings of a router process, read once from flags and environment.

This module knows nothing of what is built from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from specinfer.credentials import is_loopback
from specinfer.errors import InvalidRequest
from specinfer.messages import ShapeQuery, StepCost
from specinfer.redis_connection import RedisSettings, redis_of
from specinfer.registry import check_group
from specinfer.rpc import TlsSettings
from specinfer.settings import setting
from specinfer.step_curve import StepCurve
from specinfer.telemetry import TraceSettings
from specinfer_router.admission import AdmissionLimits
from specinfer_router.calibration import Calibration
from specinfer_router.deadlines import StepDeadline
from specinfer_router.drain import DrainLimits
from specinfer_router.following import FollowLimits
from specinfer_router.gateway.server import check_origins
from specinfer_router.goodput import AdaptiveShape
from specinfer_router.opening import SeatLimits
from specinfer_router.policy import StaticShape, TreeShapePolicy, num_nodes
from specinfer_router.router import RouterLimits

MIN_PROPOSE_SECONDS = 0.1
PROPOSE_STEPS = 4
KEYS_IN_REDIS = "redis"
REFUSE, SERVE = "refuse", "serve"
_POSITIVE = (
    *("session_seconds", "start_seconds", "stall_seconds", "max_wait_seconds"),
    "keep_alive_seconds",
    "lease_seconds",
    *("max_sessions", "max_tree_nodes", "max_streams", "max_prompt_characters"),
)


@dataclass(frozen=True)
class RouterSettings:
    """What a router is told at its start."""

    grpc: str = setting(
        "127.0.0.1:50051", "address of the gRPC service; port 0 takes a free one; or unix:/PATH"
    )
    gateway: str = setting("127.0.0.1:8000", "address of the HTTP API, health and metrics")
    metrics: str = setting("", "address of the metrics over HTTP; empty: at --gateway, for anybody")
    vllm_metrics: bool = setting(False, "show metrics under vLLM's names too")
    admin: str = setting(
        "", "address of the operators' gRPC service, for `specinfer top`; empty: none"
    )
    verify: tuple[str, ...] = setting(
        (), "address of a verify worker or unix:/PATH; repeat for more"
    )
    draft: tuple[str, ...] = setting((), "address of a draft worker or unix:/PATH; repeat for more")
    redis: str = setting(
        "", "URL of a Redis that keeps sessions and lists workers; empty: in memory"
    )
    redis_password_file: Path | None = setting(None, "file that holds Redis's password")
    redis_ca: Path | None = setting(None, "certificates to trust for rediss://, PEM")
    redis_certificate: Path | None = setting(None, "our certificate for Redis, PEM")
    redis_key: Path | None = setting(None, "its private key, PEM")
    redis_cluster: bool = setting(False, "the Redis is a cluster")
    group: str = setting("default", "workers and routers of one group find each other in Redis")
    prefix_seconds: float = setting(
        0.02, "longest wait to hear which verify worker holds a prompt's beginning; 0 never asks"
    )
    redis_outage: str = setting(REFUSE, "new sessions while Redis is away: refuse or serve")
    redis_outage_seconds: float = setting(
        60.0, "how long running sessions go on from memory while Redis is away"
    )
    lease_seconds: float = setting(
        10.0, "after so long without a sign of its router a background session is taken over"
    )
    router_id: str = setting("", "unique name of this router; made up if empty")
    session_seconds: float = setting(3600.0, "how long a session is kept after its last change")
    max_sessions: int = setting(10_000, "most sessions kept in memory")
    policy: str = setting("adaptive", "adaptive: by goodput; static: one shape for all rounds")
    draft_nodes: int = setting(12, "most guessed tokens a round; 0 turns speculation off")
    draft_depth: int = setting(12, "deepest guess")
    plain_seconds: float = setting(
        0.08, "without guesses, tokens that take so long come together; 0: one by one"
    )
    widths: str = setting("", "children for each node of a level, such as 3,2,1; empty: best-first")
    max_tree_nodes: int = setting(64, "largest tree that a request may ask for, root included")
    propose_deadline: float = setting(
        0.0, "seconds to wait for a drafter; 0 takes four measured target steps, at least 0.1"
    )
    step_deadline: float = setting(
        0.0, "seconds after which a verify worker counts as hung; 0 derives them from its speed"
    )
    start_seconds: float = setting(120.0, "seconds to wait for a verify worker at start")
    failover_seconds: float = setting(30.0, "seconds a session waits for a verify worker")
    drain_seconds: float = setting(30.0, "seconds that running requests get at shutdown")
    handover_seconds: float = setting(
        2.0, "seconds at shutdown after which other routers take over what they can"
    )
    stall_seconds: float = setting(60.0, "a reader that takes nothing for so long is cut off")
    keep_alive_seconds: float = setting(15.0, "silence of an HTTP stream that a comment fills")
    max_streams: int = setting(256, "most requests at once")
    max_waiting: int = setting(1024, "most requests that wait for a place")
    max_wait_seconds: float = setting(60.0, "longest wait for a place")
    max_prompt_characters: int = setting(2**21, "longest prompt in characters")
    keys: str = setting("", "file of API keys, or redis for those in --redis; empty: no keys")
    cors_origin: tuple[str, ...] = setting(
        (), "web origin that may call over HTTP; repeat for more"
    )
    insecure_bind: bool = setting(False, "listen beyond this machine without TLS")
    reflection: bool = setting(True, "let gRPC tools list the services")
    tls_certificate: Path | None = setting(None, "certificate chain for gRPC and HTTP, PEM")
    tls_key: Path | None = setting(None, "its private key, PEM")
    tls_ca: Path | None = setting(None, "certificates that clients have to show, PEM")
    worker_tls_ca: Path | None = setting(None, "certificates that workers have to show, PEM")
    worker_tls_certificate: Path | None = setting(None, "our certificate for workers, PEM")
    worker_tls_key: Path | None = setting(None, "its private key, PEM")
    log_level: str = setting("info", "debug, info, warning or error")
    otlp_endpoint: str = setting("", "OTLP collector for traces, such as http://127.0.0.1:4317")
    trace_ratio: float = setting(1.0, "share of requests traced, where callers do not say")
    trace_rounds: float = setting(0.0, "share of the traces that show every round")

    def __post_init__(self) -> None:
        if not self.verify and not self.redis:
            raise InvalidRequest(
                "a router needs --redis URL to find its workers, or at least one --verify ADDRESS",
                field="verify",
            )
        check_group(self.group)
        if not 0 <= self.plain_seconds <= 1:
            raise InvalidRequest("plain_seconds is between 0 and 1", field="plain_seconds")
        if self.policy not in ("static", "adaptive"):
            raise InvalidRequest("--policy is static or adaptive", field="policy")
        self._check_numbers()
        check_origins(self.cors_origin)
        if self.keys == KEYS_IN_REDIS and not self.redis:
            raise InvalidRequest("--keys redis needs --redis URL", field="keys")
        redis_of(self)
        if self.redis_outage not in (REFUSE, SERVE):
            raise InvalidRequest(
                "--redis-outage is refuse or serve: what becomes of new sessions meanwhile",
                field="redis_outage",
            )
        for prefix in ("tls", "worker_tls"):
            certificate, key = (
                getattr(self, f"{prefix}_{part}") for part in ("certificate", "key")
            )
            if (certificate is None) != (key is None):
                name = prefix.replace("_", "-")
                raise InvalidRequest(
                    f"--{name}-certificate and --{name}-key are given together", field=prefix
                )
        if self.admin and not is_loopback(self.admin) and not self.keys:
            raise InvalidRequest(
                "--admin beyond this machine needs --keys, and operators a key of that role: "
                "whoever is let in may end anybody's session, and --tls-ca lets every user in",
                field="admin",
            )
        if self.tls_ca is not None and self.tls_certificate is None:
            raise InvalidRequest("--tls-ca needs --tls-certificate and --tls-key", field="tls")
        self.shape()

    def _check_numbers(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            flag = "--" + item.name.replace("_", "-")
            if not math.isfinite(value) or value < 0:
                raise InvalidRequest(f"{flag} is a number of 0 or more", field=item.name)
            if value == 0 and item.name in _POSITIVE:
                raise InvalidRequest(f"{flag} is more than 0", field=item.name)

    def shape(self) -> ShapeQuery:
        """The tree asked for when a request does not say; raises InvalidRequest."""
        if not 0 <= self.draft_nodes < self.max_tree_nodes or self.draft_depth < 0:
            raise InvalidRequest(
                "--draft-nodes is 0 or more and below --max-tree-nodes", field="draft_nodes"
            )
        if not self.widths:
            return ShapeQuery(max_nodes=self.draft_nodes, max_depth=self.draft_depth)
        try:
            widths = tuple(int(width) for width in self.widths.split(","))
        except ValueError as error:
            raise InvalidRequest("--widths looks like 3,2,1", field="widths") from error
        if min(widths) < 1 or num_nodes(widths) >= self.max_tree_nodes:
            raise InvalidRequest(
                "--widths are at least 1 and fit into --max-tree-nodes", field="widths"
            )
        return ShapeQuery(max_nodes=num_nodes(widths), max_depth=len(widths), widths=widths)

    def shape_policy(
        self,
        costs: tuple[StepCost, ...],
        draft_costs: Callable[[], Sequence[StepCost]] = tuple,
    ) -> TreeShapePolicy:
        """The policy, given what the target's steps cost and whom to ask for a drafter's."""
        if self.policy == "adaptive":
            calibration = Calibration(StepCurve(costs), draft_costs)
            return AdaptiveShape(self.shape(), calibration, self.plain_seconds)
        return StaticShape(self.shape())

    def limits(self, costs: tuple[StepCost, ...]) -> RouterLimits:
        """Bounds of the router, given what the target's steps cost."""
        measured = PROPOSE_STEPS * StepCurve(costs).at(1) if costs else 0.0
        return RouterLimits(
            admission=AdmissionLimits(
                max_streams=self.max_streams,
                max_waiting=self.max_waiting,
                max_wait_seconds=self.max_wait_seconds,
            ),
            seats=SeatLimits(
                propose_seconds=self.propose_deadline or max(MIN_PROPOSE_SECONDS, measured),
                step_seconds=self.step_deadline,
                failover_seconds=self.failover_seconds,
                plain_seconds=self.plain_seconds,
            ),
            max_tree_nodes=self.max_tree_nodes,
            stall_seconds=self.stall_seconds,
            follow=FollowLimits(
                still_seconds=StepDeadline(self.step_deadline).most_seconds + self.failover_seconds
            ),
            needs_store=self.redis_outage == REFUSE,
        )

    def drain_limits(self) -> DrainLimits:
        """How long the router takes to end; what is in memory alone is handed to nobody."""
        handover = min(self.handover_seconds, self.drain_seconds) if self.redis else None
        return DrainLimits(self.drain_seconds, handover)

    @property
    def traces(self) -> TraceSettings:
        """Where spans go; raises InvalidRequest."""
        return TraceSettings(self.otlp_endpoint, self.trace_ratio, self.trace_rounds)

    @property
    def redis_settings(self) -> RedisSettings | None:
        """How to reach Redis, or None without one."""
        return redis_of(self)

    @property
    def tls(self) -> TlsSettings | None:
        """TLS of the gRPC service and the gateway."""
        if self.tls_certificate is None:
            return None
        return TlsSettings(self.tls_ca, self.tls_certificate, self.tls_key)

    @property
    def workers_wanted(self) -> dict[str, str]:
        """Where workers are looked for, for a line of the log."""
        wanted = {"verify": ",".join(self.verify), "draft": ",".join(self.draft)}
        return wanted | ({"group": self.group} if self.redis else {})

    @property
    def worker_tls(self) -> TlsSettings | None:
        """TLS towards the workers."""
        if self.worker_tls_ca is None and self.worker_tls_certificate is None:
            return None
        return TlsSettings(self.worker_tls_ca, self.worker_tls_certificate, self.worker_tls_key)
