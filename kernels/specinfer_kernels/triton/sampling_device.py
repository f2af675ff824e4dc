"""Device code of the draw: thresholds by counting, and the seeded noise, in passes over one row.

A float's bits, read as an integer with the sign turned, rise as the float does. So the k-th largest
logit, or the logit at which a mass is reached, is the largest integer above which enough lies, and
sixteen candidates a pass find its 32 bits in eight passes; nothing is sorted. The noise is made by
the operations of `reference.gumbel_from_words`, one by one, so it has the same bits. Knows pointers
and sizes only.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Laws(NamedTuple):
    """Pointers: one value a row, see `law_sampling.Laws`."""

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any


@triton.jit
def mix(words):
    """The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014) on uint64."""
    words = (words ^ (words >> 30)) * 0xBF58476D1CE4E5B9
    words = (words ^ (words >> 27)) * 0x94D049BB133111EB
    return words ^ (words >> 31)


@triton.jit
def exact_log(value):
    """As reference.exact_log, operation by operation: fdlibm's e_log.c on float64."""
    bits = value.to(tl.int64, bitcast=True)
    exponent = (bits - 0x3FE6A09E00000000) >> 52
    power = exponent.to(tl.float64)
    fraction = (bits - (exponent << 52)).to(tl.float64, bitcast=True) - 1.0
    ratio = fraction / (fraction + 2.0)
    square = ratio * ratio
    fourth = square * square
    even = fourth * 1.531383769920937332e-01 + 2.222219843214978396e-01
    even = fourth * (fourth * even + 3.999999999940941908e-01)
    odd = fourth * 1.479819860511658591e-01 + 1.818357216161805012e-01
    odd = fourth * odd + 2.857142874366239149e-01
    odd = square * (fourth * odd + 6.666666666666735130e-01)
    half = fraction * 0.5 * fraction
    low = ratio * (half + (even + odd)) + power * 1.90821492927058770002e-10
    return ((low - half) + fraction) + power * 6.93147180369123816490e-01


@triton.jit
def gumbel(state, token):
    """float64 noise of tokens from the row's state; see reference.counter_hash."""
    words = mix(state + (token + 1).to(tl.uint64) * 0x9E3779B97F4A7C15)
    uniform = ((words >> 11) | 1).to(tl.int64).to(tl.float64) * 1.1102230246251565e-16
    return -exact_log(-exact_log(uniform))


@triton.jit
def key_of(value):
    """int64 in 0 .. 2^32 - 1 that rises with a float32; equal for equal floats."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)  # a negative zero is zero
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648


@triton.jit
def load_scaled(row, begin, vocab_size, heat, BLOCK: tl.constexpr):
    """Tokens of a block and their logits over the temperature; -inf past the end and for NaN."""
    token = begin + tl.arange(0, BLOCK)
    value = tl.load(row + token, mask=token < vocab_size, other=float("-inf"))
    value = tl.where(value == value, value, float("-inf"))
    return token, tl.div_rn(value, heat + tl.zeros((BLOCK,), tl.float32))


@triton.jit
def weight_of(value, best):
    """float64 exp(value - best); 0 for -inf."""
    return tl.exp(value.to(tl.float64) - best.to(tl.float64))


@triton.jit
def above(row, vocab_size, heat, best, least, floors, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """float64 [16]: for each floor, the mass or number of tokens with a key of at least it.

    Tokens with keys below `least` do not count.
    """
    sums = tl.zeros((16,), tl.float64)
    for begin in range(0, vocab_size, BLOCK):
        token, value = load_scaled(row, begin, vocab_size, heat, BLOCK)
        key = key_of(value)
        counts = (token < vocab_size) & (key >= least)
        weight = weight_of(value, best) if MASS else tl.full((BLOCK,), 1.0, tl.float64)
        weight = tl.where(counts, weight, 0.0)
        sums += tl.sum(tl.where(key[None, :] >= floors[:, None], weight[None, :], 0.0), 1)
    return sums


@triton.jit
def threshold(row, vocab_size, heat, best, least, wanted, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key at or above which the mass or number of tokens is at least `wanted`."""
    found = tl.zeros((16,), tl.int64)
    steps = tl.arange(0, 16).to(tl.int64)
    for digit in range(8):
        floors = found + (steps << (28 - 4 * digit))
        enough = above(row, vocab_size, heat, best, least, floors, MASS, BLOCK) >= wanted
        step = tl.max(tl.where(enough, steps, 0), 0)
        found += step << (28 - 4 * digit)
    return tl.max(found, 0)


@triton.jit
def rest_of(
    row, vocab_size, heat, best, least, key, wanted, MASS: tl.constexpr, BLOCK: tl.constexpr
):
    """What of `wanted` is left for the tokens of exactly this key, in mass or number."""
    floors = tl.full((16,), key + 1, tl.int64)
    return wanted - tl.max(above(row, vocab_size, heat, best, least, floors, MASS, BLOCK), 0)


