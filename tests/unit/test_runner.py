"""Tree passes over many sequences, round after round, equal plain passes on every path."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from specinfer.tree import TokenTree
from specinfer_engine.batch import SequenceRows
from specinfer_engine.loader import load_model
from specinfer_engine.model import LoadedModel
from specinfer_engine.runner import Runner
from tests.kit.passes import Pages, prefill, random_tree, slot, stock_model, stock_tree_logits
from tests.kit.tiny_models import write_tiny_llama

VOCAB_SIZE = 300
BLOCK_SIZE = 4
NUM_BLOCKS = 96
NUM_COMMITS = 20
Change = Callable[[SequenceRows], SequenceRows]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with grouped heads."""
    path = tmp_path_factory.mktemp("runner") / "llama"
    return write_tiny_llama(path, vocab_size=VOCAB_SIZE, hidden_size=32)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    """The Llama on pages, in float64."""
    return load_model(folder, dtype="float64")


@pytest.fixture(scope="module")
def stock(folder: Path) -> Any:
    """The Llama as `transformers` runs it."""
    return stock_model(folder, torch.float64)


class Conversation:
    """One sequence of the test: committed tokens and its pages."""

    def __init__(self, seed: int, pages: Pages) -> None:
        self.random = random.Random(seed)
        count = self.random.randrange(3, 20)
        self.token_ids = [self.random.randrange(VOCAB_SIZE) for _ in range(count)]
        self.table = pages.table(80)

    def next_tree(self) -> TokenTree:
        """A tree of one to nine nodes."""
        return random_tree(self.random, self.random.randrange(1, 10), VOCAB_SIZE)

    def commit(self, runner: Runner, tree: TokenTree) -> None:
        """Accept a random path, at most three guesses deep, as a verify walk would."""
        deepest = [node for node in range(len(tree)) if tree.depths[node] <= 3]
        path = tree.path(self.random.choice(deepest))
        base = len(self.token_ids)
        runner.compact(
            [slot(self.table, base + node, BLOCK_SIZE) for node in path],
            [slot(self.table, base + place, BLOCK_SIZE) for place in range(len(path))],
        )
        self.token_ids += [tree.token_ids[node] for node in path]


def largest_difference(
    runner: Runner, stock: Any, talks: list[Conversation], trees: list[TokenTree], change: Change
) -> float:
    """Run all trees in one pass, each changed by `change`, and compare every node with stock."""
    rows = [
        change(SequenceRows.tree(tree, len(talk.token_ids), talk.table))
        for talk, tree in zip(talks, trees, strict=True)
    ]
    worst = 0.0
    for logits, talk, tree in zip(runner.forward(rows), talks, trees, strict=True):
        expected = stock_tree_logits(stock, talk.token_ids, tree)
        worst = max(worst, float((logits - expected).abs().max()))
    return worst


