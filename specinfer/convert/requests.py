"""What users ask of routers, on the wire."""

from __future__ import annotations

from specinfer.convert.shared import (
    grammar_from_wire,
    grammar_to_wire,
    sampling_from_wire,
    sampling_to_wire,
)
from specinfer.errors import InvalidRequest
from specinfer.messages import (
    ChatMessage,
    GenerateRequest,
    ResumeRequest,
    SpeculationOptions,
    ToolCall,
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
        grammar=grammar_to_wire(request.grammar),
        prediction=request.prediction,
        affinity_key=request.affinity_key,
        priority=request.priority,
        detail=request.detail,
    )
    if request.prompt is not None:
        wire.prompt = request.prompt
    elif request.token_ids is not None:
        wire.token_ids.token_ids.extend(request.token_ids)
        wire.token_ids.SetInParent()
    elif request.messages is not None:
        wire.conversation.CopyFrom(_conversation_to_wire(request.messages, request.tools))
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
        tools=tuple(wire.conversation.tools),
        grammar=grammar_from_wire(wire.grammar) if wire.HasField("grammar") else None,
        prediction=wire.prediction,
        affinity_key=wire.affinity_key,
        priority=wire.priority,
        detail=wire.detail,
    )


def resume_to_wire(request: ResumeRequest) -> router_pb2.ResumeRequest:
    """Message of a call for the rest of a stream."""
    return router_pb2.ResumeRequest(
        session_id=request.session_id, offset=request.offset, request_id=request.request_id
    )


def resume_from_wire(wire: router_pb2.ResumeRequest) -> ResumeRequest:
    """Call for the rest of a stream."""
    return ResumeRequest(wire.session_id, wire.offset, wire.request_id)


def _conversation_to_wire(
    messages: tuple[ChatMessage, ...], tools: tuple[str, ...]
) -> router_pb2.Conversation:
    return router_pb2.Conversation(
        messages=[
            router_pb2.ChatMessage(
                role=message.role,
                content=message.content,
                name=message.name,
                tool_call_id=message.tool_call_id,
                tool_calls=[
                    router_pb2.ToolCall(id=call.id, name=call.name, arguments=call.arguments)
                    for call in message.tool_calls
                ],
            )
            for message in messages
        ],
        tools=tools,
    )


def _messages_from_wire(wire: router_pb2.Conversation) -> tuple[ChatMessage, ...]:
    return tuple(
        ChatMessage(
            role=message.role,
            content=message.content,
            name=message.name,
            tool_call_id=message.tool_call_id,
            tool_calls=tuple(
                ToolCall(call.id, call.name, call.arguments) for call in message.tool_calls
            ),
        )
        for message in wire.messages
    )


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
