"""What the tiers tell each other, as plain frozen data.

`convert` puts these on the wire and takes them off it again; nothing else sees both forms. This
module knows nothing of protobuf, gRPC or tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from specinfer.errors import InvalidRequest
from specinfer.sampling import SamplingParams, StopConditions
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
class ToolCall:
    """One call of a tool; `arguments` is JSON."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class ChatMessage:
    """One turn of a conversation, such as ("user", "What does textwrap.dedent do?").

    Attributes:
        role: who speaks: "system", "user", "assistant" or "tool".
        content: what is said.
        name: of the speaker, or of the tool that answers, or "".
        tool_call_id: call that a tool's answer belongs to, or "".
        tool_calls: calls that the assistant made.
    """

    role: str
    content: str
    name: str = ""
    tool_call_id: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


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
        tools: tools that the chat template tells the model of, one JSON object each.
        grammar: what the completion has to match, or None.
        prediction: text that the completion is expected to be like, or ""; it is guessed from.
        affinity_key: requests with the same key go to the same verify worker where its load
            allows; "" goes to the least loaded.
        priority: among requests that wait, higher ones start first.
        detail: send each round's tree with its texts along.
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
    tools: tuple[str, ...] = ()
    grammar: Grammar | None = None
    prediction: str = ""
    affinity_key: str = ""
    priority: int = 0
    detail: bool = False


@dataclass(frozen=True)
class ResumeRequest:
    """Asks for the rest of a stream that broke.

    Attributes:
        session_id: from the stream's Started event.
        offset: tokens of the completion that the caller has.
        request_id: the caller's id; "" keeps that of the request.
    """

    session_id: str
    offset: int = 0
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
        commit_seconds: the store's part of `router_seconds`.
        draft_depth: depth of the tree.
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
    commit_seconds: float = 0.0
    draft_depth: int = 0


@dataclass(frozen=True)
class RoundDetail:
    """The tree of one round with its texts.

    Attributes:
        tree: a root and what was guessed below it.
        accepted: nodes below the root that the target confirmed, in order.
        node_texts: text of each node's token, the root's first.
        token_texts: text of each token that the round brought.
    """

    tree: TokenTree
    accepted: tuple[int, ...]
    node_texts: tuple[str, ...]
    token_texts: tuple[str, ...]


@dataclass(frozen=True)
class Timings:
    """Where the time of a request went, in seconds.

    Attributes:
        queue_seconds: waiting for admission.
        prepare_seconds: from admission to the first round: template, tokenizer and store.
        first_token_seconds: from arrival to the first tokens.
        total_seconds: from arrival to the end.
    """

    queue_seconds: float = 0.0
    prepare_seconds: float = 0.0
    first_token_seconds: float = 0.0
    total_seconds: float = 0.0


@dataclass(frozen=True)
class RoundReport:
    """One round of a request, for `explain`.

    Attributes:
        offset: index of the round's first token in the completion.
        num_tokens: tokens that the round brought.
        start_seconds: from the request's arrival to the start of the round.
        seconds: what the round took.
        facts: what it did.
    """

    offset: int
    num_tokens: int
    start_seconds: float
    seconds: float
    facts: RoundFacts


@dataclass(frozen=True)
class RequestReport:
    """Where the time of a request went, round by round.

    Attributes:
        request_id: id of the request.
        session_id: id of its session.
        outcome: "running", or how the request ended.
        arrived_at: when the request came, in seconds since 1970.
        num_prompt_tokens: tokens of the prompt.
        num_cached_tokens: prompt tokens found in the prefix cache.
        timings: where the time went, rounds apart.
        rounds: in order; a long request keeps its last ones.
    """

    request_id: str
    session_id: str
    outcome: str
    arrived_at: float
    num_prompt_tokens: int
    num_cached_tokens: int
    timings: Timings
    rounds: tuple[RoundReport, ...]


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
        detail: the round's tree, when asked for.
    """

    offset: int
    text: str
    token_ids: tuple[int, ...]
    num_accepted_tokens: int
    logprobs: tuple[TokenLogprob, ...]
    round: RoundFacts
    detail: RoundDetail | None = None


@dataclass(frozen=True)
class Finished:
    """Last event of a stream.

    Attributes:
        reason: "stop", "length" or "cancelled".
        stop_match: the stop string or token that ended it, or "".
        usage: token counts.
        speculation: summary over all rounds; a resumed stream counts those since it was resumed.
        timings: where the time went.
    """

    reason: str
    stop_match: str
    usage: Usage
    speculation: SpeculationSummary
    timings: Timings = field(default_factory=Timings)


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
        features: what else requests may ask for, such as "grammar", "tools" or "prediction".
        plain_round_seconds: measured time of a round without guesses, which is what plain decoding
            takes for one token; 0 before it was measured.
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
    features: tuple[str, ...] = ()
    plain_round_seconds: float = 0.0
