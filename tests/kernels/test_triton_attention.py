"""The Triton tree attention through the interpreter: values, bits, and what it is for each shape.

With a GPU in the machine Triton compiles instead of interpreting, and the same tests run there.
"""

import dataclasses
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from specinfer_kernels import AttentionLayout, tree_attention
from specinfer_kernels.reference import to_float8
from tests.kernels.cases import (
    Attention,
    Batch,
    Form,
    Geometry,
    Nodes,
    Session,
    attend,
    chain,
    lay_out,
    path_in_tree,
    random_nodes,
    random_tree,
    same_bits,
)
from tests.kit.triton_interpreter import patch_once

pytest.importorskip("triton")

from specinfer_kernels.triton import attention as launcher
from specinfer_kernels.triton.runtime import is_interpreting

pytestmark = pytest.mark.skipif(not is_interpreting(), reason="Triton compiles in this process")

TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# Small enough that a few dozen keys fill several tiles and splits.
SIZES = launcher.TileSizes(block_rows=16, block_keys=16, split_keys=32)
NARROW = Geometry(num_heads=2, num_kv_heads=1, head_dim=16, block_size=8)


@pytest.fixture(autouse=True)
def quick_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_once(monkeypatch)


def launch(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    layout: AttentionLayout,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sizes: launcher.TileSizes = SIZES,
    serial: bool | None = None,
    reverse: bool = False,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> Tensor:
    """The launcher with sizes of its own; `reverse` plants a bug: own ancestors last to first."""
    plan = layout.triton_plan
    if reverse:
        plan = dataclasses.replace(plan, order=reverse_ancestors(layout))
    return launcher.tree_attention(
        query,
        key_cache,
        value_cache,
        layout.row_offsets,
        layout.context_lens,
        layout.block_tables,
        plan,
        scale=scale,
        sliding_window=sliding_window,
        softcap=softcap,
        key_scale=key_scale,
        value_scale=value_scale,
        sizes=sizes,
        serial=serial,
    )


def reverse_ancestors(layout: AttentionLayout) -> Tensor:
    plan = layout.triton_plan
    order = plan.order.clone()
    counts = plan.num_keys - layout.context_lens[plan.sequences.long()]
    for row, count in enumerate(counts.tolist()):
        order[row, :count] = order[row, :count].flip(0)
    return order


def expected(
    sessions: list[Session], geometry: Geometry, window: int | None, softcap: float | None
) -> Tensor:
    """The reference in float64 on the same, rounded, numbers."""

    def widen(nodes: Nodes) -> Nodes:
        return Nodes(nodes.query.double(), nodes.key.double(), nodes.value.double())

    wide = [Session(widen(s.context), widen(s.rows), s.parents) for s in sessions]
    geometry = dataclasses.replace(geometry, dtype=torch.float64)
    reference = cast(Attention, partial(tree_attention, backend="reference"))
    return torch.cat(attend(wide, geometry, reference, sliding_window=window, softcap=softcap))


def check_values(
    sessions: list[Session],
    geometry: Geometry,
    attention: Attention,
    window: int | None = None,
    softcap: float | None = None,
) -> None:
    got = torch.cat(attend(sessions, geometry, attention, sliding_window=window, softcap=softcap))
    assert got.dtype == geometry.dtype
    tolerance = TOLERANCE[geometry.dtype]
    wanted = expected(sessions, geometry, window, softcap)
    torch.testing.assert_close(got.double(), wanted, atol=tolerance, rtol=tolerance)


def ragged_batch(geometry: Geometry) -> list[Session]:
    """A tree after a context, a single row, a prompt without context, and a sequence of no rows."""
    nodes = random_nodes(120, geometry, seed=0)
    return [
        Session(nodes[:37], nodes[37:44], random_tree(7, seed=1)),
        Session(nodes[:32], nodes[63:64], [-1]),
        Session(nodes[:9], nodes[:0], []),
        Session(nodes[:0], nodes[80:83], chain(3)),
    ]


@pytest.mark.parametrize(
    ("dtype", "num_heads", "num_kv_heads", "head_dim", "serial"),
    [
        (torch.float32, 4, 2, 24, False),
        (torch.float32, 3, 3, 5, True),
        (torch.float16, 8, 1, 64, True),
        (torch.bfloat16, 5, 1, 96, False),
        (torch.bfloat16, 4, 2, 128, False),
        (torch.bfloat16, 4, 1, 256, True),
        (torch.float16, 18, 1, 16, False),
    ],
)
def test_values_of_a_ragged_batch(
    dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int, serial: bool
) -> None:
    geometry = Geometry(num_heads, num_kv_heads, head_dim, dtype=dtype)
    attention = cast(Attention, partial(launch, serial=serial))
    check_values(ragged_batch(geometry), geometry, attention)


@pytest.mark.parametrize(
    ("window", "softcap", "serial"),
    [(20, None, False), (None, 2.0, True), (3, 0.5, True), (1, None, False)],
)
def test_window_and_softcap(window: int | None, softcap: float | None, serial: bool) -> None:
    attention = cast(Attention, partial(launch, serial=serial))
    check_values(ragged_batch(NARROW), NARROW, attention, window, softcap)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_the_op_takes_the_backend_by_name(dtype: torch.dtype) -> None:
    geometry = dataclasses.replace(NARROW, dtype=dtype)
    attention = cast(Attention, partial(tree_attention, backend="triton"))
    check_values(ragged_batch(geometry), geometry, attention)


def last_rows(batch: Batch, count: int) -> Batch:
    """The same pass for the last rows of its only sequence, whose other keys are in the cache."""
    layout = dataclasses.replace(
        batch.layout,
        row_offsets=torch.tensor([0, count], dtype=torch.int32),
        ancestors=batch.layout.ancestors[-count:].contiguous(),
    )
    return dataclasses.replace(batch, query=batch.query[-count:], layout=layout)


@pytest.mark.parametrize("num_nodes", [1, 64, 65, 512])
@pytest.mark.parametrize("form", ["tree", "chain"])
def test_last_rows_of_trees_of_many_words(num_nodes: int, form: str) -> None:
    nodes = random_nodes(num_nodes + 5, NARROW, seed=0)
    parents = chain(num_nodes) if form == "chain" else random_tree(num_nodes, seed=1)
    batch = lay_out([Session(nodes[:5], nodes[5:], parents)], NARROW, seed=0)
    part = last_rows(batch, min(num_nodes, 3))
    wanted = run(part, cast(Attention, partial(tree_attention, backend="reference")))
    torch.testing.assert_close(run(part), wanted, atol=3e-6, rtol=3e-6)


def run(batch: Batch, attention: Attention = launch) -> Tensor:
    return attention(batch.query, batch.key_cache, batch.value_cache, batch.layout, scale=0.25)


LENGTH = 52
POSITIONS = (0, 16, 31, 32, 33, 46, 47, 48, 51)


def chain_form(path: Nodes, start: int) -> Form:
    session = Session(path[:start], path[start:], chain(LENGTH - start))
    return Form(f"chain from {start}", [session], 0, list(range(LENGTH - start)), start)


def tree_form(path: Nodes, back: int, others: int, geometry: Geometry) -> Form:
    """The last `back` tokens in a tree with `others` more nodes, between two other sessions."""
    parents, places = path_in_tree(back, others, seed=back)
    rows = random_nodes(len(parents), geometry, seed=5)
    for rows_of, path_of in zip(
        (rows.query, rows.key, rows.value), (path.query, path.key, path.value), strict=True
    ):
        rows_of[places] = path_of[-back:]
    noise = random_nodes(30, geometry, seed=2)
    before = Session(noise[:19], noise[19:22], random_tree(3, seed=6))
    after = Session(noise[:0], noise[25:26], [-1])
    session = Session(path[: LENGTH - back], rows, parents)
    return Form(f"tree of {back} + {others}", [before, session, after], 1, places, LENGTH - back)


def differing_rows(
    attention: Attention,
    geometry: Geometry,
    chains: tuple[int, ...],
    trees: tuple[int, ...],
    window: int | None = None,
    softcap: float | None = None,
) -> list[tuple[str, int]]:
    """Form and position of every row that has other bits than in plain decoding."""
    path = random_nodes(LENGTH, geometry, seed=1)
    forms = [chain_form(path, start) for start in chains]
    forms += [tree_form(path, back, 4, geometry) for back in trees]

    def outputs(sessions: list[Session], seed: int) -> list[Tensor]:
        return attend(
            sessions, geometry, attention, seed=seed, sliding_window=window, softcap=softcap
        )

    plain = {
        position: outputs([Session(path[:position], path[position : position + 1], [-1])], position)
        for position in POSITIONS
    }
    failed = []
    for form in forms:
        got = outputs(form.sessions, form.seed)[form.index][form.places]
        for row, position in enumerate(range(form.start, LENGTH)):
            if position in plain and not same_bits(got[row], plain[position][0][0]):
                failed.append((form.name, position))
    return failed


@pytest.mark.parametrize(
    ("dtype", "chains", "trees"),
    [
        (torch.float32, (0, 45), (6, 21)),
        (torch.bfloat16, (33,), (6,)),
        (torch.float16, (), (21,)),
    ],
)
def test_bits_of_a_row_are_its_own(
    dtype: torch.dtype, chains: tuple[int, ...], trees: tuple[int, ...]
) -> None:
    geometry = dataclasses.replace(NARROW, dtype=dtype)
    assert differing_rows(launch, geometry, chains, trees) == []


def test_bits_over_caches_of_one_byte() -> None:
    def over_float8(
        query: Tensor, key_cache: Tensor, value_cache: Tensor, *rest: Any, **numbers: Any
    ) -> Tensor:
        stored = to_float8(key_cache, 0.5), to_float8(value_cache, 2.0)
        return launch(query, *stored, *rest, key_scale=0.5, value_scale=2.0, **numbers)

    geometry = dataclasses.replace(NARROW, dtype=torch.float16)
    assert differing_rows(cast(Attention, over_float8), geometry, (33,), (6,)) == []


def test_bits_under_a_window_and_a_softcap() -> None:
    assert differing_rows(launch, NARROW, (30,), (6,), window=30, softcap=3.0) == []


def test_bits_do_not_depend_on_the_launch() -> None:
    sessions = ragged_batch(NARROW)
    beside, serial = (
        torch.cat(attend(sessions, NARROW, cast(Attention, partial(launch, serial=serial))))
        for serial in (False, True)
    )
    assert same_bits(beside, serial)


def splits_by_rows(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    layout: AttentionLayout,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The planted bug: few rows take shorter splits, as kernels do to fill a GPU."""
    split_keys = 16 if query.shape[0] < 4 else 32
    sizes = dataclasses.replace(SIZES, split_keys=split_keys)
    return launch(query, key_cache, value_cache, layout, scale=scale, sizes=sizes)


def test_negative_controls_are_detected() -> None:
    """Right values in other orders of summing: splits by the number of rows, keys out of place."""
    reverse = cast(Attention, partial(launch, reverse=True))
    check_values(ragged_batch(NARROW), NARROW, reverse)
    assert any(name.startswith("tree") for name, _ in differing_rows(reverse, NARROW, (), (6,)))
    check_values(ragged_batch(NARROW), NARROW, splits_by_rows)
    assert differing_rows(splits_by_rows, NARROW, (45,), ()) != []


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_what_a_row_does_not_see_may_be_anything() -> None:
    """Infinities in the keys and values of a sibling, blocks behind the window gone."""
    nodes = random_nodes(40, NARROW, seed=0)
    session = Session(nodes[:34], nodes[34:38], [-1, 0, 0, 1])
    clean = lay_out([session], NARROW, seed=0)
    nodes.key[36], nodes.value[36] = torch.inf, torch.nan
    spoilt = lay_out([session], NARROW, seed=0)
    rows = [0, 1, 3]
    assert same_bits(run(spoilt)[rows], run(clean)[rows])
    windowed = cast(Attention, partial(launch, sliding_window=12))
    wanted = run(clean, windowed)
    clean.layout.block_tables[0, : (34 + 1 - 12) // NARROW.block_size] = -1
    assert same_bits(run(clean, windowed), wanted)


def test_strided_query_and_no_rows() -> None:
    nodes = random_nodes(9, NARROW, seed=0)
    batch = lay_out([Session(nodes[:6], nodes[6:], chain(3))], NARROW, seed=0)
    heads_first = batch.query.transpose(0, 1).contiguous().transpose(0, 1)
    assert not heads_first.is_contiguous()
    assert same_bits(run(dataclasses.replace(batch, query=heads_first)), run(batch))
    none = lay_out([Session(nodes[:6], nodes[:0], [])], NARROW, seed=0)
    assert run(none).shape == (0, 2, 16)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("serial", [False, True])
def test_a_node_beside_a_long_chain_sees_nothing_of_it(serial: bool) -> None:
    """Its tile of rows runs tiles of keys that it has left, with a NaN in one of them."""
    nodes = random_nodes(40, NARROW, seed=0)
    session = Session(nodes[:16], nodes[16:], [*chain(23), 2])
    attention = cast(Attention, partial(launch, serial=serial))
    clean = run(lay_out([session], NARROW, seed=0), attention)
    nodes.key[26], nodes.value[26] = torch.inf, torch.nan
    spoilt = run(lay_out([session], NARROW, seed=0), attention)
    rows = [*range(10), 23]
    assert same_bits(spoilt[rows], clean[rows])
