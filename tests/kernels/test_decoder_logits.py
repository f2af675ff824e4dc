"""A decoder in one call: the bits of the single ops, a row's bits in any company, refusals."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from specinfer_kernels import (
    AttentionLayout,
    Backend,
    BackendUnavailableError,
    DecoderLayer,
    DecoderRows,
    DecoderStack,
    HeadNorms,
    KernelInputError,
    LayerCaches,
    PackedLinear,
    RowNorm,
    available_backends,
    decoder_logits,
    pack_linear,
)
from specinfer_kernels.packed_linear import layouts

WIDTH, INNER, NUM_LAYERS, VOCABULARY = 44, 52, 3, 50
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 12
NUM_BLOCKS, BLOCK_SIZE, NUM_POSITIONS = 40, 4, 96
DTYPES = (torch.float32, torch.bfloat16)
# Context and rows of each sequence: a root, a tree, a prompt longer than a block of keys.
SEQUENCES = ((9, 1), (17, 6), (0, 70))

native_only = pytest.mark.skipif(
    "native" not in available_backends() or layouts(torch.ones(1, 1))[0] != "native",
    reason="this machine runs the layers op by op",
)


def random_linear(
    inputs: int, outputs: int, dtype: torch.dtype, *, bias: bool = False, int8: bool = False
) -> PackedLinear:
    weight = torch.randn(outputs, inputs).to(dtype) * inputs**-0.5
    return pack_linear(weight, torch.randn(outputs).to(dtype) if bias else None, int8=int8)


def random_norm(dtype: torch.dtype) -> RowNorm:
    return RowNorm(torch.rand(WIDTH).to(dtype) + 0.5, 1e-5)


def random_layer(dtype: torch.dtype, *, qwen: bool = False, int8: bool = False) -> DecoderLayer:
    mixed = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM

    def linear(inputs: int, outputs: int, bias: bool = False) -> PackedLinear:
        return random_linear(inputs, outputs, dtype, bias=bias, int8=int8)

    def norm() -> RowNorm:
        return random_norm(dtype)

    heads = torch.rand(2, HEAD_DIM).to(dtype) + 0.5
    return DecoderLayer(
        attention_norm=norm(),
        head_norms=HeadNorms(heads[0], heads[1], 1e-6) if qwen else None,
        query_key_value=linear(WIDTH, mixed, bias=True),
        output=linear(NUM_HEADS * HEAD_DIM, WIDTH),
        mlp_norm=norm(),
        gate_up=linear(WIDTH, 2 * INNER),
        down=linear(INNER, WIDTH),
        scale=HEAD_DIM**-0.5,
    )


def random_stack(dtype: torch.dtype, kind: str = "llama") -> DecoderStack:
    torch.manual_seed(3)
    layers = [
        random_layer(dtype, qwen=kind == "qwen", int8=kind == "int8") for _ in range(NUM_LAYERS)
    ]
    if kind == "windows":
        layers[1] = replace(layers[1], sliding_window=7)
        layers[2] = replace(layers[2], softcap=3.0)
    return DecoderStack(
        torch.randn(VOCABULARY, WIDTH).to(dtype),
        *tables(dtype),
        tuple(layers),
        random_norm(dtype),
        random_linear(WIDTH, VOCABULARY, dtype, int8=kind == "int8"),
        NUM_HEADS,
        NUM_KV_HEADS,
        HEAD_DIM,
    )


def random_caches(dtype: torch.dtype) -> LayerCaches:
    torch.manual_seed(5)
    shape = (NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    return LayerCaches(
        tuple((torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)) for _ in range(3))
    )


def tables(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = torch.arange(NUM_POSITIONS)[:, None] * 0.5 ** torch.arange(HEAD_DIM // 2)
    cosines, sines = (torch.cat((part, part), 1).to(dtype) for part in (angles.cos(), angles.sin()))
    return cosines, sines


def random_rows(sequences: tuple[tuple[int, int], ...] = SEQUENCES) -> DecoderRows:
    """Rows of several sequences; a sequence of six rows is a tree of two branches."""
    torch.manual_seed(7)
    blocks = torch.randperm(NUM_BLOCKS, dtype=torch.int32)
    needed = [-(-(context + count) // BLOCK_SIZE) for context, count in sequences]
    block_tables = torch.zeros(len(sequences), max(needed), dtype=torch.int32)
    ancestors, positions, slots, offsets = [], [], [], [0]
    for index, (context, count) in enumerate(sequences):
        block_tables[index, : needed[index]] = blocks[: needed[index]]
        blocks = blocks[needed[index] :]
        for row in range(count):
            seen = [*range(0, row, 2), row] if count == 6 and row % 2 else list(range(row + 1))
            ancestors.append([sum(1 << bit for bit in seen if bit < 63), 0])
            if row >= 63:  # the sign bit is the 64th row of its sequence
                ancestors[-1] = [-1, (1 << (row - 63)) - 1]
            positions.append(context + len(seen) - 1)
            place = context + row
            slots.append(int(block_tables[index, place // BLOCK_SIZE]) * BLOCK_SIZE + place % 4)
        offsets.append(offsets[-1] + count)
    layout = AttentionLayout(
        torch.tensor(offsets, dtype=torch.int32),
        torch.tensor([context for context, _ in sequences], dtype=torch.int32),
        block_tables,
        torch.tensor(ancestors),
    )
    return DecoderRows(
        torch.randint(VOCABULARY, (len(positions),)),
        torch.tensor(positions),
        torch.tensor(slots),
        torch.arange(len(positions)),
        layout,
    )


def run(
    stack: DecoderStack, rows: DecoderRows, backend: Backend | None = None
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The logits, and the caches after the pass."""
    caches = random_caches(stack.dtype)
    return decoder_logits(rows, stack, caches, backend=backend), list(caches.pairs)


