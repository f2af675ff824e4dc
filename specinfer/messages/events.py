"""What routers tell users."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from specinfer.messages.workers import TokenLogprob
from specinfer.tree import TokenTree


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


class RoundFacts(NamedTuple):
    """What one round did and where its time went, in seconds; `_asdict` makes a dict of it.

    Attributes:
        epoch: epoch of the session after the round.
        num_draft_tokens: guessed tokens.
        num_accepted_tokens: guessed tokens confirmed.
        root_only_reason: why nothing was guessed, or "".
        draft_seconds: drafter's compute, as far as the round waited for it: what passed beside the
            last round's commit is not counted.
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


@dataclass(frozen=True, slots=True)
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
        model_hash: checkpoint that decides the tokens; the same one repeats them.
    """

    request_id: str
    session_id: str
    model: str
    seed: int
    num_prompt_tokens: int
    model_hash: str = ""


class TokensEvent(NamedTuple):
    """Tokens that one round committed; `_replace` makes another one of it.

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
        plain_round_seconds: measured time of a token where no round has guesses, or of a step of
            one row until there was any; 0 before either is known.
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


GenerateEvent = Started | TokensEvent | Finished