def start(loaded: LoadedModel, num_talks: int = 3) -> tuple[Runner, list[Conversation]]:
    """A runner with prefilled conversations on shuffled pages."""
    runner = Runner(loaded, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    pages = Pages(NUM_BLOCKS, BLOCK_SIZE, seed=5)
    talks = [Conversation(seed, pages) for seed in range(num_talks)]
    for talk in talks:
        prefill(runner, talk.token_ids, talk.table)
    return runner, talks


def test_every_node_equals_a_plain_pass_after_twenty_commits(
    loaded: LoadedModel, stock: Any
) -> None:
    runner, talks = start(loaded)
    for _ in range(NUM_COMMITS):
        trees = [talk.next_tree() for talk in talks]
        assert largest_difference(runner, stock, talks, trees, lambda rows: rows) < 1e-9
        for talk, tree in zip(talks, trees, strict=True):
            talk.commit(runner, tree)


def see_a_sibling(rows: SequenceRows) -> SequenceRows:
    """Let every node see the node before it, an ancestor or not."""
    bits = tuple(own | (1 << max(node - 1, 0)) for node, own in enumerate(rows.ancestors))
    return replace(rows, ancestors=bits)


def stand_by_index(rows: SequenceRows) -> SequenceRows:
    """Count positions by node index in place of depth."""
    return replace(rows, depths=tuple(range(len(rows.token_ids))))


@pytest.mark.parametrize("bug", [see_a_sibling, stand_by_index])
def test_a_planted_bug_is_caught(loaded: LoadedModel, stock: Any, bug: Change) -> None:
    """Negative controls of the test above: the same comparison sees a wrong mask or position."""
    runner, talks = start(loaded)
    tree = TokenTree(token_ids=(5, 6, 7, 8), parents=(-1, 0, 0, 2))
    trees = [tree for _ in talks]
    assert largest_difference(runner, stock, talks, trees, lambda rows: rows) < 1e-9
    assert largest_difference(runner, stock, talks, trees, bug) > 1e-3


def test_compaction_out_of_order_is_caught(loaded: LoadedModel, stock: Any) -> None:
    """Negative control: moving accepted rows one by one, last first, overwrites one of them."""
    runner, talks = start(loaded, num_talks=1)
    (talk,) = talks
    tree = TokenTree(token_ids=(5, 6, 7, 8), parents=(-1, 0, 0, 2))
    path, base = (0, 2, 3), len(talk.token_ids)
    runner.forward([SequenceRows.tree(tree, base, talk.table)])
    for place in reversed(range(len(path))):
        source = slot(talk.table, base + path[place], BLOCK_SIZE)
        runner.compact([source], [slot(talk.table, base + place, BLOCK_SIZE)])
    talk.token_ids += [tree.token_ids[node] for node in path]
    probe = [TokenTree.root_only(9)]
    assert largest_difference(runner, stock, talks, probe, lambda rows: rows) > 1e-3


def test_levels_of_a_drafter_equal_one_tree_pass(loaded: LoadedModel) -> None:
    runner, talks = start(loaded, num_talks=1)
    (talk,) = talks
    base = len(talk.token_ids)
    tree = TokenTree(token_ids=(5, 6, 7, 8, 9), parents=(-1, 0, 0, 1, 2))
    whole = SequenceRows.tree(tree, base, talk.table)
    (expected,) = runner.forward([whole])
    levels = []
    for first, last in ((0, 1), (1, 3), (3, 5)):
        part = slice(first, last)
        level = replace(
            whole,
            token_ids=whole.token_ids[part],
            first_node=first,
            depths=whole.depths[part],
            ancestors=whole.ancestors[part],
            logit_rows=tuple(range(last - first)),
        )
        levels.append(runner.forward([level])[0])
    assert torch.equal(torch.cat(levels), expected)


def test_copied_blocks_go_on_apart(loaded: LoadedModel) -> None:
    """A copy holds the same keys and values, and writing to it leaves the original alone."""
    runner, talks = start(loaded, num_talks=1)
    (talk,) = talks
    base = len(talk.token_ids)
    used = set(talk.table)
    spare = [block for block in range(NUM_BLOCKS) if block not in used][: len(talk.table)]
    runner.copy_blocks(talk.table, spare)

    def next_logits(table: tuple[int, ...], token: int) -> Tensor:
        return runner.forward([SequenceRows.chain((token,), base, table, (0,))])[0]

    original = next_logits(talk.table, 5)
    assert torch.equal(next_logits(tuple(spare), 5), original)
    next_logits(tuple(spare), 6)
    follow = SequenceRows.chain((7,), base + 1, talk.table, (0,))
    kept = runner.forward([follow])[0]
    next_logits(talk.table, 5)
    assert torch.equal(runner.forward([follow])[0], kept)


def test_logits_come_only_where_asked(loaded: LoadedModel) -> None:
    runner, _ = start(loaded, num_talks=0)
    silent = SequenceRows.chain((1, 2, 3), 0, (0,), ())
    loud = SequenceRows.chain((4, 5, 6), 0, (1,), (2, 0))
    nothing, some = runner.forward([silent, loud])
    assert nothing.shape == (0, VOCAB_SIZE)
    every = runner.forward([SequenceRows.chain((4, 5, 6), 0, (1,), (0, 1, 2))])[0]
    torch.testing.assert_close(some, every[[2, 0]], rtol=0, atol=0)
    assert runner.forward([silent])[0].shape == (0, VOCAB_SIZE)


def test_logits_are_float32_for_smaller_formats(folder: Path) -> None:
    loaded = load_model(folder, dtype="bfloat16")
    runner = Runner(loaded, num_blocks=2)
    assert runner.pool.dtype == torch.bfloat16
    (logits,) = runner.forward([SequenceRows.chain((1,), 0, (0,), (0,))])
    assert logits.dtype == torch.float32


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 16), (4, 0)])
def test_an_empty_pool_is_refused(loaded: LoadedModel, num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match="holds nothing"):
        Runner(loaded, num_blocks=num_blocks, block_size=block_size)
