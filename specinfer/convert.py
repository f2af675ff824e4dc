"""Between our plain data and the wire, both ways; the only module that knows both forms.

Everything that comes off the wire is treated as hostile: the dataclasses validate themselves, and
this module turns absent fields into their documented defaults. It knows nothing of channels,
sessions or tensors.
"""

from __future__ import annotations

from typing import Literal, get_args

from specinfer.errors import InvalidRequest, SpecinferError, error_class
from specinfer.messages import (
    Capabilities,
    ChatMessage,
    DraftResult,
    Finished,
    GenerateEvent,
    GenerateRequest,
    RoundFacts,
    ShapeQuery,
    SpeculationOptions,
    SpeculationSummary,
    Started,
    StepCost,
    TokenLogprob,
    TokensEvent,
    Usage,
    VerifyResult,
    WorkerInfo,
    WorkerLoad,
)
from specinfer.sampling import SamplingParams, StopConditions
from specinfer.tree import MAX_TREE_NODES, TokenTree
from specinfer.v1 import draft_pb2, router_pb2, tree_pb2, verify_pb2


def tree_to_wire(tree: TokenTree) -> tree_pb2.TokenTree:
    """Message of a tree."""
    return tree_pb2.TokenTree(
        token_ids=tree.token_ids,
        parents=tree.parents,
        drafter_ids=tree.drafter_ids,
        scores=tree.scores,
    )


def tree_from_wire(wire: tree_pb2.TokenTree) -> TokenTree:
    """Tree of a message; raises InvalidTree. The size is checked before anything is copied."""
    if len(wire.token_ids) > MAX_TREE_NODES:
        raise error_class("INVALID_TREE")(
            f"a tree has at most {MAX_TREE_NODES} nodes, got {len(wire.token_ids)}"
        )
    return TokenTree(
        tuple(wire.token_ids), tuple(wire.parents), tuple(wire.drafter_ids), tuple(wire.scores)
    )


def sampling_to_wire(
    sampling: SamplingParams, *, with_seed: bool = True
) -> tree_pb2.SamplingParams:
    """Message of sampling parameters; without its seed the router chooses one."""
    wire = tree_pb2.SamplingParams(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias),
    )
    if with_seed:
        wire.seed = sampling.seed
    return wire


_SamplingField = Literal[
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
]
_SAMPLING_FIELDS: tuple[_SamplingField, ...] = get_args(_SamplingField)


def sampling_from_wire(wire: tree_pb2.SamplingParams) -> SamplingParams:
    """Parameters of a message, absent fields at their defaults; raises InvalidRequest."""
    given = {name: getattr(wire, name) for name in _SAMPLING_FIELDS if wire.HasField(name)}
    return SamplingParams(**given, logit_bias=dict(wire.logit_bias))


def status_to_wire(error: SpecinferError) -> tree_pb2.ItemStatus:
    """Status of an item that failed."""
    return tree_pb2.ItemStatus(code=error.code, reason=error.reason, message=error.message)


def status_error(wire: tree_pb2.ItemStatus) -> SpecinferError | None:
    """The error that a status stands for; None for success."""
    if not wire.code:
        return None
    return error_class(wire.reason, wire.code)(wire.message)


def shape_to_wire(shape: ShapeQuery) -> draft_pb2.ShapeQuery:
    """Message of a shape query."""
    return draft_pb2.ShapeQuery(
        max_nodes=shape.max_nodes,
        max_depth=shape.max_depth,
        widths=shape.widths,
        branch=shape.branch,
    )


def shape_from_wire(wire: draft_pb2.ShapeQuery) -> ShapeQuery:
    """Shape query of a message; raises InvalidRequest when it asks for an absurd tree."""
    if wire.max_nodes >= MAX_TREE_NODES or wire.max_depth >= MAX_TREE_NODES:
        raise InvalidRequest(f"a tree has at most {MAX_TREE_NODES} nodes", field="shape")
    if len(wire.widths) > MAX_TREE_NODES or any(
        not 1 <= width <= MAX_TREE_NODES for width in wire.widths
    ):
        raise InvalidRequest("widths are at least 1", field="shape")
    return ShapeQuery(wire.max_nodes, wire.max_depth, tuple(wire.widths), max(1, wire.branch))


