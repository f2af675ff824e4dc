"""What the tiers tell each other, as plain frozen data.

`convert` puts these on the wire and takes them off it again; nothing else sees both forms. This
module knows nothing of protobuf, gRPC or tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from specinfer.sampling import SamplingParams, StopConditions
from specinfer.tree import TokenTree


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


@dataclass(frozen=True)
class VerifyResult:
    """What one verify step confirmed.

    Attributes:
        epoch: epoch of the session after the step.
        accepted: accepted nodes below the root, in order.
        token_ids: tokens of the accepted nodes and then the tail; never empty.
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


@dataclass(frozen=True)
class DraftResult:
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
class SpeculationOptions:
    """How one request wants to be speculated on; none of it changes a token.

    Attributes:
        enabled: False decodes one token a round.
        max_nodes: most guessed tokens a round; None leaves it to the cluster.
        max_depth: deepest guess; None leaves it to the cluster.
        widths: SpecInfer's <k1,...,km>; empty leaves the shape to the cluster.
    """

    enabled: bool = True
    max_nodes: int | None = None
    max_depth: int | None = None
    widths: tuple[int, ...] = ()


@dataclass(frozen=True)
class ChatMessage:
    """One turn of a conversation, such as ("user", "What does textwrap.dedent do?")."""

    role: str
    content: str


@dataclass(frozen=True)
class GenerateRequest:
    """One user call, in exactly one of three input forms.

    Attributes:
        prompt: text to continue, or None.
        token_ids: tokens to continue, or None.
        messages: a conversation that the model's chat template turns into a prompt, or None.
        model: served name; "" takes the cluster's model.
        sampling: how tokens are drawn; `seed` is ignored when `random_seed` is set.
        random_seed: let the router choose a seed; it comes back in Started.
        stop: when the stream ends.
        num_logprobs: most probable tokens to report with each token; None reports no logprobs.
        speculation: how to speculate.
        request_id: the caller's id; "" lets the router choose.
    """

    prompt: str | None = None
    token_ids: tuple[int, ...] | None = None
    messages: tuple[ChatMessage, ...] | None = None
    model: str = ""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    random_seed: bool = False
    stop: StopConditions = field(default_factory=StopConditions)
    num_logprobs: int | None = None
    speculation: SpeculationOptions = field(default_factory=SpeculationOptions)
    request_id: str = ""


@dataclass(frozen=True)
class Usage:
    """Tokens of one request.

    Attributes:
        num_prompt_tokens: tokens of the prompt.
        num_completion_tokens: tokens generated and kept.
        num_cached_tokens: prompt tokens whose keys and values were found in the prefix cache.
    """

    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    num_cached_tokens: int = 0


@dataclass(frozen=True)
class SpeculationSummary:
    """How a request was speculated on; the names are vLLM's.

    Attributes:
        num_rounds: rounds run, speculated or not.
        num_drafts: rounds with at least one guessed token.
        num_draft_tokens: guessed tokens.
        num_accepted_tokens: guessed tokens that the target confirmed.
        num_accepted_tokens_per_pos: confirmed tokens by depth, depth 1 first.
        root_only_reasons: rounds without a guess, by reason.
    """

    num_rounds: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_tokens_per_pos: tuple[int, ...] = ()
    root_only_reasons: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class RoundFacts:
    """What one round did and where its time went, in seconds.

    Attributes:
        epoch: epoch of the session after the round.
        num_draft_tokens: guessed tokens.
        num_accepted_tokens: guessed tokens confirmed.
        root_only_reason: why nothing was guessed, or "".
        draft_seconds: drafter's compute.
        verify_seconds: verifier's compute.
        queue_seconds: waiting inside both workers.
        network_seconds: round trips less what the workers account for.
        router_seconds: the rest: commit, text and bookkeeping.
    """

    epoch: int
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    root_only_reason: str = ""
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    queue_seconds: float = 0.0
    network_seconds: float = 0.0
    router_seconds: float = 0.0


@dataclass(frozen=True)
class Started:
    """First event of a stream.

    Attributes:
        request_id: id of the request, in every log line and error.
        session_id: id of the session in the store.
        model: served model name.
        seed: the seed in use; sending it again repeats the tokens.
        num_prompt_tokens: tokens of the prompt.
    """

    request_id: str
    session_id: str
    model: str
    seed: int
    num_prompt_tokens: int


@dataclass(frozen=True)
class TokensEvent:
    """Tokens that one round committed.

    Attributes:
        offset: index of the first of these tokens in the completion.
        text: text that became certain; may be empty while a character is incomplete or a stop
            string may be forming.
        token_ids: the tokens, accepted ones first, the target's own last.
        num_accepted_tokens: how many of `token_ids` were guessed and confirmed.
        logprobs: one entry a token when asked for.
        round: facts of the round.
    """

    offset: int
    text: str
    token_ids: tuple[int, ...]
    num_accepted_tokens: int
    logprobs: tuple[TokenLogprob, ...]
    round: RoundFacts


@dataclass(frozen=True)
class Finished:
    """Last event of a stream.

    Attributes:
        reason: "stop", "length" or "cancelled".
        stop_match: the stop string or token that ended it, or "".
        usage: token counts.
        speculation: summary over all rounds.
    """

    reason: str
    stop_match: str
    usage: Usage
    speculation: SpeculationSummary


GenerateEvent = Started | TokensEvent | Finished


@dataclass(frozen=True)
class Capabilities:
    """What a cluster accepts.

    Attributes:
        model: served name.
        model_hash: of the target checkpoint.
        tokenizer_hash: of the shared tokenizer.
        vocab_size: tokens the target knows.
        dtype: the target's number format.
        max_model_len: longest prompt plus completion, in tokens.
        max_tree_nodes: largest tree, root included.
        row_invariant: whether outputs are equal to the bit whatever shares a pass.
        acceptance_rules: rules the verifiers walk by.
        lossless: whether every rule offered is lossless.
        num_drafters: draft workers ready now.
        num_verifiers: verify workers ready now.
        chat: whether the model brings a chat template.
        version: the router's version.
    """

    model: str
    model_hash: str
    tokenizer_hash: str
    vocab_size: int
    dtype: str
    max_model_len: int
    max_tree_nodes: int
    row_invariant: bool
    acceptance_rules: tuple[str, ...]
    lossless: bool
    num_drafters: int
    num_verifiers: int
    chat: bool
    version: str
