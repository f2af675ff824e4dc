"""Lossless speculative decoding, served as a gRPC cluster: the client SDK and what all tiers share.

    from specinfer import Client

    with Client("127.0.0.1:50051") as client:
        for event in client.stream(messages=[{"role": "user", "content": "Hello"}]):
            print(event.text, end="")

The names below are the public ones. Nothing here knows torch.
"""

from specinfer.chat import ChatReply, Conversation
from specinfer.client import AsyncClient
from specinfer.completion import Completion
from specinfer.errors import (
    Cancelled,
    ClientClosed,
    DeadlineExceeded,
    InternalError,
    InvalidCheckpoint,
    InvalidRequest,
    InvalidTree,
    LeaseLost,
    Mismatch,
    NotFound,
    PermissionDenied,
    ReaderStalled,
    ResourceExhausted,
    RouterLeaving,
    SpecinferError,
    StaleEpoch,
    Unauthenticated,
    Unavailable,
)
from specinfer.messages import (
    Capabilities,
    ChatMessage,
    Grammar,
    RequestReport,
    RoundDetail,
    RoundFacts,
    RoundReport,
    SpeculationOptions,
    SpeculationSummary,
    Started,
    Timings,
    TokenLogprob,
    TokensEvent,
    ToolCall,
    Usage,
)
from specinfer.options import ChatOptions, GenerateOptions, ResumeOptions
from specinfer.retry import RetryPolicy
from specinfer.rpc import TlsSettings
from specinfer.sampling import SamplingParams, StopConditions
from specinfer.stream import AsyncCompletionStream, ResumeToken
from specinfer.sync_client import Client, CompletionStream
from specinfer.tree import TokenTree

__version__ = "0.1.0"

__all__ = [
    "AsyncClient",
    "AsyncCompletionStream",
    "Cancelled",
    "Capabilities",
    "ChatMessage",
    "ChatOptions",
    "ChatReply",
    "Client",
    "ClientClosed",
    "Completion",
    "CompletionStream",
    "Conversation",
    "DeadlineExceeded",
    "GenerateOptions",
    "Grammar",
    "InternalError",
    "InvalidCheckpoint",
    "InvalidRequest",
    "InvalidTree",
    "LeaseLost",
    "Mismatch",
    "NotFound",
    "PermissionDenied",
    "ReaderStalled",
    "RequestReport",
    "ResourceExhausted",
    "ResumeOptions",
    "ResumeToken",
    "RetryPolicy",
    "RoundDetail",
    "RoundFacts",
    "RoundReport",
    "RouterLeaving",
    "SamplingParams",
    "SpecinferError",
    "SpeculationOptions",
    "SpeculationSummary",
    "StaleEpoch",
    "Started",
    "StopConditions",
    "Timings",
    "TlsSettings",
    "TokenLogprob",
    "TokenTree",
    "TokensEvent",
    "ToolCall",
    "Unauthenticated",
    "Unavailable",
    "Usage",
    "__version__",
]
