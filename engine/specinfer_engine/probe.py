"""Checks at load: whether our passes say what the stock model says, and to the bit by row.

A model is run on a handful of tokens in three ways: by `transformers` alone, in chunks and trees
on scattered pages, and token by token. What an architecture does behind our back (a state outside
the pool, positions counted by index, a bias on the scores) shows in the first comparison; a row
that depends on its neighbours shows in the second. Where attention takes a long context in splits,
rows behind several of them are compared as well. Knows no architecture by name.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specinfer.errors import InvalidCheckpoint
from specinfer.tree import TokenTree
from specinfer_engine.attention import IMPLEMENTATION, PASS_ARGUMENT, AttentionCall, DryPass
from specinfer_engine.batch import SequenceRows
from specinfer_engine.model import LoadedModel
from specinfer_engine.runner import Runner
from specinfer_kernels import split_length

_NUM_TOKENS = 12
_NUM_PREFILLED = 7
_BLOCK_SIZE = 4
# Sequences of a pass: so many that a GPU takes the splits of each in turn and not side by side.
_CROWD = 256
# Root mean square of the difference, in units of the logits' own spread. Stock attention rounds
# its scores to the weights' format and takes softmax in float32, ours does not.
_TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-3, torch.bfloat16: 0.2}


def probe_tokens(vocab_size: int, max_model_len: int) -> tuple[int, ...]:
    """Tokens spread over the vocabulary, the same for every call."""
    return _tokens(vocab_size, min(_NUM_TOKENS, max_model_len))


def _tokens(vocab_size: int, count: int) -> tuple[int, ...]:
    return tuple((7919 * index + 31) % vocab_size for index in range(1, count + 1))


@torch.inference_mode()
def stock_logits(model: PreTrainedModel, token_ids: tuple[int, ...]) -> Tensor:
    """Logits of `transformers`' own eager pass over one sequence, [num_tokens, vocab_size].

    Raises:
        InvalidCheckpoint: when they are not finite.
    """
    model.set_attn_implementation("eager")
    output = model(input_ids=torch.tensor([token_ids], device=model.device), use_cache=False)
    logits: Tensor = output.logits[0].double()
    if not bool(torch.isfinite(logits).all()):
        raise InvalidCheckpoint("the model's logits are not finite; are the weights whole?")
    return logits


@torch.inference_mode()
def attention_calls(model: PreTrainedModel, num_layers: int) -> tuple[AttentionCall, ...]:
    """What each layer's attention asks for, by layer; the model is left on our attention.

    Raises:
        InvalidCheckpoint: when a layer asks for what is not served or bypasses the interface.
    """
    try:
        model.set_attn_implementation(IMPLEMENTATION)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise InvalidCheckpoint(f"its attention cannot be replaced: {error}") from error
    dry = DryPass()
    model(
        input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device),
        position_ids=torch.arange(2, device=model.device)[None],
        use_cache=False,
        **{PASS_ARGUMENT: dry},
    )
    calls = tuple(sorted(dry.calls, key=lambda call: call.layer_index))
    if [call.layer_index for call in calls] != list(range(num_layers)):
        raise InvalidCheckpoint(
            f"{len(calls)} of {num_layers} layers go through the attention interface; "
            "state-space, linear and shared attention layers are not served"
        )
    shapes = {(call.num_heads, call.num_kv_heads, call.head_dim) for call in calls}
    if len(shapes) != 1:
        raise InvalidCheckpoint(f"layers differ in (heads, kv heads, head size): {sorted(shapes)}")
    return calls


def check_logits(loaded: LoadedModel, token_ids: tuple[int, ...], expected: Tensor) -> None:
    """Compare a chunk and a tree on scattered pages with the stock logits of the same tokens.

    Raises:
        InvalidCheckpoint: when they differ by more than rounding.
    """
    runner = _runner(loaded)
    prefilled = min(_NUM_PREFILLED, len(token_ids) - 1)
    ours = torch.cat(_chunk_and_tree(runner, token_ids, prefilled)).double()
    spread = expected.std()
    error = float((ours - expected).square().mean().sqrt() / spread.clamp_min(1e-12))
    if not error <= _TOLERANCES[loaded.dtype]:
        raise InvalidCheckpoint(
            f"{type(loaded.model).__name__} gives other logits on pages than in `transformers` "
            f"(difference {error:.2g} of their spread); this architecture is not served"
        )


def rows_are_invariant(loaded: LoadedModel, token_ids: tuple[int, ...]) -> bool:
    """Whether token by token gives the bits of a chunk and a tree, behind a long context too."""
    split = split_length(loaded.device, loaded.dtype, loaded.head_dim)
    short = _short_rows_are_invariant(loaded, token_ids)
    return short and (split is None or _long_rows_are_invariant(loaded, split))


def _short_rows_are_invariant(loaded: LoadedModel, token_ids: tuple[int, ...]) -> bool:
    runner = _runner(loaded)
    prefilled = min(_NUM_PREFILLED, len(token_ids) - 1)
    together = torch.cat(_chunk_and_tree(runner, token_ids, prefilled))
    table = _table(1, len(token_ids))
    alone = torch.cat(
        [
            runner.forward([SequenceRows.chain((token,), index, table, (0,))])[0]
            for index, token in enumerate(token_ids)
        ]
    )
    return torch.equal(together, alone)


def _long_rows_are_invariant(loaded: LoadedModel, split: int) -> bool:
    """Whether the rows behind two and a half splits have the same bits in a tree as alone.

    For the tree the context is read in wide chunks; then in narrow ones to the same blocks in
    another order, and the first row behind it comes in a crowd of equal ones.
    """
    room = min(5 * split // 2, loaded.max_model_len - _NUM_TOKENS)
    context_len = room // _BLOCK_SIZE * _BLOCK_SIZE
    if context_len <= split:
        return True
    tokens = _tokens(loaded.vocab_size, context_len + _NUM_TOKENS)
    tail = tokens[context_len:]
    num_blocks, num_own = context_len // _BLOCK_SIZE, 2 * _NUM_TOKENS // _BLOCK_SIZE
    runner = Runner(loaded, num_blocks=num_blocks + num_own + _CROWD, block_size=_BLOCK_SIZE)
    shared, own = tuple(range(num_blocks)), tuple(range(num_blocks, num_blocks + num_own))
    _prefill(runner, tokens[:context_len], shared, split // 2)
    tree, path = _path_with_decoys(tail, loaded.vocab_size)
    rows = SequenceRows.tree(tree, context_len, shared + own, path)
    together = runner.forward([rows])[0]
    shared = tuple(reversed(shared))
    _prefill(runner, tokens[:context_len], shared, split // 5)
    place = _CROWD // 3
    ends: list[tuple[int, ...]] = [(num_blocks + num_own + index,) for index in range(_CROWD)]
    ends[place] = own
    crowd = [SequenceRows.chain(tail[:1], context_len, shared + end, (0,)) for end in ends]
    alone = [runner.forward(crowd)[place]]
    for index, token in enumerate(tail[1:], context_len + 1):
        alone += runner.forward([SequenceRows.chain((token,), index, shared + own, (0,))])
    return torch.equal(together, torch.cat(alone))


def _prefill(
    runner: Runner, token_ids: tuple[int, ...], table: tuple[int, ...], chunk: int
) -> None:
    for start in range(0, len(token_ids), chunk):
        part = token_ids[start : start + chunk]
        runner.forward([SequenceRows.chain(part, start, table, (0,))])


def _runner(loaded: LoadedModel) -> Runner:
    blocks = 2 * -(-(2 * _NUM_TOKENS) // _BLOCK_SIZE)
    return Runner(loaded, num_blocks=blocks, block_size=_BLOCK_SIZE)


def _table(which: int, num_slots: int) -> tuple[int, ...]:
    """Every second block, from the back: pages of one sequence do not lie in order."""
    count = -(-num_slots // _BLOCK_SIZE)
    return tuple(2 * index + which for index in reversed(range(count)))


def _chunk_and_tree(runner: Runner, token_ids: tuple[int, ...], prefilled: int) -> list[Tensor]:
    """Logits of all tokens: the first as a chunk, the others as one path of a tree with decoys."""
    table = _table(0, 2 * len(token_ids))
    chunk = SequenceRows.chain(token_ids[:prefilled], 0, table, range(prefilled))
    tree, path = _path_with_decoys(token_ids[prefilled:], runner.loaded.vocab_size)
    first = runner.forward([chunk])
    return first + runner.forward([SequenceRows.tree(tree, prefilled, table, path)])


def _path_with_decoys(token_ids: tuple[int, ...], vocab_size: int) -> tuple[TokenTree, list[int]]:
    """A tree in which each token but the first has a sibling, and the nodes of these tokens."""
    nodes, parents, path = [token_ids[0]], [-1], [0]
    for token in token_ids[1:]:
        parent = path[-1]
        nodes += [(token + 1) % vocab_size, token]
        parents += [parent, parent]
        path.append(len(nodes) - 1)
    return TokenTree(tuple(nodes), tuple(parents)), path