def logprob_to_wire(logprob: TokenLogprob) -> tree_pb2.TokenLogprob:
    """Message of one token's logprob."""
    return tree_pb2.TokenLogprob(
        token_id=logprob.token_id,
        logprob=logprob.logprob,
        top=[tree_pb2.RankedToken(token_id=token, logprob=value) for token, value in logprob.top],
    )


def logprob_from_wire(wire: tree_pb2.TokenLogprob) -> TokenLogprob:
    """Logprob of a message."""
    return TokenLogprob(
        wire.token_id, wire.logprob, tuple((ranked.token_id, ranked.logprob) for ranked in wire.top)
    )


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
        epoch=wire.epoch,
        accepted=tuple(wire.accepted),
        token_ids=tuple(wire.token_ids),
        logprobs=tuple(logprob_from_wire(logprob) for logprob in wire.logprobs),
        num_cached_tokens=wire.num_cached_tokens,
        num_rows=wire.num_rows,
        queue_seconds=wire.queue_seconds,
        compute_seconds=wire.compute_seconds,
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
    """Description of a message."""
    return WorkerInfo(
        **{name: getattr(wire, name) for name in _INFO_FIELDS},
        acceptance_rules=tuple(wire.acceptance_rules),
        step_costs=tuple(
            StepCost(cost.num_rows, cost.context_len, cost.seconds) for cost in wire.step_costs
        ),
    )


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


def request_to_wire(request: GenerateRequest) -> router_pb2.GenerateRequest:
    """Message of a user call."""
    wire = router_pb2.GenerateRequest(
        model=request.model,
        sampling=sampling_to_wire(request.sampling, with_seed=not request.random_seed),
        stop=router_pb2.StopConditions(
            max_tokens=request.stop.max_tokens,
            stop=request.stop.stop,
            stop_token_ids=request.stop.stop_token_ids,
            ignore_eos=request.stop.ignore_eos,
        ),
        num_logprobs=request.num_logprobs,
        speculation=router_pb2.SpeculationOptions(
            disabled=not request.speculation.enabled,
            max_nodes=request.speculation.max_nodes,
            max_depth=request.speculation.max_depth,
            widths=request.speculation.widths,
        ),
        request_id=request.request_id,
    )
    if request.prompt is not None:
        wire.prompt = request.prompt
    elif request.token_ids is not None:
        wire.token_ids.token_ids.extend(request.token_ids)
        wire.token_ids.SetInParent()
    elif request.messages is not None:
        for message in request.messages:
            wire.conversation.messages.add(role=message.role, content=message.content)
        wire.conversation.SetInParent()
    return wire


def request_from_wire(wire: router_pb2.GenerateRequest) -> GenerateRequest:
    """User call of a message; raises InvalidRequest naming the field at fault."""
    kind = wire.WhichOneof("input")
    if kind is None:
        raise InvalidRequest("give a prompt, token ids or a conversation", field="input")
    return GenerateRequest(
        prompt=wire.prompt if kind == "prompt" else None,
        token_ids=tuple(wire.token_ids.token_ids) if kind == "token_ids" else None,
        messages=_messages_from_wire(wire.conversation) if kind == "conversation" else None,
        model=wire.model,
        sampling=sampling_from_wire(wire.sampling),
        random_seed=not wire.sampling.HasField("seed"),
        stop=_stop_from_wire(wire.stop),
        num_logprobs=wire.num_logprobs if wire.HasField("num_logprobs") else None,
        speculation=_speculation_from_wire(wire.speculation),
        request_id=wire.request_id,
    )


def _messages_from_wire(wire: router_pb2.Conversation) -> tuple[ChatMessage, ...]:
    return tuple(ChatMessage(message.role, message.content) for message in wire.messages)


def _stop_from_wire(wire: router_pb2.StopConditions) -> StopConditions:
    return StopConditions(
        max_tokens=wire.max_tokens if wire.HasField("max_tokens") else None,
        stop=tuple(wire.stop),
        stop_token_ids=tuple(wire.stop_token_ids),
        ignore_eos=wire.ignore_eos,
    )


def _speculation_from_wire(wire: router_pb2.SpeculationOptions) -> SpeculationOptions:
    return SpeculationOptions(
        enabled=not wire.disabled,
        max_nodes=wire.max_nodes if wire.HasField("max_nodes") else None,
        max_depth=wire.max_depth if wire.HasField("max_depth") else None,
        widths=tuple(wire.widths),
    )


