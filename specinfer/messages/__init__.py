"""What the tiers tell each other, as plain frozen data.

`convert` puts these on the wire and takes them off it again; nothing else sees both forms. They
know nothing of protobuf, gRPC or tensors.
"""

from specinfer.messages.events import (
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
from specinfer.messages.requests import (
    ChatMessage,
    GenerateRequest,
    ResumeRequest,
    SpeculationOptions,
    ToolCall,
)
from specinfer.messages.workers import (
    GRAMMAR_KINDS,
    DraftResult,
    Grammar,
    ShapeQuery,
    StepCost,
    TokenLogprob,
    VerifyResult,
    WorkerInfo,
    WorkerLoad,
    WorkerStatus,
)

__all__ = [
    "GRAMMAR_KINDS",
    "Capabilities",
    "ChatMessage",
    "DraftResult",
    "Finished",
    "GenerateEvent",
    "GenerateRequest",
    "Grammar",
    "RequestReport",
    "ResumeRequest",
    "RoundDetail",
    "RoundFacts",
    "RoundReport",
    "ShapeQuery",
    "SpeculationOptions",
    "SpeculationSummary",
    "Started",
    "StepCost",
    "Timings",
    "TokenLogprob",
    "TokensEvent",
    "ToolCall",
    "Usage",
    "VerifyResult",
    "WorkerInfo",
    "WorkerLoad",
    "WorkerStatus",
]
