"""Device code of what lies between a layer's products, and of moves in the KV pool.

Values are rounded to their dtype where `reference` rounds them. Knows pointers and sizes only.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

MOVE_ELEMENTS = 16384


class Rotation(NamedTuple):
    """Pointers: the tensors of `rotate_and_write_kv`."""

    mixed: Any
    positions: Any
    slot_mapping: Any
    cosines: Any
    sines: Any
    key_cache: Any
    value_cache: Any
    query: Any


@triton.jit
def norm_kernel(
    values,
    update,
    weight,
    result,
    value_stride,
    update_stride,
    width,
    epsilon,
    HAS_UPDATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row; with an update the row is `values` plus it, which is kept there."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(values + row * value_stride + columns, mask=inside, other=0.0)
    kind = value.dtype
    if HAS_UPDATE:
        more = tl.load(update + row * update_stride + columns, mask=inside, other=0.0)
        value = (value.to(tl.float32) + more.to(tl.float32)).to(kind)
        tl.store(values + row * value_stride + columns, value, mask=inside)
    wide = value.to(tl.float32)
    square = tl.sum(wide * wide, 0) / width
    normed = (wide * tl.rsqrt(square + epsilon)).to(kind).to(tl.float32)
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(result + row * width + columns, (normed * scale).to(kind), mask=inside)


@triton.jit
def gate_kernel(gate_up, result, stride, width, BLOCK: tl.constexpr):
    """One program for BLOCK columns of a row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_up + row * stride + columns, mask=inside, other=0.0)
    up = tl.load(gate_up + row * stride + width + columns, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    # e^(-|x|) never overflows.
    decay = tl.exp(-tl.abs(wide))
    opened = tl.where(wide < 0, decay, 1.0) / (1.0 + decay)
    silu = (wide * opened).to(gate.dtype)
    product = (silu.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)
    tl.store(result + row * width + columns, product, mask=inside)


@triton.jit
def load_head(
    pointer, weight, epsilon, inside, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr
):
    """Both halves of a head, normed if asked for."""
    columns = tl.arange(0, HALF)
    first = tl.load(pointer + columns, mask=inside, other=0.0)
    second = tl.load(pointer + HEAD_DIM // 2 + columns, mask=inside, other=0.0)
    if NORM:
        kind = first.dtype
        low = first.to(tl.float32)
        high = second.to(tl.float32)
        square = (tl.sum(low * low, 0) + tl.sum(high * high, 0)) / HEAD_DIM
        factor = tl.rsqrt(square + epsilon)
        low_weight = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
        high_weight = tl.load(weight + HEAD_DIM // 2 + columns, mask=inside, other=0.0)
        first = ((low * factor).to(kind).to(tl.float32) * low_weight).to(kind)
        second = ((high * factor).to(kind).to(tl.float32) * high_weight.to(tl.float32)).to(kind)
    return first, second


@triton.jit
def turned(left, cosine, right, sine, SIGN: tl.constexpr):
    """left * cosine + SIGN * right * sine, every step rounded to the dtype of the rows."""
    kind = left.dtype
    one = (left.to(tl.float32) * cosine.to(tl.float32)).to(kind).to(tl.float32)
    two = (right.to(tl.float32) * sine.to(tl.float32)).to(kind).to(tl.float32)
    return (one + SIGN * two).to(kind)


@triton.jit
def cached(value, inverse, FLOAT8: tl.constexpr):
    """What a cache holds of it, see reference.to_float8; the comparisons keep a NaN one."""
    if FLOAT8:
        wide = value.to(tl.float32) * inverse
        wide = tl.where(wide > 448.0, 448.0, tl.where(wide < -448.0, -448.0, wide))
        value = wide.to(tl.float8e4nv, fp_downcast_rounding="rtne")
    return value


@triton.jit
def rotate_kernel(
    tensors,
    query_weight,
    key_weight,
    row_stride,
    epsilon,
    key_inverse,
    value_inverse,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    FLOAT8: tl.constexpr,
    HALF: tl.constexpr,
):
    """One program a head of a row: queries are turned, keys also into their slot, values moved."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    columns = tl.arange(0, HALF)
    inside = columns < HEAD_DIM // 2
    source = tensors.mixed + row * row_stride + head * HEAD_DIM
    slot = tl.load(tensors.slot_mapping + row)
    if head >= NUM_HEADS + NUM_KV_HEADS:
        first, second = load_head(source, key_weight, epsilon, inside, HEAD_DIM, HALF, False)
        place = slot * NUM_KV_HEADS + (head - NUM_HEADS - NUM_KV_HEADS)
        values = tensors.value_cache + place * HEAD_DIM + columns
        tl.store(values, cached(first, value_inverse, FLOAT8), mask=inside)
        tl.store(values + HEAD_DIM // 2, cached(second, value_inverse, FLOAT8), mask=inside)
    else:
        is_key = head >= NUM_HEADS
        weight = query_weight
        if is_key:
            weight = key_weight
        first, second = load_head(source, weight, epsilon, inside, HEAD_DIM, HALF, HAS_NORMS)
        table = tl.load(tensors.positions + row) * HEAD_DIM + columns
        low_cosine = tl.load(tensors.cosines + table, mask=inside, other=0.0)
        low_sine = tl.load(tensors.sines + table, mask=inside, other=0.0)
        high_cosine = tl.load(tensors.cosines + table + HEAD_DIM // 2, mask=inside, other=0.0)
        high_sine = tl.load(tensors.sines + table + HEAD_DIM // 2, mask=inside, other=0.0)
        low = turned(first, low_cosine, second, low_sine, -1.0)
        high = turned(second, high_cosine, first, high_sine, 1.0)
        if is_key:
            place = slot * NUM_KV_HEADS + (head - NUM_HEADS)
            keys = tensors.key_cache + place * HEAD_DIM + columns
            tl.store(keys, cached(low, key_inverse, FLOAT8), mask=inside)
            tl.store(keys + HEAD_DIM // 2, cached(high, key_inverse, FLOAT8), mask=inside)
        else:
            target = tensors.query + (row * NUM_HEADS + head) * HEAD_DIM
            tl.store(target + columns, low, mask=inside)
            tl.store(target + HEAD_DIM // 2 + columns, high, mask=inside)


@triton.jit
def move_kernel(
    pool, sources, targets, num_moves, num_slots, width, MOVES: tl.constexpr, COLUMNS: tl.constexpr
):
    """Some columns of all moves of one layer's keys or values: all are read before any is written.

    No other program touches these columns, so the barrier between is all the order there has to be.
    """
    layer = pool + tl.program_id(0).to(tl.int64) * num_slots * width
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    moves = tl.arange(0, MOVES)
    inside = (moves < num_moves)[:, None] & (columns < width)[None, :]
    source = tl.load(sources + moves, mask=moves < num_moves, other=0)
    target = tl.load(targets + moves, mask=moves < num_moves, other=0)
    values = tl.load(layer + source[:, None] * width + columns[None, :], mask=inside)
    tl.debug_barrier()
    tl.store(layer + target[:, None] * width + columns[None, :], values, mask=inside)