@triton.jit
def top_k_cut(row, vocab_size, heat, best, top_k, BLOCK: tl.constexpr):
    """A cut: keys below its floor are out, of those equal to its edge the first `ties` are in."""
    floor = tl.full((), 0, tl.int64)
    edge = tl.full((), -1, tl.int64)
    ties = tl.full((), 0.0, tl.float64)
    if (top_k > 0) & (top_k < vocab_size):
        wanted = top_k.to(tl.float64)
        floor = threshold(row, vocab_size, heat, best, 0, wanted, False, BLOCK)
        edge = floor
        ties = rest_of(row, vocab_size, heat, best, 0, floor, wanted, False, BLOCK)
    return floor, edge, ties


@triton.jit
def top_p_cut(row, vocab_size, heat, best, top_p, cut, BLOCK: tl.constexpr):
    """The cut at a share of the mass that an earlier cut leaves."""
    floor, edge, ties = cut
    # The tokens of the edge that top-k leaves out have no mass here.
    edge_value = edge_weight(row, vocab_size, heat, best, edge, BLOCK)
    lowest = tl.zeros((16,), tl.int64)
    inner = tl.max(above(row, vocab_size, heat, best, edge + 1, lowest, True, BLOCK), 0)
    wanted = top_p * (inner + ties * edge_value)
    found = threshold(row, vocab_size, heat, best, edge + 1, wanted, True, BLOCK)
    if inner >= wanted:
        left = rest_of(row, vocab_size, heat, best, edge + 1, found, wanted, True, BLOCK)
        weight = edge_weight(row, vocab_size, heat, best, found, BLOCK)
        floor = found
        edge = found
        ties = tl.maximum(tl.ceil(left / weight), 1.0)
    else:
        ties = tl.minimum(ties, tl.maximum(tl.ceil((wanted - inner) / edge_value), 0.0))
    return floor, edge, ties


@triton.jit
def sample_kernel(
    logits, laws, seeds, positions, tokens, row_stride, vocab_size, BLOCK: tl.constexpr
):
    """One program a row: thresholds by the row's law, then the best of logit and noise."""
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * row_stride
    temperature = tl.load(laws.temperature + index)
    greedy = temperature == 0.0
    heat = tl.where(greedy, 1.0, temperature)
    best = float("-inf")
    for begin in range(0, vocab_size, BLOCK):
        _, value = load_scaled(row, begin, vocab_size, heat, BLOCK)
        best = tl.maximum(best, tl.max(value, 0))
    empty = best == float("-inf")
    best = tl.where(empty, 0.0, best)
    top_k = tl.where(greedy, 0, tl.load(laws.top_k + index))
    floor, edge, ties = top_k_cut(row, vocab_size, heat, best, top_k, BLOCK)
    top_p = tl.load(laws.top_p + index)
    if (top_p < 1.0) & (greedy == 0) & (empty == 0):
        cut = (floor, edge, ties)
        floor, edge, ties = top_p_cut(row, vocab_size, heat, best, top_p, cut, BLOCK)
    min_p = tl.load(laws.min_p + index)
    limited = (min_p > 0.0) & (greedy == 0)
    least = best.to(tl.float64) + tl.log(tl.where(limited, min_p, 1.0))
    least = tl.where(limited, least, float("-inf"))
    seed = tl.load(seeds + index).to(tl.uint64)
    state = mix(seed + 0x9E3779B97F4A7C15)  # purpose TARGET is 1
    state = mix(state ^ tl.load(positions + index).to(tl.uint64))
    top = tl.full((), float("-inf"), tl.float64)
    chosen = tl.full((), 0, tl.int64)
    seen = tl.full((), 0.0, tl.float64)
    for begin in range(0, vocab_size, BLOCK):
        token, value = load_scaled(row, begin, vocab_size, heat, BLOCK)
        key = key_of(value)
        on_edge = (key == edge) & (token < vocab_size)
        rank = seen + tl.cumsum(on_edge.to(tl.float64), 0)
        seen += tl.sum(on_edge.to(tl.float64), 0)
        kept = (key >= floor) & ((key != edge) | (rank <= ties)) & (value.to(tl.float64) >= least)
        score = value.to(tl.float64)
        if greedy == 0:
            score += gumbel(state, token.to(tl.int64))
        score = tl.where(kept & (token < vocab_size), score, float("-inf"))
        block_top = tl.max(score, 0)
        first = tl.min(tl.where(score == block_top, token, vocab_size), 0).to(tl.int64)
        chosen = tl.where(block_top > top, first, chosen)
        top = tl.maximum(top, block_top)
    tl.store(tokens + index, chosen)


@triton.jit
def edge_weight(row, vocab_size, heat, best, key, BLOCK: tl.constexpr):
    """float64 weight of a token with exactly this key; 0 where there is none."""
    weight = tl.full((), 0.0, tl.float64)
    for begin in range(0, vocab_size, BLOCK):
        token, value = load_scaled(row, begin, vocab_size, heat, BLOCK)
        same = (key_of(value) == key) & (token < vocab_size)
        weight = tl.maximum(weight, tl.max(tl.where(same, weight_of(value, best), 0.0), 0))
    return weight
