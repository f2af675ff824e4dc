"""A row has the same bits alone, in chunks, in crowds and in trees of any node order."""

import random
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from specinfer.tree import TokenTree
from specinfer_engine import attention, probe
from specinfer_engine.batch import SequenceRows
from specinfer_engine.loader import load_model
from specinfer_engine.model import LoadedModel
from specinfer_engine.probe import probe_tokens, rows_are_invariant
from specinfer_engine.rowwise import RowwiseActivation, apply_elementwise
from specinfer_engine.runner import Runner
from specinfer_kernels import tree_attention
from tests.kit.architectures import VOCAB_SIZE, architectures
from tests.kit.passes import Pages, prefill, random_tree
from tests.kit.tiny_models import write_tiny

# With the layers of Llama and Qwen 3 written out, and with them run through `transformers`.
FAMILIES = (("llama", True), ("llama", False), ("qwen3", True), ("gemma3", False), ("gpt2", False))
DTYPES = ("float32", "bfloat16")
BLOCK_SIZE = 4
NUM_BLOCKS = 160
LENGTH = 40
# No multiple of any vector: each loop over such rows ends in the middle of one.
ODD_WIDTH = 44


@pytest.fixture(
    scope="module", params=[(*family, dtype) for family in FAMILIES for dtype in DTYPES]
)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """One family in one format."""
    name, fused, dtype = request.param
    config = architectures()[name]
    folder = write_tiny(tmp_path_factory.mktemp(name), config)
    return load_model(folder, dtype=dtype, fused=fused)


@pytest.fixture
def three_threads() -> Iterator[None]:
    """A number of threads that no width divides by."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def tokens_of(seed: int, count: int = LENGTH) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(VOCAB_SIZE) for _ in range(count)]


def alone(runner: Runner, token_ids: list[int], table: tuple[int, ...]) -> Tensor:
    """Logits of every token, each in a pass of its own."""
    return prefill(runner, token_ids, table, *range(1, len(token_ids)))


def setting(loaded: LoadedModel) -> tuple[Runner, Pages]:
    return Runner(loaded, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE), Pages(
        NUM_BLOCKS, BLOCK_SIZE
    )


@pytest.mark.parametrize("cuts", [(), (1,), (39,), (7, 8, 21), (16, 32)])
def test_chunks_of_a_prefill(loaded: LoadedModel, cuts: tuple[int, ...]) -> None:
    runner, pages = setting(loaded)
    token_ids = tokens_of(1)
    expected = alone(runner, token_ids, pages.table(LENGTH))
    assert torch.equal(prefill(runner, token_ids, pages.table(LENGTH), *cuts), expected)


def test_other_sequences_in_the_pass(loaded: LoadedModel) -> None:
    runner, pages = setting(loaded)
    token_ids = tokens_of(2)
    expected = alone(runner, token_ids, pages.table(LENGTH))
    table = pages.table(LENGTH)
    crowd = [
        SequenceRows.chain(tokens_of(seed, 3 * seed), 0, pages.table(24)) for seed in (3, 5, 7)
    ]
    first = SequenceRows.chain(token_ids[:30], 0, table, range(30))
    second = SequenceRows.chain(token_ids[30:], 30, table, range(10))
    begun = runner.forward([crowd[0], first, crowd[1]])[1]
    ended = runner.forward([crowd[2], second])[1]
    assert torch.equal(torch.cat([begun, ended]), expected)


def deep_first(tree: TokenTree) -> list[int]:
    """Nodes of a tree, each branch to its end before the next."""
    order, stack = [], [0]
    while stack:
        node = stack.pop()
        order.append(node)
        stack.extend(tree.children[node].values())
    return order


def reordered(tree: TokenTree, order: list[int]) -> TokenTree:
    """The same tree with its nodes in another order, parents still first."""
    place = {node: index for index, node in enumerate(order)}
    return TokenTree(
        tuple(tree.token_ids[node] for node in order),
        tuple(-1 if node == 0 else place[tree.parents[node]] for node in order),
    )


def test_trees_of_any_node_order(loaded: LoadedModel) -> None:
    """Nodes equal plain decoding of their path, to the bit, whichever slots they sit in."""
    runner, pages = setting(loaded)
    context = tokens_of(4, 13)
    tree = random_tree(random.Random(6), 12, VOCAB_SIZE)
    orders = [
        list(range(len(tree))),
        deep_first(tree),
        sorted(range(12), key=lambda i: tree.depths[i]),
    ]
    results = []
    for order in orders:
        table = pages.table(32)
        prefill(runner, context, table)
        rows = SequenceRows.tree(reordered(tree, order), len(context), table)
        logits = runner.forward([rows])[0]
        results.append(torch.stack([logits[order.index(node)] for node in range(len(tree))]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    for node in (1, 5, 11):
        path = [*context, *tree.path_token_ids(node)]
        plain = alone(runner, path, Pages(NUM_BLOCKS, BLOCK_SIZE, seed=node).table(32))[-1]
        assert torch.equal(results[0][node], plain)


def test_context_blocks_in_another_order_are_caught(tmp_path: Path) -> None:
    """Negative control: the same keys in another order give other bits, and equality sees it.

    The full blocks of the context are put in another order in the block table; the order within
    a block and among the nodes stays. A kernel that sums in slot order is the control of
    `test_negative_control_slot_order_is_detected` in tests/kernels/test_tree_attention.py.
    """
    config = LlamaConfig(**{**architectures()["llama"].to_dict(), "num_hidden_layers": 1})
    loaded = load_model(write_tiny(tmp_path, config), dtype="float32")
    runner, pages = setting(loaded)
    context = tokens_of(8, 36)
    table = pages.table(44)
    prefill(runner, context, table)
    tree = SequenceRows.tree(random_tree(random.Random(9), 8, VOCAB_SIZE), len(context), table)
    (expected,) = runner.forward([tree])
    reordered_table = (*sorted(table[:9]), *table[9:])
    assert reordered_table != table
    (wrong,) = runner.forward([replace(tree, block_table=reordered_table)])
    torch.testing.assert_close(wrong, expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(wrong, expected)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_loops_cut_between_threads(dtype: str, fused: bool, tmp_path: Path) -> None:
    """Chunks whose activations are long enough for several threads equal rows alone."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=2 * 1031,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    loaded = load_model(write_tiny(tmp_path, config), dtype=dtype, fused=fused)
    runner, pages = setting(loaded)
    token_ids = tokens_of(10)
    expected = alone(runner, token_ids, pages.table(LENGTH))
    assert torch.equal(prefill(runner, token_ids, pages.table(LENGTH)), expected)


