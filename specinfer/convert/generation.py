"""What users and routers tell each other, on the wire."""

from __future__ import annotations

from specinfer.convert.shared import (
    logprob_from_wire,
    logprob_to_wire,
    sampling_from_wire,
    sampling_to_wire,
)
from specinfer.errors import InvalidRequest
from specinfer.messages import (
    Capabilities,
    ChatMessage,
    Finished,
    GenerateEvent,
    GenerateRequest,
    RoundFacts,
    SpeculationOptions,
    SpeculationSummary,
    Started,
    TokensEvent,
    Usage,
)
from specinfer.sampling import StopConditions
from specinfer.v1 import router_pb2


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
