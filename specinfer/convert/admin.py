"""What operators are told, on the wire."""

from __future__ import annotations

from specinfer.convert.workers import (
    load_from_wire,
    load_to_wire,
    worker_info_from_wire,
    worker_info_to_wire,
)
from specinfer.messages import WorkerStatus
from specinfer.messages.admin import (
    FAILED,
    OK,
    SKIPPED,
    WARNING,
    ClusterStatus,
    Finding,
    RouterStatus,
    SessionStatus,
)
from specinfer.v1 import admin_pb2

_TO_WIRE = {
    OK: admin_pb2.VERDICT_OK,
    WARNING: admin_pb2.VERDICT_WARNING,
    FAILED: admin_pb2.VERDICT_FAILED,
    SKIPPED: admin_pb2.VERDICT_SKIPPED,
}
_FROM_WIRE = {value: verdict for verdict, value in _TO_WIRE.items()}
_ROUTER_FIELDS = (
    *("router_id", "version", "model_name", "uptime_seconds", "not_ready_reason", "num_running"),
    *("num_waiting", "num_requests", "num_tokens", "num_rounds", "num_draft_tokens"),
    *("num_accepted_tokens", "num_root_only_rounds", "plain_round_seconds", "store", "store_ready"),
    "store_away_seconds",
)
_SESSION_FIELDS = (
    *("session_id", "request_id", "key_id", "model_hash", "num_prompt_tokens", "max_tokens"),
    *("num_output_tokens", "epoch", "owner", "holder", "lease_seconds", "ttl_seconds"),
    *("finish_reason", "unattended"),
)
_WORKER_FIELDS = (
    *("tier", "address", "source", "connected", "ready", "breaker", "refusal", "num_seats"),
)


def cluster_to_wire(status: ClusterStatus) -> admin_pb2.GetClusterResponse:
    """Message of a cluster's status."""
    router = {name: getattr(status.router, name) for name in _ROUTER_FIELDS}
    return admin_pb2.GetClusterResponse(
        router=admin_pb2.RouterStatus(**router),
        workers=[_worker_to_wire(worker) for worker in status.workers],
    )


def cluster_from_wire(wire: admin_pb2.GetClusterResponse) -> ClusterStatus:
    """A cluster's status of a message."""
    router = {name: getattr(wire.router, name) for name in _ROUTER_FIELDS}
    for name in ("num_requests", "num_root_only_rounds"):
        router[name] = dict(router[name])
    return ClusterStatus(
        RouterStatus(**router), tuple(_worker_from_wire(worker) for worker in wire.workers)
    )


def session_status_to_wire(status: SessionStatus) -> admin_pb2.SessionSummary:
    """Message of a session's status."""
    fields = {name: getattr(status, name) for name in _SESSION_FIELDS}
    return admin_pb2.SessionSummary(**fields)


def session_status_from_wire(wire: admin_pb2.SessionSummary) -> SessionStatus:
    """A session's status of a message."""
    return SessionStatus(**{name: getattr(wire, name) for name in _SESSION_FIELDS})


def finding_to_wire(finding: Finding) -> admin_pb2.Finding:
    """Message of a finding."""
    return admin_pb2.Finding(
        check=finding.check,
        verdict=_TO_WIRE[finding.verdict],
        detail=finding.detail,
        remedy=finding.remedy,
    )


def finding_from_wire(wire: admin_pb2.Finding) -> Finding:
    """A finding of a message; a verdict that is not known here counts as skipped."""
    return Finding(wire.check, _FROM_WIRE.get(wire.verdict, SKIPPED), wire.detail, wire.remedy)


def _worker_to_wire(worker: WorkerStatus) -> admin_pb2.WorkerStatus:
    fields = {name: getattr(worker, name) for name in _WORKER_FIELDS}
    info = None if worker.info is None else worker_info_to_wire(worker.info)
    return admin_pb2.WorkerStatus(**fields, info=info, load=load_to_wire(worker.load))


def _worker_from_wire(wire: admin_pb2.WorkerStatus) -> WorkerStatus:
    info = worker_info_from_wire(wire.info) if wire.HasField("info") else None
    return WorkerStatus(
        **{name: getattr(wire, name) for name in _WORKER_FIELDS},
        worker_id=info.worker_id if info is not None else "",
        trusted=wire.breaker in ("", "closed"),
        info=info,
        load=load_from_wire(wire.load),
    )