_ROUND_FIELDS = tuple(RoundFacts.__dataclass_fields__)
_STARTED_FIELDS = tuple(Started.__dataclass_fields__)
_USAGE_FIELDS = tuple(Usage.__dataclass_fields__)


def event_to_wire(event: GenerateEvent) -> router_pb2.GenerateResponse:
    """Message of one event of a stream."""
    if isinstance(event, Started):
        started = {name: getattr(event, name) for name in _STARTED_FIELDS}
        return router_pb2.GenerateResponse(started=router_pb2.Started(**started))
    if isinstance(event, TokensEvent):
        return router_pb2.GenerateResponse(tokens=_tokens_to_wire(event))
    return router_pb2.GenerateResponse(finished=_finished_to_wire(event))


def event_from_wire(wire: router_pb2.GenerateResponse) -> GenerateEvent:
    """Event of a message; raises InvalidRequest when it is none."""
    kind = wire.WhichOneof("event")
    if kind == "started":
        return Started(**{name: getattr(wire.started, name) for name in _STARTED_FIELDS})
    if kind == "tokens":
        return _tokens_from_wire(wire.tokens)
    if kind == "finished":
        return _finished_from_wire(wire.finished)
    raise InvalidRequest("an event of a kind that this version does not know")


def _tokens_to_wire(event: TokensEvent) -> router_pb2.Tokens:
    return router_pb2.Tokens(
        offset=event.offset,
        text=event.text,
        token_ids=event.token_ids,
        num_accepted_tokens=event.num_accepted_tokens,
        logprobs=[logprob_to_wire(logprob) for logprob in event.logprobs],
        round=router_pb2.RoundFacts(**{n: getattr(event.round, n) for n in _ROUND_FIELDS}),
    )


def _tokens_from_wire(wire: router_pb2.Tokens) -> TokensEvent:
    return TokensEvent(
        offset=wire.offset,
        text=wire.text,
        token_ids=tuple(wire.token_ids),
        num_accepted_tokens=wire.num_accepted_tokens,
        logprobs=tuple(logprob_from_wire(logprob) for logprob in wire.logprobs),
        round=RoundFacts(**{name: getattr(wire.round, name) for name in _ROUND_FIELDS}),
    )


def _finished_to_wire(event: Finished) -> router_pb2.Finished:
    summary = event.speculation
    return router_pb2.Finished(
        reason=event.reason,
        stop_match=event.stop_match,
        usage=router_pb2.Usage(**{name: getattr(event.usage, name) for name in _USAGE_FIELDS}),
        speculation=router_pb2.SpeculationSummary(
            num_rounds=summary.num_rounds,
            num_drafts=summary.num_drafts,
            num_draft_tokens=summary.num_draft_tokens,
            num_accepted_tokens=summary.num_accepted_tokens,
            num_accepted_tokens_per_pos=summary.num_accepted_tokens_per_pos,
            root_only_reasons=dict(summary.root_only_reasons),
        ),
    )


def _finished_from_wire(wire: router_pb2.Finished) -> Finished:
    summary = wire.speculation
    return Finished(
        reason=wire.reason,
        stop_match=wire.stop_match,
        usage=Usage(**{name: getattr(wire.usage, name) for name in _USAGE_FIELDS}),
        speculation=SpeculationSummary(
            num_rounds=summary.num_rounds,
            num_drafts=summary.num_drafts,
            num_draft_tokens=summary.num_draft_tokens,
            num_accepted_tokens=summary.num_accepted_tokens,
            num_accepted_tokens_per_pos=tuple(summary.num_accepted_tokens_per_pos),
            root_only_reasons=tuple(sorted(summary.root_only_reasons.items())),
        ),
    )


_CAPABILITY_FIELDS = tuple(
    name for name in Capabilities.__dataclass_fields__ if name != "acceptance_rules"
)


def capabilities_to_wire(capabilities: Capabilities) -> router_pb2.GetCapabilitiesResponse:
    """Message of a cluster's capabilities."""
    return router_pb2.GetCapabilitiesResponse(
        **{name: getattr(capabilities, name) for name in _CAPABILITY_FIELDS},
        acceptance_rules=capabilities.acceptance_rules,
    )


def capabilities_from_wire(wire: router_pb2.GetCapabilitiesResponse) -> Capabilities:
    """Capabilities of a message."""
    return Capabilities(
        **{name: getattr(wire, name) for name in _CAPABILITY_FIELDS},
        acceptance_rules=tuple(wire.acceptance_rules),
    )
