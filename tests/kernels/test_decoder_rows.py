"""Norms, gates and rotary writes: what they compute, a row's bits alone and in crowds, refusals."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from specinfer_kernels import (
    Backend,
    HeadNorms,
    KernelInputError,
    RotaryPlaces,
    add_rms_norm,
    available_backends,
    rms_norm,
    rotate_and_write_kv,
    silu_multiply,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float64: 2e-6}
# One value, ends in the middle of a vector, whole vectors, more than the chains of one turn.
WIDTHS = (1, 44, 64, 200, 2048)
EPSILON = 1e-5
NUM_POSITIONS, NUM_BLOCKS, BLOCK_SIZE = 32, 9, 4

pytestmark = pytest.mark.parametrize("backend", available_backends())


@pytest.fixture(autouse=True)
def skip_what_native_leaves_out(request: pytest.FixtureRequest) -> None:
    params = request.node.callspec.params
    if params["backend"] == "native" and params.get("dtype") == torch.float64:
        pytest.skip("float64 is left to the reference")


def close(left: Tensor, right: Tensor) -> None:
    tolerance = TOLERANCE[left.dtype]
    torch.testing.assert_close(left.double(), right.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(backend: Backend, dtype: torch.dtype, width: int) -> None:
    values, weight = torch.randn(5, 2 * width).to(dtype)[:, :width], torch.randn(width).to(dtype)
    wide = values.double()
    expected = weight.double() * wide * (wide.square().mean(1, keepdim=True) + EPSILON).rsqrt()
    close(rms_norm(values, weight, EPSILON, backend=backend), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_add_rms_norm(backend: Backend, dtype: torch.dtype, width: int) -> None:
    hidden, update = torch.randn(2, 5, width).to(dtype)
    weight, total = torch.randn(width).to(dtype), hidden + update
    normed = add_rms_norm(hidden, update, weight, EPSILON, backend=backend)
    assert torch.equal(hidden, total)
    assert torch.equal(normed, rms_norm(total, weight, EPSILON, backend=backend))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_silu_multiply(backend: Backend, dtype: torch.dtype, width: int) -> None:
    gate_up = (torch.randn(5, 2 * width) * 4).to(dtype)
    gate, up = gate_up.double().chunk(2, 1)
    close(silu_multiply(gate_up, backend=backend), functional.silu(gate) * up)


def test_silu_multiply_of_extremes(backend: Backend) -> None:
    """No overflow on the way: large gates pass, very negative ones close."""
    gate_up = torch.tensor([[1e30, -1e30, -90.0, 0.0, -0.0, 2.0, 2.0, 2.0, 2.0, 2.0]])
    result = silu_multiply(gate_up, backend=backend)
    torch.testing.assert_close(result, torch.tensor([[2e30, 0.0, 0.0, 0.0, 0.0]]))


def pool(dtype: torch.dtype, num_kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    shape = (NUM_BLOCKS, BLOCK_SIZE, num_kv_heads, head_dim)
    return torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)


def places_of(num_rows: int, head_dim: int, dtype: torch.dtype) -> RotaryPlaces:
    angles = torch.arange(NUM_POSITIONS)[:, None] * 0.5 ** torch.arange(head_dim // 2)
    tables = (torch.cat((part, part), 1).to(dtype) for part in (angles.cos(), angles.sin()))
    positions = torch.randint(NUM_POSITIONS, (num_rows,))
    return RotaryPlaces(positions, torch.randperm(NUM_BLOCKS * BLOCK_SIZE)[:num_rows], *tables)


def turned(heads: Tensor, places: RotaryPlaces) -> Tensor:
    """Pairs (i, i + half) as complex numbers, times the unit number of their angle."""
    half = heads.shape[2] // 2
    pairs = torch.complex(heads[..., :half].double(), heads[..., half:].double())
    cosines = places.cosines[places.positions, None, :half].double()
    sines = places.sines[places.positions, None, :half].double()
    product = pairs * torch.complex(cosines, sines)
    return torch.cat((product.real, product.imag), 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(4, 2, 16), (3, 1, 6), (2, 2, 64), (5, 5, 2)])
@pytest.mark.parametrize("normed", [False, True])
def test_rotate_and_write_kv(
    backend: Backend, dtype: torch.dtype, heads: tuple[int, int, int], normed: bool
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    mixed = torch.randn(7, (num_heads + 2 * num_kv_heads + 1) * head_dim).to(dtype)
    mixed = mixed[:, head_dim:]  # rows may lie apart
    places = places_of(7, head_dim, dtype)
    key_cache, value_cache = pool(dtype, num_kv_heads, head_dim)
    weights = torch.randn(2, head_dim).to(dtype)
    norms = HeadNorms(weights[0], weights[1], EPSILON) if normed else None
    query = rotate_and_write_kv(mixed, places, key_cache, value_cache, norms, backend=backend)
    apart = mixed.unflatten(1, (-1, head_dim)).split((num_heads, num_kv_heads, num_kv_heads), 1)
    if norms is not None:
        sides = zip(apart, weights, strict=False)
        apart = (*(one_norm(side, weight, backend) for side, weight in sides), apart[2])
    close(query, turned(apart[0], places))
    close(key_cache.flatten(0, 1)[places.slot_mapping], turned(apart[1], places))
    assert torch.equal(value_cache.flatten(0, 1)[places.slot_mapping], apart[2])
    untouched = torch.ones(NUM_BLOCKS * BLOCK_SIZE, dtype=torch.bool)
    untouched[places.slot_mapping] = False
    assert not key_cache.flatten(0, 1)[untouched].any()
    assert not value_cache.flatten(0, 1)[untouched].any()


def one_norm(heads: Tensor, weight: Tensor, backend: Backend) -> Tensor:
    return rms_norm(heads.flatten(0, 1), weight, EPSILON, backend=backend).view(heads.shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_turns_have_the_bits_of_the_definition(backend: Backend, dtype: torch.dtype) -> None:
    mixed, places = torch.randn(9, 8 * 16).to(dtype), places_of(9, 16, dtype)
    ours, defined = pool(dtype, 2, 16), pool(dtype, 2, 16)
    query = rotate_and_write_kv(mixed, places, *ours, backend=backend)
    assert torch.equal(query, rotate_and_write_kv(mixed, places, *defined, backend="reference"))
    assert torch.equal(ours[0], defined[0])


def same_alone_and_together(op: Callable[[Tensor], Tensor], rows: Tensor) -> bool:
    """Whether each row gets the bits that it has alone, with one thread and with three."""
    alone = torch.cat([op(rows[row : row + 1].clone()) for row in range(rows.shape[0])])
    together = op(rows.clone())
    torch.set_num_threads(3)
    return torch.equal(alone, together) and torch.equal(alone, op(rows.clone()))


def row_ops(backend: Backend, width: int, dtype: torch.dtype) -> list[Callable[[Tensor], Tensor]]:
    weight = torch.randn(width).to(dtype)
    return [
        partial(rms_norm, weight=weight, epsilon=EPSILON, backend=backend),
        lambda rows: add_rms_norm(rows, rows.flip(1), weight, EPSILON, backend=backend),
        lambda rows: silu_multiply(torch.cat((rows, rows), 1), backend=backend),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [44, 512])
def test_rows_have_their_own_bits(backend: Backend, dtype: torch.dtype, width: int) -> None:
    """Enough rows that the work is cut between threads."""
    rows = (torch.randn(300, width) * 3).to(dtype)
    for op in row_ops(backend, width, dtype):
        assert same_alone_and_together(op, rows)


def test_a_norm_over_the_rows_together_is_caught(backend: Backend) -> None:
    """Negative control: one factor for the whole pass passes for a norm, and fails here."""

    def planted(rows: Tensor) -> Tensor:
        return rows * rms_norm(rows.reshape(1, -1), torch.ones(rows.numel()), EPSILON).mean()

    assert not same_alone_and_together(planted, torch.randn(6, 44))


@pytest.mark.parametrize("dtype", DTYPES)
def test_turned_rows_have_their_own_bits(backend: Backend, dtype: torch.dtype) -> None:
    mixed, places = torch.randn(30, 8 * 44).to(dtype), places_of(30, 44, dtype)
    weights = torch.randn(2, 44).to(dtype)
    norms = HeadNorms(weights[0], weights[1], EPSILON)
    together, apart = pool(dtype, 2, 44), pool(dtype, 2, 44)
    query = rotate_and_write_kv(mixed, places, *together, norms, backend=backend)
    for row in range(30):
        one = slice(row, row + 1)
        place = replace(
            places, positions=places.positions[one], slot_mapping=places.slot_mapping[one]
        )
        alone = rotate_and_write_kv(mixed[one], place, *apart, norms, backend=backend)
        assert torch.equal(alone, query[one])
    assert torch.equal(together[0], apart[0])


@pytest.mark.parametrize("bad", ["slot", "position"])
def test_refuses_a_place_outside_and_writes_nothing(backend: Backend, bad: str) -> None:
    places = places_of(3, 16, torch.float32)
    column = places.slot_mapping if bad == "slot" else places.positions
    for value in (-1, NUM_BLOCKS * BLOCK_SIZE + NUM_POSITIONS):
        column[2] = value
        caches = pool(torch.float32, 2, 16)
        with pytest.raises(KernelInputError, match=bad):
            rotate_and_write_kv(torch.ones(3, 8 * 16), places, *caches, backend=backend)
        assert not caches[0].any()


def test_refuses_bad_rows(backend: Backend) -> None:
    rows, weight = torch.ones(3, 8), torch.ones(8)
    for values, other in ((rows[0], weight), (rows, weight[:4]), (rows, weight.double())):
        with pytest.raises(KernelInputError):
            rms_norm(values, other, EPSILON, backend=backend)
    for update in (rows[:2], rows.double(), rows.T.contiguous().T):
        with pytest.raises(KernelInputError, match="update"):
            add_rms_norm(rows, update, weight, EPSILON, backend=backend)
    for gate_up in (rows[0], rows[:, :7], rows[:, ::2]):
        with pytest.raises(KernelInputError, match="gate_up"):
            silu_multiply(gate_up, backend=backend)


def test_refuses_bad_rotations(backend: Backend) -> None:
    places, caches = places_of(3, 16, torch.float32), pool(torch.float32, 2, 16)
    rotate = partial(rotate_and_write_kv, backend=backend)
    mixed = torch.ones(3, 8 * 16)
    norms = HeadNorms(torch.ones(8), torch.ones(8), EPSILON)
    for refused in (
        lambda: rotate(mixed[:2], places, *caches),
        lambda: rotate(mixed[:, : 4 * 16], places, *caches),
        lambda: rotate(mixed.double(), places, *caches),
        lambda: rotate(mixed, places_of(3, 8, torch.float32), *caches),
        lambda: rotate(mixed, places, caches[0], caches[1][:4]),
        lambda: rotate(mixed, places, *caches, norms),
        lambda: replace(places, positions=places.positions.int()),
        lambda: replace(places, positions=places.positions[:2]),
        lambda: replace(places, sines=places.sines.double()),
    ):
        with pytest.raises(KernelInputError):
            refused()
