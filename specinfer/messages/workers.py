"""What routers and workers tell each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from specinfer.errors import InvalidRequest
from specinfer.tree import TokenTree

GRAMMAR_KINDS = ("json_object", "json_schema", "regex", "choice", "lark")


@dataclass(frozen=True)
class TokenLogprob:
    """The target's log probability of one token, before temperature and cuts.

    Attributes:
        token_id: the token.
        logprob: natural logarithm of its probability.
        top: the most probable tokens with their logprobs, best first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Grammar:
    """What a completion has to match; the noise is drawn among the tokens it allows.

    Attributes:
        kind: one of GRAMMAR_KINDS.
        text: a JSON schema, a regular expression, a JSON list of strings or a grammar in Lark's
            notation; "" for "json_object".
    """

    kind: str
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind not in GRAMMAR_KINDS:
            raise InvalidRequest(
                f"a grammar is one of {', '.join(GRAMMAR_KINDS)}, got {self.kind!r}",
                field="grammar",
            )


@dataclass(frozen=True)
class ShapeQuery:
    """Which tree a drafter is asked to grow.

    Attributes:
        max_nodes: most nodes below the root; 0 asks for the root alone.
        max_depth: deepest level below the root.
        widths: children for each node of a level, SpecInfer's <k1,...,km>; empty grows best-first.
        branch: children looked at for each node when growing best-first.
    """

    max_nodes: int = 8
    max_depth: int = 8
    widths: tuple[int, ...] = ()
    branch: int = 4


class VerifyResult(NamedTuple):
    """What one verify step confirmed.

    Attributes:
        epoch: epoch of the session after the step.
        accepted: accepted nodes below the root, in order.
        token_ids: tokens of the accepted nodes and then the tail; of several plain passes the tail
            of each. Never empty.
        logprobs: one entry a token when logprobs were asked for, else empty.
        num_cached_tokens: tokens of the session's prompt found in the prefix cache (first step).
        num_rows: rows that shared the pass.
        queue_seconds: from the item's arrival to the start of its last pass.
        compute_seconds: time in passes that carried the session.
    """

    epoch: int
    accepted: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    num_cached_tokens: int = 0
    num_rows: int = 0
    queue_seconds: float = 0.0
    compute_seconds: float = 0.0


class DraftResult(NamedTuple):
    """What one propose step guessed.

    Attributes:
        epoch: epoch of the session that the tree was grown for.
        tree: the guesses below the session's root.
        queue_seconds: from the item's arrival to the start of its first pass.
        compute_seconds: time in passes that carried the session.
    """

    epoch: int
    tree: TokenTree
    queue_seconds: float = 0.0
    compute_seconds: float = 0.0


@dataclass(frozen=True)
class StepCost:
    """Measured time of one forward pass.

    Attributes:
        num_rows: rows in the pass.
        context_len: committed keys each row saw.
        seconds: median wall time.
    """

    num_rows: int
    context_len: int
    seconds: float


@dataclass(frozen=True)
class WorkerInfo:
    """What a draft or verify worker is and how much it takes.

    Attributes:
        worker_id: unique name of the process.
        model_name: name the model is served under.
        model_hash: SHA-256 over the checkpoint's configuration and weights.
        tokenizer_hash: SHA-256 over the tokenizer file.
        vocab_size: tokens the model knows.
        dtype: weights' number format, such as "bfloat16".
        device: "cpu" or "cuda".
        max_model_len: longest session in tokens.
        max_sessions: most sessions open at once.
        max_tree_nodes: largest tree taken or grown, root included.
        num_blocks: KV blocks in the pool.
        block_size: tokens in one block.
        row_invariant: whether a row's bits never depend on the rows that share its pass.
        acceptance_rules: rules this worker walks by; empty for a drafter.
        step_costs: measured at start.
        version: specinfer's version.
        kv_dtype: keys' and values' number format, such as "float8_e4m3fn"; "" when not told.
        costs_measured_at: when the step costs were, in seconds since 1970 by the worker's clock; 0
            when not told.
    """

    worker_id: str
    model_name: str
    model_hash: str
    tokenizer_hash: str
    vocab_size: int
    dtype: str
    device: str
    max_model_len: int
    max_sessions: int
    max_tree_nodes: int
    num_blocks: int
    block_size: int
    row_invariant: bool
    acceptance_rules: tuple[str, ...] = ()
    step_costs: tuple[StepCost, ...] = ()
    version: str = ""
    kv_dtype: str = ""
    costs_measured_at: float = 0.0


@dataclass(frozen=True)
class WorkerLoad:
    """How busy a worker is, told with every frame.

    Attributes:
        num_sessions: sessions open.
        num_waiting: items queued and not yet in a pass.
        num_free_blocks: KV blocks neither used nor holding a cached prefix in use.
        draining: whether the worker takes no new session.
    """

    num_sessions: int = 0
    num_waiting: int = 0
    num_free_blocks: int = 0
    draining: bool = False


@dataclass(frozen=True)
class WorkerStatus:
    """What a router knows of one worker and thinks of it.

    Attributes:
        tier: "draft" or "verify".
        worker_id: unique name of the process, or "" before it has said so.
        address: host and port that the router reaches it at.
        source: "static" for an address that the router was given, "registry" for one it found.
        connected: whether items can be sent.
        ready: whether new sessions may be brought there.
        trusted: whether it did what was asked of it lately.
        refusal: why it may not serve here, or "".
        info: what it said it is, or None before the first connection.
        load: what it said last.
        num_seats: sessions of this router that use it.
        breaker: state of its circuit breaker, or "" where there is none.
    """

    tier: str
    worker_id: str
    address: str
    source: str
    connected: bool = False
    ready: bool = False
    trusted: bool = True
    refusal: str = ""
    info: WorkerInfo | None = None
    load: WorkerLoad = field(default_factory=WorkerLoad)
    num_seats: int = 0
    breaker: str = ""
