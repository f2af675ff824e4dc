"""What routers and workers tell each other, on the wire."""

from __future__ import annotations

from collections.abc import Iterable

from specinfer.convert.shared import (
    logprob_from_wire,
    logprob_to_wire,
    tree_from_wire,
    tree_to_wire,
)
from specinfer.errors import InvalidRequest
from specinfer.messages import (
    DraftResult,
    ShapeQuery,
    StepCost,
    VerifyResult,
    WorkerInfo,
    WorkerLoad,
)
from specinfer.tree import MAX_TREE_NODES
from specinfer.v1 import draft_pb2, tree_pb2, verify_pb2

# No pass is this short or long; NaN is neither.
LEAST_STEP_SECONDS, MOST_STEP_SECONDS = 1e-9, 1e6


def shape_to_wire(shape: ShapeQuery) -> draft_pb2.ShapeQuery:
    """Message of a shape query."""
    wire = draft_pb2.ShapeQuery()
    fill_shape(wire, shape)
    return wire


def fill_shape(wire: draft_pb2.ShapeQuery, shape: ShapeQuery) -> None:
    """Write a shape query into an empty message."""
    wire.SetInParent()
    wire.max_nodes = shape.max_nodes
    wire.max_depth = shape.max_depth
    wire.branch = shape.branch
    if shape.widths:
        wire.widths.extend(shape.widths)


def shape_from_wire(wire: draft_pb2.ShapeQuery) -> ShapeQuery:
    """Shape query of a message; raises InvalidRequest when it asks for an absurd tree."""
    if wire.max_nodes >= MAX_TREE_NODES or wire.max_depth >= MAX_TREE_NODES:
        raise InvalidRequest(f"a tree has at most {MAX_TREE_NODES} nodes", field="shape")
    if len(wire.widths) > MAX_TREE_NODES or any(
        not 1 <= width <= MAX_TREE_NODES for width in wire.widths
    ):
        raise InvalidRequest("widths are at least 1", field="shape")
    return ShapeQuery(wire.max_nodes, wire.max_depth, tuple(wire.widths), max(1, wire.branch))


def draft_result_to_wire(
    item: draft_pb2.DraftItem, result: DraftResult
) -> draft_pb2.DraftItemResult:
    """Answer to a propose item."""
    return draft_pb2.DraftItemResult(
        item_id=item.item_id,
        session_id=item.session_id,
        epoch=result.epoch,
        tree=tree_to_wire(result.tree),
        queue_seconds=result.queue_seconds,
        compute_seconds=result.compute_seconds,
    )


def draft_result_from_wire(wire: draft_pb2.DraftItemResult) -> DraftResult:
    """Result of a message; raises InvalidTree."""
    return DraftResult(
        wire.epoch, tree_from_wire(wire.tree), wire.queue_seconds, wire.compute_seconds
    )


def verify_result_to_wire(
    item: verify_pb2.VerifyItem, result: VerifyResult
) -> verify_pb2.VerifyItemResult:
    """Answer to a step item."""
    return verify_pb2.VerifyItemResult(
        item_id=item.item_id,
        session_id=item.session_id,
        epoch=result.epoch,
        accepted=result.accepted,
        token_ids=result.token_ids,
        logprobs=[logprob_to_wire(logprob) for logprob in result.logprobs],
        num_cached_tokens=result.num_cached_tokens,
        num_rows=result.num_rows,
        queue_seconds=result.queue_seconds,
        compute_seconds=result.compute_seconds,
    )


def verify_result_from_wire(wire: verify_pb2.VerifyItemResult) -> VerifyResult:
    """Result of a message."""
    return VerifyResult(
        wire.epoch,
        tuple(wire.accepted[:]),
        tuple(wire.token_ids[:]),
        tuple(map(logprob_from_wire, wire.logprobs)) if wire.logprobs else (),
        wire.num_cached_tokens,
        wire.num_rows,
        wire.queue_seconds,
        wire.compute_seconds,
    )


_INFO_FIELDS = (
    "worker_id",
    "model_name",
    "model_hash",
    "tokenizer_hash",
    "vocab_size",
    "dtype",
    "device",
    "max_model_len",
    "max_sessions",
    "max_tree_nodes",
    "num_blocks",
    "block_size",
    "row_invariant",
    "version",
    "kv_dtype",
    "costs_measured_at",
)


def worker_info_to_wire(info: WorkerInfo) -> tree_pb2.WorkerInfo:
    """Message of a worker's description."""
    return tree_pb2.WorkerInfo(
        **{name: getattr(info, name) for name in _INFO_FIELDS},
        acceptance_rules=info.acceptance_rules,
        step_costs=[
            tree_pb2.StepCost(
                num_rows=cost.num_rows, context_len=cost.context_len, seconds=cost.seconds
            )
            for cost in info.step_costs
        ],
    )


def worker_info_from_wire(wire: tree_pb2.WorkerInfo) -> WorkerInfo:
    """Description of a message; step costs that cannot be are as good as none."""
    return WorkerInfo(
        **{name: getattr(wire, name) for name in _INFO_FIELDS},
        acceptance_rules=tuple(wire.acceptance_rules),
        step_costs=_step_costs_from_wire(wire.step_costs),
    )


def _step_costs_from_wire(wire: Iterable[tree_pb2.StepCost]) -> tuple[StepCost, ...]:
    costs = tuple(StepCost(cost.num_rows, cost.context_len, cost.seconds) for cost in wire)
    # One absurd point would spoil whatever is divided by it or averaged with it, for good.
    believable = all(
        cost.num_rows >= 1 and LEAST_STEP_SECONDS <= cost.seconds <= MOST_STEP_SECONDS
        for cost in costs
    )
    return costs if believable else ()


def load_to_wire(load: WorkerLoad) -> tree_pb2.WorkerLoad:
    """Message of a worker's load."""
    return tree_pb2.WorkerLoad(
        num_sessions=load.num_sessions,
        num_waiting=load.num_waiting,
        num_free_blocks=load.num_free_blocks,
        draining=load.draining,
    )


def load_from_wire(wire: tree_pb2.WorkerLoad) -> WorkerLoad:
    """Load of a message."""
    return WorkerLoad(wire.num_sessions, wire.num_waiting, wire.num_free_blocks, wire.draining)
