"""Device code of tree attention: the plan of a pass, the shared tiles, the rest of each row.

Knows pointers and sizes only; `attention` chooses the sizes. What a row computes is a fixed
function of the pairs (position, key) it sees: tiles of BLOCK_KEYS keys and splits of SPLIT_KEYS
keys are counted from position 0, a key of position p sits at place p % BLOCK_KEYS of its tile
whichever slot holds it, tiles fold into a split and splits into the row from left to right.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl


@dataclass(frozen=True)
class Shape:
    """What a compiled kernel is compiled for."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    chunk: int  # query heads of one kv head that a tile takes
    block_rows: int  # (row, head) pairs of a tile
    block_keys: int
    split_keys: int
    block_dim: int  # head_dim, up to the next power of two
    serial: bool
    has_window: bool
    has_softcap: bool
    widen: bool  # see `dot`

    @property
    def num_chunks(self) -> int:
        """Tiles that the query heads of one kv head fill."""
        return -(-(self.num_heads // self.num_kv_heads) // self.chunk)


class Inputs(NamedTuple):
    """Pointers: the op's arguments."""

    query: Any
    key_cache: Any
    value_cache: Any
    row_offsets: Any
    context_lens: Any
    block_tables: Any


class Plan(NamedTuple):
    """Pointers: what plan_kernel finds out about each row, once for all layers."""

    sequences: Any  # int32 [num_rows]
    num_keys: Any  # int32 [num_rows]
    identity: Any  # int32 [num_rows]: every position below has its key at the slot of its number
    order: Any  # int32 [num_rows, num_words * 64]: the places of the own ancestors, rising


class States(NamedTuple):
    """Pointers: float32 softmax states [num_slots, num_rows, num_heads(, block_dim)]."""

    tops: Any  # largest score so far, in units of log 2
    totals: Any  # sum of weights relative to the top
    results: Any  # sum of weighted values


class Numbers(NamedTuple):
    """Scalars of one call."""

    num_sequences: Any
    num_rows: Any
    row_stride: Any  # of query
    head_stride: Any
    table_stride: Any
    order_stride: Any
    window: Any
    inner: Any  # factor of a score before the softcap
    outer: Any  # and after it
    value_scale: Any


@triton.jit
def sequence_of(row_offsets, num_sequences, index, ROWS: tl.constexpr, SPARE: tl.constexpr):
    """The last sequence s whose first tile, row_offsets[s] // ROWS + s * SPARE, is at most `index`.

    A tile is ROWS rows of one sequence. One SPARE number a sequence leaves each of them room for
    its last, part-filled tile, and so needs no table of tiles; single rows (ROWS 1) need none.
    """
    sequence = 0
    above = num_sequences
    while sequence + 1 < above:
        middle = (sequence + above) // 2
        left = tl.load(row_offsets + middle) // ROWS + middle * SPARE <= index
        sequence = tl.where(left, middle, sequence)
        above = tl.where(left, above, middle)
    return sequence


@triton.jit
def plan_kernel(row_offsets, context_lens, ancestors, plan, num_sequences, num_words):
    """One program a row: count and list the set bits of its ancestor words."""
    row = tl.program_id(0)
    sequence = sequence_of(row_offsets, num_sequences, row, 1, 0)
    context = tl.load(context_lens + sequence)
    lanes = tl.arange(0, 64)
    count = 0
    run = 0
    for word_index in range(num_words):
        word = tl.load(ancestors + row.to(tl.int64) * num_words + word_index)
        bits = ((word >> lanes.to(tl.int64)) & 1).to(tl.int32)
        rank = count + tl.cumsum(bits, 0) - bits
        place = word_index * 64 + lanes
        tl.store(plan.order + row.to(tl.int64) * num_words * 64 + rank, place, mask=bits == 1)
        run += tl.sum(tl.where(rank == place, bits, 0), 0)
        count += tl.sum(bits, 0)
    tl.store(plan.sequences + row, sequence)
    tl.store(plan.num_keys + row, context + count)
    tl.store(plan.identity + row, context + run)


@triton.jit
def shared_limit(length, identity, context, BLOCK_KEYS: tl.constexpr):
    """The position at which a row leaves the tiles it shares with the rows beside it.

    A row of a long chain shares all. Any other leaves at the tile that holds the first key that is
    not where the other rows have it, or that other rows may not see.
    """
    chain = (identity == length) & (length - context > BLOCK_KEYS)
    return tl.where(chain, length, identity // BLOCK_KEYS * BLOCK_KEYS)


@triton.jit
def load_tile(inputs, table, slots, present, kv_head, SHAPE: tl.constexpr):
    """Keys and values [block_keys, block_dim] of logical slots; zeros where not `present`."""
    block = tl.load(table + slots // SHAPE.block_size, mask=present, other=0).to(tl.int64)
    slot = block * SHAPE.block_size + slots % SHAPE.block_size
    dims = tl.arange(0, SHAPE.block_dim)
    base = (slot * SHAPE.num_kv_heads + kv_head) * SHAPE.head_dim
    offsets = base[:, None] + dims[None, :]
    mask = present[:, None] & (dims < SHAPE.head_dim)[None, :]
    key = tl.load(inputs.key_cache + offsets, mask=mask, other=0.0)
    value = tl.load(inputs.value_cache + offsets, mask=mask, other=0.0)
    return key, value


@triton.jit
def dot(left, right, start, WIDEN: tl.constexpr):
    """left @ right + start in float32. The interpreter multiplies no bfloat16: WIDEN it."""
    if WIDEN:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, start, input_precision="ieee")


@triton.jit
def finite_base(top):
    """A row that has seen no key yet has top -inf; -inf minus -inf must not happen."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def attend_tile(query, tile, visible, state, numbers, SHAPE: tl.constexpr):
    """The state after one more tile of keys; a row that sees none of it keeps its bits.

    query [block_rows, block_dim], tile a key and a value [block_keys, block_dim], visible
    [block_rows, block_keys], state a top and a total [block_rows] and a result of query's shape.
    """
    key, value = tile
    top, total, result = state
    zeros = tl.zeros((query.shape[0], key.shape[0]), tl.float32)
    scores = dot(query, tl.trans(key.to(query.dtype)), zeros, SHAPE.widen) * numbers.inner
    if SHAPE.has_softcap:
        decay = tl.exp2(tl.abs(scores) * -2.8853900817779268)  # e^(-2 |x|), so tanh overflows never
        size = (1.0 - decay) / (1.0 + decay) * numbers.outer
        scores = tl.where(scores < 0, -size, size)
    scores = tl.where(visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    base = finite_base(new_top)
    weights = tl.exp2(scores - base[:, None])
    kept = tl.exp2(top - base)
    total = total * kept + tl.sum(weights, 1)
    result = dot(
        weights.to(query.dtype), value.to(query.dtype), result * kept[:, None], SHAPE.widen
    )
    return new_top, total, result


@triton.jit
def fold(state, later):
    """The state of some splits and of the one after them as one; an empty one changes nothing."""
    top, total, result = state
    later_top, later_total, later_result = later
    new_top = tl.maximum(top, later_top)
    base = finite_base(new_top)
    first = tl.exp2(top - base)
    second = tl.exp2(later_top - base)
    result = result * first[:, None] + later_result * second[:, None]
    return new_top, total * first + later_total * second, result


@triton.jit
def select(chosen, state, other):
    """Row by row, `state` where `chosen` and `other` elsewhere."""
    top = tl.where(chosen, state[0], other[0])
    total = tl.where(chosen, state[1], other[1])
    return top, total, tl.where(chosen[:, None], state[2], other[2])


@triton.jit
def empty_state(SHAPE: tl.constexpr):
    ROWS: tl.constexpr = SHAPE.block_rows
    DIM: tl.constexpr = SHAPE.block_dim
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    return top, tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, DIM), tl.float32)


@triton.jit
def store_state(states, places, mask, state, SHAPE: tl.constexpr):
    """Put each row's state at its place, an index of [num_slots, num_rows, num_heads]."""
    tl.store(states.tops + places, state[0], mask=mask)
    tl.store(states.totals + places, state[1], mask=mask)
    offsets = places[:, None] * SHAPE.block_dim + tl.arange(0, SHAPE.block_dim)[None, :]
    tl.store(states.results + offsets, state[2], mask=mask[:, None])


@triton.jit
def load_state(states, places, mask, SHAPE: tl.constexpr):
    """What store_state put there; the empty state where the mask is false."""
    top = tl.load(states.tops + places, mask=mask, other=float("-inf"))
    total = tl.load(states.totals + places, mask=mask, other=0.0)
    offsets = places[:, None] * SHAPE.block_dim + tl.arange(0, SHAPE.block_dim)[None, :]
    return top, total, tl.load(states.results + offsets, mask=mask[:, None], other=0.0)


@triton.jit
def load_query(inputs, rows, heads, mask, numbers, SHAPE: tl.constexpr):
    """[block_rows, block_dim], zeros where the mask is false."""
    dims = tl.arange(0, SHAPE.block_dim)
    base = rows.to(tl.int64) * numbers.row_stride + heads * numbers.head_stride
    inside = mask[:, None] & (dims < SHAPE.head_dim)[None, :]
    return tl.load(inputs.query + base[:, None] + dims[None, :], mask=inside, other=0.0)


@triton.jit
def lowest_position(length, numbers, SHAPE: tl.constexpr):
    """The first position a row of `length` keys sees."""
    if SHAPE.has_window:
        return tl.maximum(length - numbers.window, 0)
    return length * 0


@triton.jit
def tile_rows(inputs, numbers, kv_head, chunk, SHAPE: tl.constexpr):
    """The sequence of this program's tile, and of each (row, head) pair its row, its head and
    whether it is one."""
    ROWS: tl.constexpr = SHAPE.block_rows // SHAPE.chunk
    GROUP: tl.constexpr = SHAPE.num_heads // SHAPE.num_kv_heads
    tile = tl.program_id(0)
    sequence = sequence_of(inputs.row_offsets, numbers.num_sequences, tile, ROWS, 1)
    begin = tl.load(inputs.row_offsets + sequence)
    count = tl.load(inputs.row_offsets + sequence + 1) - begin
    lanes = tl.arange(0, SHAPE.block_rows)
    index = (tile - begin // ROWS - sequence) * ROWS + lanes // SHAPE.chunk
    head = chunk * SHAPE.chunk + lanes % SHAPE.chunk
    valid = (index < count) & (lanes // SHAPE.chunk < ROWS) & (head < GROUP)
    return sequence, begin + index, kv_head * GROUP + head, valid


@triton.jit
def shared_split(
    inputs, table, kv_head, query, split, low, limit, valid, numbers, SHAPE: tl.constexpr
):
    """The states after the shared tiles of one split."""
    lowest = tl.min(tl.where(valid, low, 2147483647), 0)
    highest = tl.max(limit, 0)
    first = tl.maximum(split * SHAPE.split_keys, lowest // SHAPE.block_keys * SHAPE.block_keys)
    state = empty_state(SHAPE)
    for begin in range(
        first, tl.minimum((split + 1) * SHAPE.split_keys, highest), SHAPE.block_keys
    ):
        places = begin + tl.arange(0, SHAPE.block_keys)
        # Blocks behind every row's window may be gone, and those past the last key never were.
        present = (places >= lowest) & (places < highest)
        tile = load_tile(inputs, table, places, present, kv_head, SHAPE)
        visible = (places[None, :] >= low[:, None]) & (places[None, :] < limit[:, None])
        # A row that sees no key of the tile gets no weight of zero times what is not finite either.
        sees = (begin < limit) & (begin + SHAPE.block_keys > low)
        state = select(sees, attend_tile(query, tile, visible, state, numbers, SHAPE), state)
    return state


@triton.jit
def shared_kernel(inputs, plan, states, numbers, SHAPE: tl.constexpr):
    """Tiles of keys that a tile of rows shares: one split a program, or all of them in turn.

    Writes each row's state: of split s to slot s or, if serial, of its closed splits to slot 0 and
    of the split it leaves open to slot 1.
    """
    NUM_CHUNKS: tl.constexpr = SHAPE.num_chunks
    kv_head = tl.program_id(2) // NUM_CHUNKS
    sequence, rows, heads, valid = tile_rows(
        inputs, numbers, kv_head, tl.program_id(2) % NUM_CHUNKS, SHAPE
    )
    context = tl.load(inputs.context_lens + sequence)
    length = tl.load(plan.num_keys + rows, mask=valid, other=0)
    identity = tl.load(plan.identity + rows, mask=valid, other=0)
    limit = tl.where(valid, shared_limit(length, identity, context, SHAPE.block_keys), 0)
    low = lowest_position(length, numbers, SHAPE)
    first = tl.min(tl.where(valid, low, 2147483647), 0) // SHAPE.split_keys
    last = tl.cdiv(tl.max(limit, 0), SHAPE.split_keys)
    table = inputs.block_tables + sequence.to(tl.int64) * numbers.table_stride
    query = load_query(inputs, rows, heads, valid, numbers, SHAPE)
    places = rows * SHAPE.num_heads + heads
    slot_stride = numbers.num_rows * SHAPE.num_heads
    if SHAPE.serial:
        closed = empty_state(SHAPE)
        for split in range(first, last):
            state = shared_split(
                inputs, table, kv_head, query, split, low, limit, valid, numbers, SHAPE
            )
            leaves = (limit // SHAPE.split_keys == split) & valid
            store_state(states, places + slot_stride, leaves, state, SHAPE)
            full = limit >= (split + 1) * SHAPE.split_keys
            closed = select(full, fold(closed, state), closed)
        store_state(states, places, valid, closed, SHAPE)
    else:
        split = tl.program_id(1)
        if (split < first) | (split >= last):
            return
        state = shared_split(
            inputs, table, kv_head, query, split, low, limit, valid, numbers, SHAPE
        )
        mask = valid & (split * SHAPE.split_keys < limit)
        store_state(states, places + split * slot_stride, mask, state, SHAPE)


@triton.jit
def shared_state(states, places, mask, low, limit, numbers, SHAPE: tl.constexpr):
    """The states that the shared tiles left of a row: of its closed splits, of its open split."""
    slot_stride = numbers.num_rows * SHAPE.num_heads
    full = limit // SHAPE.split_keys
    limits = limit + places * 0  # Triton's interpreter cannot spread a single truth value
    shared = mask & (low < limits)
    opened = shared & (limits % SHAPE.split_keys != 0)
    if SHAPE.serial:
        closed = load_state(states, places, shared, SHAPE)
        state = load_state(states, places + slot_stride, opened, SHAPE)
    else:
        closed = empty_state(SHAPE)
        for split in range(low // SHAPE.split_keys, full):
            closed = fold(closed, load_state(states, places + split * slot_stride, mask, SHAPE))
        state = load_state(states, places + full * slot_stride, opened, SHAPE)
    return closed, state


@triton.jit
def finish_kernel(inputs, plan, states, output, numbers, SHAPE: tl.constexpr):
    """The keys of one row that it does not share, gathered, each at its place; then its output."""
    NUM_CHUNKS: tl.constexpr = SHAPE.num_chunks
    GROUP: tl.constexpr = SHAPE.num_heads // SHAPE.num_kv_heads
    row = tl.program_id(0)
    kv_head = tl.program_id(1) // NUM_CHUNKS
    lanes = tl.arange(0, SHAPE.block_rows)
    head = tl.program_id(1) % NUM_CHUNKS * SHAPE.chunk + lanes
    valid = (lanes < SHAPE.chunk) & (head < GROUP)
    heads = kv_head * GROUP + head
    sequence = tl.load(plan.sequences + row)
    context = tl.load(inputs.context_lens + sequence)
    length = tl.load(plan.num_keys + row)
    limit = shared_limit(length, tl.load(plan.identity + row), context, SHAPE.block_keys)
    low = lowest_position(length, numbers, SHAPE)
    table = inputs.block_tables + sequence.to(tl.int64) * numbers.table_stride
    order = plan.order + row.to(tl.int64) * numbers.order_stride - context
    query = load_query(inputs, row + lanes * 0, heads, valid, numbers, SHAPE)
    places = row * SHAPE.num_heads + heads
    closed, state = shared_state(states, places, valid, low, limit, numbers, SHAPE)
    start = tl.maximum(limit, low // SHAPE.block_keys * SHAPE.block_keys)
    for split in range(start // SHAPE.split_keys, tl.cdiv(length, SHAPE.split_keys)):
        first = tl.maximum(split * SHAPE.split_keys, start)
        last = tl.minimum((split + 1) * SHAPE.split_keys, length)
        for begin in range(first, last, SHAPE.block_keys):
            position = begin + tl.arange(0, SHAPE.block_keys)
            present = (position >= low) & (position < length)
            own = tl.load(order + position, mask=present & (position >= context), other=0)
            slots = tl.where(position < context, position, context + own)
            tile = load_tile(inputs, table, slots, present, kv_head, SHAPE)
            visible = present[None, :] & valid[:, None]
            state = attend_tile(query, tile, visible, state, numbers, SHAPE)
        closed = fold(closed, state)
        state = empty_state(SHAPE)
    total = tl.where(valid, closed[1], 1.0)
    result = closed[2] / total[:, None] * numbers.value_scale
    dims = tl.arange(0, SHAPE.block_dim)
    offsets = places.to(tl.int64)[:, None] * SHAPE.head_dim + dims[None, :]
    mask = valid[:, None] & (dims < SHAPE.head_dim)[None, :]
    tl.store(output + offsets, result.to(output.dtype.element_ty), mask=mask)