def same(left: DecoderStack, right: DecoderStack, rows: DecoderRows) -> bool:
    """Whether the C++ loop over `left` leaves every bit as the ops over `right` do."""
    ours, our_caches = run(left, rows, "native")
    theirs, their_caches = run(right, rows, "reference")
    alike = torch.equal(ours, theirs)
    for (our_keys, our_values), (keys, values) in zip(our_caches, their_caches, strict=True):
        alike = alike and torch.equal(our_keys, keys) and torch.equal(our_values, values)
    return alike


@native_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["llama", "qwen", "windows", "int8"])
@pytest.mark.parametrize("sequences", [SEQUENCES, ((30, 1),)])
def test_one_call_has_the_bits_of_the_ops(
    dtype: torch.dtype, kind: str, sequences: tuple[tuple[int, int], ...]
) -> None:
    stack = random_stack(dtype, kind)
    rows = random_rows(sequences)
    assert same(stack, stack, rows)
    some = replace(rows, wanted=rows.wanted.flip(0)[::3].contiguous())
    assert same(stack, stack, some)
    assert torch.equal(run(stack, some)[0], run(stack, rows)[0][some.wanted])


@native_only
def test_layers_in_another_order_are_caught() -> None:
    """Negative control: the comparison sees layers that are exchanged."""
    stack = random_stack(torch.float32)
    first, second, third = stack.layers
    exchanged = replace(stack, layers=(second, first, third))
    assert not same(exchanged, stack, random_rows())


def alone_and_together(
    function: Callable[[DecoderStack, DecoderRows], Tensor], dtype: torch.dtype
) -> bool:
    """Whether each sequence gets, in a pass of its own, the bits that it has among the others."""
    stack, rows = random_stack(dtype), random_rows()
    together = function(stack, rows)
    torch.set_num_threads(3)
    alike = torch.equal(together, function(stack, rows))
    offsets = rows.layout.row_offsets.tolist()
    for index, (start, end) in enumerate(itertools.pairwise(offsets)):
        part = slice(start, end)
        layout = AttentionLayout(
            torch.tensor([0, end - start], dtype=torch.int32),
            rows.layout.context_lens[index : index + 1],
            rows.layout.block_tables[index : index + 1],
            rows.layout.ancestors[part],
        )
        one = function(
            stack,
            DecoderRows(
                rows.token_ids[part],
                rows.positions[part],
                rows.slot_mapping[part],
                torch.arange(end - start),
                layout,
            ),
        )
        alike = alike and torch.equal(one, together[part])
    return alike


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_rows_have_their_own_bits(dtype: torch.dtype) -> None:
    assert alone_and_together(lambda stack, rows: run(stack, rows)[0], dtype)


def test_a_pass_that_mixes_rows_is_caught() -> None:
    """Negative control: rows that take something from the whole pass differ alone."""

    def planted(stack: DecoderStack, rows: DecoderRows) -> Tensor:
        mixed = stack.embedding + stack.embedding[rows.token_ids].mean() * 1e-6
        return run(replace(stack, embedding=mixed), rows)[0]

    assert not alone_and_together(planted, torch.float32)


def test_no_rows_and_none_wanted() -> None:
    stack, rows = random_stack(torch.float32), random_rows(((8, 1),))
    none = torch.empty(0, dtype=torch.int64)
    unwanted, after = run(stack, replace(rows, wanted=none))
    assert unwanted.shape == (0, VOCABULARY)
    for pair, expected in zip(after, run(stack, rows)[1], strict=True):
        assert all(map(torch.equal, pair, expected))
    layout = replace(
        rows.layout,
        ancestors=rows.layout.ancestors[:0],
        row_offsets=torch.zeros(2, dtype=torch.int32),
    )
    nothing = DecoderRows(none, none, none, none, layout)
    assert run(stack, nothing)[0].shape == (0, VOCABULARY)
    with pytest.raises((KernelInputError, IndexError)):
        run(stack, replace(nothing, wanted=torch.tensor([0])))


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_defaults_of_torch_change_nothing(default: torch.dtype) -> None:
    """They are the whole process's: transformers sets them while it builds another model."""
    stack, rows = random_stack(torch.float32), random_rows()
    expected, before = run(stack, rows)[0], torch.get_default_dtype()
    caches = random_caches(torch.float32)
    try:
        torch.set_default_dtype(default)
        found = decoder_logits(rows, stack, caches)
    finally:
        torch.set_default_dtype(before)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_float64_has_no_native_loop() -> None:
    stack = random_stack(torch.float64)
    assert stack.native is None
    with pytest.raises(BackendUnavailableError):
        run(stack, random_rows(), "native")


