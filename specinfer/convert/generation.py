"""What routers tell users, on the wire."""

from __future__ import annotations

from specinfer.convert.shared import (
    logprob_from_wire,
    logprob_to_wire,
    tree_from_wire,
    tree_to_wire,
)
from specinfer.errors import InvalidRequest
from specinfer.messages import (
    Capabilities,
    Finished,
    GenerateEvent,
    RequestReport,
    RoundDetail,
    RoundFacts,
    RoundReport,
    SpeculationSummary,
    Started,
    Timings,
    TokensEvent,
    Usage,
)
from specinfer.v1 import router_pb2

_ROUND_FIELDS = RoundFacts._fields


_STARTED_FIELDS = tuple(Started.__dataclass_fields__)


_USAGE_FIELDS = tuple(Usage.__dataclass_fields__)


_TIMING_FIELDS = tuple(Timings.__dataclass_fields__)


def event_to_wire(event: GenerateEvent) -> router_pb2.GenerateResponse:
    """Message of one event of a stream."""
    wire = router_pb2.GenerateResponse()
    fill_event(wire, event)
    return wire


def fill_event(wire: router_pb2.GenerateResponse, event: GenerateEvent) -> None:
    """Write one event of a stream into an empty message."""
    if isinstance(event, TokensEvent):
        _fill_tokens(wire.tokens, event)
    elif isinstance(event, Started):
        started = {name: getattr(event, name) for name in _STARTED_FIELDS}
        wire.started.CopyFrom(router_pb2.Started(**started))
    else:
        wire.finished.CopyFrom(_finished_to_wire(event))


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


def _fill_tokens(tokens: router_pb2.Tokens, event: TokensEvent) -> None:
    # Filled in place: a message that is given to another one is copied by way of its bytes.
    tokens.offset = event.offset
    tokens.text = event.text
    tokens.token_ids.extend(event.token_ids)
    tokens.num_accepted_tokens = event.num_accepted_tokens
    if event.logprobs:
        tokens.logprobs.extend(map(logprob_to_wire, event.logprobs))
    _fill_facts(tokens.round, event.round)
    if event.detail is not None:
        tokens.detail.CopyFrom(_detail_to_wire(event.detail))


def _tokens_from_wire(wire: router_pb2.Tokens) -> TokensEvent:
    return TokensEvent(
        offset=wire.offset,
        text=wire.text,
        token_ids=tuple(wire.token_ids),
        num_accepted_tokens=wire.num_accepted_tokens,
        logprobs=tuple(logprob_from_wire(logprob) for logprob in wire.logprobs),
        round=_facts_from_wire(wire.round),
        detail=_detail_from_wire(wire.detail) if wire.HasField("detail") else None,
    )


def _facts_to_wire(facts: RoundFacts) -> router_pb2.RoundFacts:
    wire = router_pb2.RoundFacts()
    _fill_facts(wire, facts)
    return wire


def _fill_facts(wire: router_pb2.RoundFacts, facts: RoundFacts) -> None:
    # Written out: every round of every session passes here, and by name it takes twice as long.
    wire.epoch = facts.epoch
    wire.num_draft_tokens = facts.num_draft_tokens
    wire.num_accepted_tokens = facts.num_accepted_tokens
    wire.root_only_reason = facts.root_only_reason
    wire.draft_seconds = facts.draft_seconds
    wire.verify_seconds = facts.verify_seconds
    wire.queue_seconds = facts.queue_seconds
    wire.network_seconds = facts.network_seconds
    wire.router_seconds = facts.router_seconds
    wire.commit_seconds = facts.commit_seconds
    wire.draft_depth = facts.draft_depth


def _facts_from_wire(wire: router_pb2.RoundFacts) -> RoundFacts:
    return RoundFacts(**{name: getattr(wire, name) for name in _ROUND_FIELDS})


def _detail_to_wire(detail: RoundDetail) -> router_pb2.RoundDetail:
    return router_pb2.RoundDetail(
        tree=tree_to_wire(detail.tree),
        accepted=detail.accepted,
        node_texts=detail.node_texts,
        token_texts=detail.token_texts,
    )


def _detail_from_wire(wire: router_pb2.RoundDetail) -> RoundDetail:
    return RoundDetail(
        tree_from_wire(wire.tree),
        tuple(wire.accepted),
        tuple(wire.node_texts),
        tuple(wire.token_texts),
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
        timings=_timings_to_wire(event.timings),
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
        timings=_timings_from_wire(wire.timings),
    )


def _timings_to_wire(timings: Timings) -> router_pb2.Timings:
    return router_pb2.Timings(**{name: getattr(timings, name) for name in _TIMING_FIELDS})


def _timings_from_wire(wire: router_pb2.Timings) -> Timings:
    return Timings(**{name: getattr(wire, name) for name in _TIMING_FIELDS})


_REPORT_FIELDS = (
    "request_id",
    "session_id",
    "outcome",
    "arrived_at",
    "num_prompt_tokens",
    "num_cached_tokens",
)


def report_to_wire(report: RequestReport) -> router_pb2.ExplainResponse:
    """Message of where a request's time went."""
    return router_pb2.ExplainResponse(
        **{name: getattr(report, name) for name in _REPORT_FIELDS},
        timings=_timings_to_wire(report.timings),
        rounds=[
            router_pb2.RoundReport(
                offset=one.offset,
                num_tokens=one.num_tokens,
                start_seconds=one.start_seconds,
                seconds=one.seconds,
                facts=_facts_to_wire(one.facts),
            )
            for one in report.rounds
        ],
    )


def report_from_wire(wire: router_pb2.ExplainResponse) -> RequestReport:
    """Where a request's time went, of a message."""
    return RequestReport(
        **{name: getattr(wire, name) for name in _REPORT_FIELDS},
        timings=_timings_from_wire(wire.timings),
        rounds=tuple(
            RoundReport(
                one.offset,
                one.num_tokens,
                one.start_seconds,
                one.seconds,
                _facts_from_wire(one.facts),
            )
            for one in wire.rounds
        ),
    )


_CAPABILITY_FIELDS = tuple(
    name
    for name in Capabilities.__dataclass_fields__
    if name not in ("acceptance_rules", "features")
)


def capabilities_to_wire(capabilities: Capabilities) -> router_pb2.GetCapabilitiesResponse:
    """Message of a cluster's capabilities."""
    return router_pb2.GetCapabilitiesResponse(
        **{name: getattr(capabilities, name) for name in _CAPABILITY_FIELDS},
        acceptance_rules=capabilities.acceptance_rules,
        features=capabilities.features,
    )


def capabilities_from_wire(wire: router_pb2.GetCapabilitiesResponse) -> Capabilities:
    """Capabilities of a message."""
    return Capabilities(
        **{name: getattr(wire, name) for name in _CAPABILITY_FIELDS},
        acceptance_rules=tuple(wire.acceptance_rules),
        features=tuple(wire.features),
    )
