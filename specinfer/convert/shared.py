"""Trees, sampling, logprobs and statuses on the wire: what messages of every tier hold."""

from __future__ import annotations

from typing import Literal, get_args

from specinfer.errors import SpecinferError, error_class
from specinfer.messages import Grammar, TokenLogprob
from specinfer.sampling import SamplingParams
from specinfer.tree import MAX_TREE_NODES, TokenTree
from specinfer.v1 import tree_pb2


def tree_to_wire(tree: TokenTree) -> tree_pb2.TokenTree:
    """Message of a tree."""
    wire = tree_pb2.TokenTree()
    fill_tree(wire, tree)
    return wire


def fill_tree(wire: tree_pb2.TokenTree, tree: TokenTree) -> None:
    """Write a tree into an empty message."""
    wire.token_ids.extend(tree.token_ids)
    wire.parents.extend(tree.parents)
    if tree.drafter_ids:
        wire.drafter_ids.extend(tree.drafter_ids)
    if tree.scores:
        wire.scores.extend(tree.scores)


def tree_from_wire(wire: tree_pb2.TokenTree) -> TokenTree:
    """Tree of a message; raises InvalidTree. The size is checked before anything is copied."""
    token_ids = wire.token_ids
    if len(token_ids) > MAX_TREE_NODES:
        raise error_class("INVALID_TREE")(
            f"a tree has at most {MAX_TREE_NODES} nodes, got {len(token_ids)}"
        )
    # Reading out an empty field costs as much as a full one, and one by one twice a slice's time.
    return TokenTree(
        tuple(token_ids[:]),
        tuple(wire.parents[:]),
        tuple(wire.drafter_ids) if wire.drafter_ids else (),
        tuple(wire.scores) if wire.scores else (),
    )


def sampling_to_wire(
    sampling: SamplingParams, *, with_seed: bool = True
) -> tree_pb2.SamplingParams:
    """Message of sampling parameters; without its seed the router chooses one."""
    wire = tree_pb2.SamplingParams(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias),
    )
    if with_seed:
        wire.seed = sampling.seed
    return wire


_SamplingField = Literal[
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
]


_SAMPLING_FIELDS: tuple[_SamplingField, ...] = get_args(_SamplingField)


def sampling_from_wire(wire: tree_pb2.SamplingParams) -> SamplingParams:
    """Parameters of a message, absent fields at their defaults; raises InvalidRequest."""
    given = {name: getattr(wire, name) for name in _SAMPLING_FIELDS if wire.HasField(name)}
    return SamplingParams(**given, logit_bias=dict(wire.logit_bias))


def grammar_to_wire(grammar: Grammar | None) -> tree_pb2.Grammar | None:
    """Message of a grammar; None stays None."""
    if grammar is None:
        return None
    kind = tree_pb2.GrammarKind.Value(f"GRAMMAR_KIND_{grammar.kind.upper()}")
    return tree_pb2.Grammar(kind=kind, text=grammar.text)


def grammar_from_wire(wire: tree_pb2.Grammar) -> Grammar:
    """Grammar of a message; raises InvalidRequest for a kind that this version does not know."""
    names = {number: name for name, number in tree_pb2.GrammarKind.items()}
    name = names.get(wire.kind, "").removeprefix("GRAMMAR_KIND_").lower()
    return Grammar(name, wire.text)


def status_to_wire(error: SpecinferError) -> tree_pb2.ItemStatus:
    """Status of an item that failed."""
    return tree_pb2.ItemStatus(
        code=error.code,
        reason=error.reason,
        message=error.message,
        field=error.field,
        retry_after=error.retry_after,
    )


def status_error(wire: tree_pb2.ItemStatus) -> SpecinferError | None:
    """The error that a status stands for; None for success."""
    if not wire.code:
        return None
    retry_after = wire.retry_after if wire.HasField("retry_after") else None
    return error_class(wire.reason, wire.code)(
        wire.message, field=wire.field, retry_after=retry_after
    )


def logprob_to_wire(logprob: TokenLogprob) -> tree_pb2.TokenLogprob:
    """Message of one token's logprob."""
    return tree_pb2.TokenLogprob(
        token_id=logprob.token_id,
        logprob=logprob.logprob,
        top=[tree_pb2.RankedToken(token_id=token, logprob=value) for token, value in logprob.top],
    )


def logprob_from_wire(wire: tree_pb2.TokenLogprob) -> TokenLogprob:
    """Logprob of a message."""
    return TokenLogprob(
        wire.token_id, wire.logprob, tuple((ranked.token_id, ranked.logprob) for ranked in wire.top)
    )
