"""Lossless speculative decoding, served as a gRPC cluster: the client SDK and what all tiers share.

    from specinfer import Client

    with Client("127.0.0.1:50051") as client:
        for event in client.stream(messages=[{"role": "user", "content": "Hello"}]):
            print(event.text, end="")

The names below are the public ones. Nothing here knows torch.
"""

from specinfer.client import AsyncClient, AsyncCompletionStream
from specinfer.completion import Completion
from specinfer.errors import (
    Cancelled,
    ClientClosed,
    DeadlineExceeded,
    InternalError,
    InvalidCheckpoint,
    InvalidRequest,
    InvalidTree,
    Mismatch,
    NotFound,
    ResourceExhausted,
    SpecinferError,
    StaleEpoch,
    Unavailable,
)
from specinfer.messages import (
    Capabilities,
    ChatMessage,
    RoundFacts,
    SpeculationOptions,
    SpeculationSummary,
    Started,
    TokenLogprob,
    TokensEvent,
    Usage,
)
from specinfer.options import GenerateOptions
from specinfer.retry import RetryPolicy
from specinfer.rpc import TlsSettings
from specinfer.sampling import SamplingParams, StopConditions
from specinfer.sync_client import Client, CompletionStream
from specinfer.tree import TokenTree

__version__ = "0.1.0"

__all__ = [
    "AsyncClient",
    "AsyncCompletionStream",
    "Cancelled",
    "Capabilities",
    "ChatMessage",
    "Client",
    "ClientClosed",
    "Completion",
    "CompletionStream",
    "DeadlineExceeded",
    "GenerateOptions",
    "InternalError",
    "InvalidCheckpoint",
    "InvalidRequest",
    "InvalidTree",
    "Mismatch",
    "NotFound",
    "ResourceExhausted",
    "RetryPolicy",
    "RoundFacts",
    "SamplingParams",
    "SpecinferError",
    "SpeculationOptions",
    "SpeculationSummary",
    "StaleEpoch",
    "Started",
    "StopConditions",
    "TlsSettings",
    "TokenLogprob",
    "TokenTree",
    "TokensEvent",
    "Unavailable",
    "Usage",
    "__version__",
]