def test_caches_of_float8_are_for_the_single_ops() -> None:
    stack, rows = random_stack(torch.float32), random_rows()
    found = []
    for backend in (None, "reference"):
        caches = random_caches(torch.float8_e4m3fn)
        found.append(decoder_logits(rows, stack, caches, backend=backend))
    assert torch.equal(*found)
    assert not torch.equal(found[0], run(stack, rows)[0])
    with pytest.raises(BackendUnavailableError):
        decoder_logits(rows, stack, caches, backend="native")


@pytest.mark.parametrize("place", ["slot_mapping", "positions"])
def test_refuses_places_outside(place: str) -> None:
    rows = random_rows()
    getattr(rows, place)[2] = NUM_BLOCKS * BLOCK_SIZE
    with pytest.raises(KernelInputError, match=place):
        run(random_stack(torch.float32), rows)


def test_refuses_a_block_outside() -> None:
    rows = random_rows()
    rows.layout.block_tables[0, 0] = NUM_BLOCKS
    with pytest.raises(KernelInputError, match="block_tables"):
        run(random_stack(torch.float32), rows)


@pytest.mark.parametrize("name", ["token_ids", "wanted"])
@pytest.mark.parametrize("outside", [-1, None, 1 << 40])
def test_refuses_tokens_and_rows_outside(name: str, outside: int | None) -> None:
    stack, rows = random_stack(torch.float32), random_rows()
    first = VOCABULARY if name == "token_ids" else len(rows.token_ids)
    getattr(rows, name)[2] = first if outside is None else outside
    # Where the ops run one by one it is torch that looks.
    with pytest.raises((KernelInputError, IndexError), match=f"{name}|out of"):
        run(stack, rows)
    if stack.native is not None:
        caches, untouched = random_caches(torch.float32), random_caches(torch.float32)
        with pytest.raises(KernelInputError, match=name):
            decoder_logits(rows, stack, caches)
        for pair, expected in zip(caches.pairs, untouched.pairs, strict=True):
            assert all(map(torch.equal, pair, expected))


def test_refuses_rows_and_caches_that_do_not_fit() -> None:
    rows = random_rows()
    for name in ("token_ids", "positions", "slot_mapping"):
        whole: Tensor = getattr(rows, name)
        for tensor in (whole[1:], whole.int(), whole[None], whole.repeat(2)[::2]):
            changed: dict[str, Any] = {name: tensor}
            with pytest.raises(KernelInputError, match=name):
                replace(rows, **changed)
    with pytest.raises(KernelInputError, match="wanted"):
        replace(rows, wanted=rows.wanted.int())
    with pytest.raises(KernelInputError, match="device"):
        replace(rows, wanted=rows.wanted.to("meta"))
    caches, stack = random_caches(torch.float32), random_stack(torch.float32)
    for other in (LayerCaches(caches.pairs[:2]), random_caches(torch.bfloat16)):
        with pytest.raises(KernelInputError, match="caches"):
            decoder_logits(rows, stack, other)


def test_refuses_layers_and_ends_that_do_not_fit() -> None:
    stack = random_stack(torch.float32)
    layer = stack.layers[0]
    narrow = RowNorm(torch.ones(WIDTH - 1), 1e-5)
    wrong: tuple[tuple[str, Any], ...] = (
        ("embedding", stack.embedding.double()),
        ("embedding", stack.embedding.T),
        ("cosines", stack.cosines[:, 2:]),
        ("sines", stack.sines[1:]),
        ("final_norm", narrow),
        ("head", layer.output),
    )
    for name, value in wrong:
        with pytest.raises(KernelInputError, match=name.removeprefix("final_")):
            replace(stack, **{name: value})
    for layers in (
        (),
        (replace(layer, down=layer.output),),
        (replace(layer, mlp_norm=narrow),),
        (replace(layer, sliding_window=0),),
        (layer, random_layer(torch.bfloat16)),
    ):
        with pytest.raises(KernelInputError):
            replace(stack, layers=layers)
    with pytest.raises(KernelInputError):
        replace(stack, num_kv_heads=3)
    (keys, values), *others = random_caches(torch.float32).pairs
    for pair in ((keys, values[:3]), (keys, values.double()), (keys, values.transpose(1, 2))):
        with pytest.raises(KernelInputError):
            LayerCaches((pair, *others))