def test_the_probe_at_load_sees_a_stock_activation(tmp_path: Path) -> None:
    """Negative control: with the activation of `transformers` rows depend on their neighbours."""
    config = architectures()["llama"]
    config.intermediate_size = ODD_WIDTH
    loaded = load_model(write_tiny(tmp_path, config), dtype="float32", fused=False)
    token_ids = probe_tokens(loaded.vocab_size, loaded.max_model_len)
    assert loaded.row_invariant
    assert rows_are_invariant(loaded, token_ids)
    for layer in loaded.model.model.layers:
        assert isinstance(layer.mlp.act_fn, RowwiseActivation)
        layer.mlp.act_fn = layer.mlp.act_fn.function
    assert not rows_are_invariant(loaded, token_ids)


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
def test_the_probe_looks_behind_splits_of_a_long_context(
    kv_dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where attention has splits; a bug behind them that needs a crowd or a wide chunk is seen."""
    path = write_tiny(tmp_path, architectures()["llama"])
    load = partial(load_model, path, dtype="bfloat16", fused=False, kv_dtype=kv_dtype)
    attend, seen = tree_attention, set()
    faulty = (0, 0)

    def planted(query: Tensor, *rest: Any, **numbers: Any) -> Tensor:
        layout = rest[2]
        context, sequences = int(layout.context_lens.max()), layout.context_lens.numel()
        seen.add((context, sequences))
        output = attend(query, *rest, **numbers)
        return output * 1.01 if faulty in ((context, sequences), (context, len(query))) else output

    monkeypatch.setattr(attention, "tree_attention", planted)
    assert load().row_invariant
    assert max(context for context, _ in seen) < 16, "no splits here, so no long rows"
    monkeypatch.setattr(probe, "split_length", lambda *device: 16)
    assert load().row_invariant
    assert {(40, 256), (40, 1), (41, 1), (51, 1)} <= seen
    for faulty in ((40, 256), (40, 23), (24, 8), (24, 3), (51, 1)):
        assert not load().row_invariant, faulty


@pytest.mark.parametrize("width", [1, 44, 64, 100, 2062])
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_an_element_does_not_know_its_place(width: int, rows: int) -> None:
    values = torch.randn(rows, width, generator=torch.Generator().manual_seed(width))
    for dtype in (torch.float32, torch.bfloat16):
        given = values.to(dtype)
        whole = apply_elementwise(torch.nn.functional.silu, given)
        assert whole.shape == given.shape
        for row in {0, rows // 2, rows - 1}:
            one = apply_elementwise(torch.nn.functional.silu, given[row : row + 1])
            assert torch.equal(whole[row : row + 1], one)
        torch.testing.assert_close(whole, torch.nn.functional.silu(given))


@pytest.mark.parametrize("threads", [2, 3, 6, 8, 12])
def test_gelu_is_not_cut_between_threads(threads: int) -> None:
    """Its loops are cut at a lower length than others, and anywhere the count of threads says."""
    gelu = partial(torch.nn.functional.gelu, approximate="tanh")
    values = torch.randn(301, 232, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = apply_elementwise(gelu, values)
        alone = torch.cat([apply_elementwise(gelu, row[None]) for row in values])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(whole, alone)
