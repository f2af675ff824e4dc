"""Every op in plain torch: the definition, and the fallback where nothing faster can run.

Two rules make these row-invariant, that is, a row's bits depend on that row alone:

- every sum is a chain of separate elementwise multiplications and additions in a fixed order, so
  no library picks another order for another shape, stride or number of threads;
- `exp` and `tanh` for 16- and 32-bit inputs are taken in float64 and rounded once, so that a last
  bit which differs between the vector body and the tail of a library loop does not survive.

Knows tensors only: no model, no session, no scheduler. Works on any device.
"""

import itertools
import math

import torch
from torch import Tensor
from torch.nn import functional

WORD_BITS = 64
# Keys and values in one byte (Micikevicius et al., 2022), without infinities.
FLOAT8 = torch.float8_e4m3fn
FLOAT8_LARGEST = 448.0
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_FIRST = 0xBF58476D1CE4E5B9
_MIX_SECOND = 0x94D049BB133111EB
# Elements of one gathered block of keys; only memory depends on it, never a result.
_GATHER_LIMIT = 1 << 22


def join_words(words: list[int]) -> int:
    """The bit set of signed 64-bit words, lowest word first, as one non-negative int."""
    mask = (1 << WORD_BITS) - 1
    return sum((word & mask) << (WORD_BITS * index) for index, word in enumerate(words))


def ordered_slots(
    row_offsets: Tensor, context_lens: Tensor, ancestors: Tensor, num_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The keys of every row in position order.

    Returns `sequences` int64 [num_rows], the sequence of each row; `slots` int64
    [num_rows, max_keys], logical slots in position order (0 past the end of a list); `num_keys`
    int64 [num_rows].
    """
    device = ancestors.device
    rows = torch.arange(num_rows, device=device)
    sequences = torch.searchsorted(row_offsets[1:].long().contiguous(), rows, right=True)
    shifts = torch.arange(WORD_BITS, device=device)
    bits = ((ancestors[:, :, None] >> shifts) & 1).flatten(1)  # [num_rows, num_words * 64]
    own_rows = torch.sort(bits, dim=1, descending=True, stable=True).indices
    context = context_lens.long()[sequences]
    num_keys = context + bits.sum(1)
    max_keys = int(num_keys.max()) if num_rows else 0
    place = torch.arange(max_keys, device=device).expand(num_rows, max_keys)
    own_place = (place - context[:, None]).clamp(0, bits.shape[1] - 1)
    own = context[:, None] + torch.gather(own_rows, 1, own_place)
    slots = torch.where(place < context[:, None], place, own)
    return sequences, torch.where(place < num_keys[:, None], slots, 0), num_keys


def tree_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    row_offsets: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    ancestors: Tensor,
    *,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> Tensor:
    """Attention of every row over its own keys in position order; shapes as in the op."""
    num_rows, head_dim = query.shape[0], query.shape[2]
    block_size, num_kv_heads = key_cache.shape[1], key_cache.shape[2]
    sequences, slots, num_keys = ordered_slots(row_offsets, context_lens, ancestors, num_rows)
    blocks = torch.gather(block_tables.long()[sequences], 1, slots // block_size)
    physical = blocks * block_size + slots % block_size  # [num_rows, max_keys]
    place = torch.arange(slots.shape[1], device=query.device)
    visible = place < num_keys[:, None]
    if sliding_window is not None:
        visible &= num_keys[:, None] - 1 - place < sliding_window
    physical = torch.where(visible, physical, 0)  # a block behind the window may be gone
    output = torch.zeros_like(query, memory_format=torch.contiguous_format)
    chunk = max(1, _GATHER_LIMIT // max(1, slots.shape[1] * num_kv_heads * head_dim))
    for start in range(0, num_rows, chunk):
        part = slice(start, start + chunk)
        keys = key_cache.flatten(0, 1)[physical[part]]
        values = value_cache.flatten(0, 1)[physical[part]]
        output[part] = _attend(
            query[part], keys, values, visible[part], scale * key_scale, value_scale, softcap
        )
    return output


def _attend(
    query: Tensor,  # [rows, num_heads, head_dim]
    keys: Tensor,  # [rows, keys, num_kv_heads, head_dim], in position order
    values: Tensor,
    visible: Tensor,  # bool [rows, keys]
    scale: float,
    value_scale: float,
    softcap: float | None,
) -> Tensor:
    """softmax(q k^T) v, each sum in one fixed sequence of roundings."""
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
    rows, num_heads, head_dim = query.shape
    num_kv_heads = keys.shape[2]
    grouped = query.to(accumulate).view(rows, 1, num_kv_heads, num_heads // num_kv_heads, head_dim)
    keys = keys.to(accumulate)[:, :, :, None, :]
    scores = grouped.new_zeros(rows, keys.shape[1], num_kv_heads, grouped.shape[3])
    for dim in range(head_dim):
        scores += grouped[..., dim] * keys[..., dim]
    scores *= scale
    if softcap is not None:
        scores = (torch.tanh(scores.double() / softcap) * softcap).to(accumulate)
    seen = visible[:, :, None, None]
    scores = scores.masked_fill(~seen, -math.inf)
    weights = torch.exp((scores - scores.amax(1, keepdim=True)).double()).to(accumulate)
    total = torch.zeros_like(weights[:, 0])
    result = torch.zeros_like(grouped[:, 0])
    for place in range(keys.shape[1]):
        # `where` and not a zero weight: an unseen slot may hold anything, infinities included.
        product = weights[:, place, :, :, None] * values[:, place, :, None, :].to(accumulate)
        result = torch.where(seen[:, place, :, :, None], result + product, result)
        total += weights[:, place]
    result = result / total[..., None] * value_scale
    return result.view(rows, num_heads, head_dim).to(query.dtype)


def write_kv(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> None:
    """Put each row's key and value into its slot, as float8 over the scale if the caches are."""
    for rows, cache, scale in ((key, key_cache, key_scale), (value, value_cache, value_scale)):
        if cache.dtype == FLOAT8:
            rows, cache = to_float8(rows, scale).view(torch.uint8), cache.view(torch.uint8)
        cache.view(-1, *cache.shape[2:]).index_copy_(0, slot_mapping, rows)


def to_float8(values: Tensor, scale: float) -> Tensor:
    """values / scale as float8_e4m3fn: to nearest, ties to even, no further than its largest.

    Multiplied by the inverse, so that it is one operation on every device. NaN stays NaN.
    """
    return (values.float() * (1.0 / scale)).clamp(-FLOAT8_LARGEST, FLOAT8_LARGEST).to(FLOAT8)


def rms_norm(values: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Each row over its root mean square, rounded, times the weight, as the stock modules do it."""
    wide = values.to(torch.float32)
    square = wide.pow(2).mean(-1, keepdim=True)
    normed = wide * torch.rsqrt(square.add_(epsilon))
    return weight * normed.to(values.dtype)


def add_rms_norm(hidden: Tensor, update: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """hidden += update, then its norm."""
    return rms_norm(hidden.add_(update), weight, epsilon)


def silu_multiply(gate_up: Tensor) -> Tensor:
    """silu(gate) * up; the exponential in float64, rounded once."""
    gate, up = gate_up.chunk(2, 1)
    return functional.silu(gate.double()).to(gate.dtype) * up


def rotate_and_write_kv(
    mixed: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    cosines: Tensor,
    sines: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    epsilon: float,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> Tensor:
    """Norm of each head if there are weights, then its turn; keys and values into their slots."""
    num_kv_heads, head_dim = key_cache.shape[2:]
    heads = mixed.view(mixed.shape[0], -1, head_dim)
    num_heads = heads.shape[1] - 2 * num_kv_heads
    query, key, value = heads.split((num_heads, num_kv_heads, num_kv_heads), 1)
    if query_weight is not None and key_weight is not None:
        query, key = rms_norm(query, query_weight, epsilon), rms_norm(key, key_weight, epsilon)
    # [num_rows, 1, head_dim]
    cosine, sine = cosines[positions].unsqueeze(1), sines[positions].unsqueeze(1)
    turned = _turned(key, cosine, sine)
    write_kv(turned, value, key_cache, value_cache, slot_mapping, key_scale, value_scale)
    return _turned(query, cosine, sine)


def _turned(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions (Su et al., 2021): halves of a head swap places, one changes its sign."""
    first, second = heads.chunk(2, 2)
    return heads * cosine + torch.cat((-second, first), 2) * sine


def compact_kv(pool: Tensor, sources: Tensor, targets: Tensor) -> None:
    """Copy slots to slots in every layer; all sources are read before any target is written."""
    slots = pool.view(pool.shape[0], 2, -1, *pool.shape[4:])
    slots.index_copy_(2, targets, slots.index_select(2, sources))


def copy_blocks(pool: Tensor, sources: Tensor, targets: Tensor) -> None:
    """Copy whole blocks to blocks in every layer; all sources are read first."""
    pool.index_copy_(2, targets, pool.index_select(2, sources))


def signed(word: int) -> int:
    """The int64 that has the bits of the unsigned 64-bit `word`."""
    word &= (1 << WORD_BITS) - 1
    return word - (1 << WORD_BITS) if word >> (WORD_BITS - 1) else word


def _shift_right(words: Tensor, count: int) -> Tensor:
    """Logical shift: torch shifts signed words arithmetically, so the sign bits are cleared."""
    return (words >> count) & ((1 << (WORD_BITS - count)) - 1)


def _mix(words: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), wrapping in int64."""
    words = (words ^ _shift_right(words, 30)) * signed(_MIX_FIRST)
    words = (words ^ _shift_right(words, 27)) * signed(_MIX_SECOND)
    return words ^ _shift_right(words, 31)


def counter_hash(seed: Tensor, position: Tensor, purpose: int, vocab_size: int) -> Tensor:
    """int64 [n, vocab_size]: the splitmix64 stream of the state mixed from seed, purpose, position.

    With mix the splitmix64 finaliser and G its odd constant, all modulo 2^64:
    state = mix(mix(seed + G * purpose) ^ position), word_v = mix(state + G * (v + 1)).
    """
    golden = signed(_GOLDEN)
    state = _mix(_mix(seed + signed(_GOLDEN * purpose)) ^ position)
    token = torch.arange(1, vocab_size + 1, device=seed.device)
    return _mix(state[:, None] + token * golden)


def exact_log(value: Tensor) -> Tensor:
    """Natural logarithm of positive normal float64, the same bits on every device.

    The algorithm of fdlibm's e_log.c as separate IEEE operations (error below one unit in the
    last place). Library logarithms differ in the last bit between devices and between the vector
    body and the tail of one array.
    """
    bits = value.contiguous().view(torch.int64)
    exponent = (bits - 0x3FE6A09E00000000) >> 52  # mantissa in [sqrt(1/2), sqrt(2))
    power = exponent.double()
    fraction = (bits - (exponent << 52)).view(torch.float64) - 1.0
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


def gumbel_from_words(words: Tensor) -> Tensor:
    """float64 standard Gumbel noise from int64 words.

    u is the top 53 bits with the lowest of them set, times 2^-53: never 0 and never 1.
    """
    uniform = (_shift_right(words, 11) | 1).double() * 2.0**-53
    return -exact_log(-exact_log(uniform))


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab_size: int, purpose: int) -> Tensor:
    """float64 [n, vocab_size] of standard Gumbel noise."""
    return gumbel_from_words(counter_hash(seeds, positions, purpose, vocab_size))


def sample_gumbel(logits: Tensor, noise: Tensor, greedy: Tensor) -> Tensor:
    """int64 [n]: lowest index among the largest of logits + noise (logits alone where greedy)."""
    scores = logits.double()
    scores = torch.where(greedy[:, None], scores, scores + noise)
    scores = torch.where(scores.isnan(), -math.inf, scores)
    best = scores.amax(1, keepdim=True)
    token = torch.arange(scores.shape[1], device=scores.device)
    return torch.where(scores == best, token, scores.shape[1]).amin(1)


def draw_row(law: Tensor, noise: Tensor | None) -> int | None:
    """Index of the first of the largest of law + noise, [vocab_size]; None where law has a NaN."""
    if bool(law.isnan().any()):
        return None
    if noise is None:
        return int(law.argmax())
    return int(sample_gumbel(law[None], noise[None], torch.zeros_like(law[:1], dtype=torch.bool)))


def rank_tokens(z: Tensor, count: int, spread: float) -> Tensor:
    """float64 [2, n, count]: the largest of each row and their log softmax(z / spread)."""
    if spread != 1.0:
        z = z / spread
    top = torch.topk(z, count, dim=1)
    log_scores = top.values - torch.logsumexp(z, 1, keepdim=True)
    return torch.stack((top.indices.double(), log_scores.double()))


def walk_trees(
    draws: Tensor, token_ids: Tensor, parents: Tensor, row_offsets: Tensor, max_depth: int
) -> Tensor:
    """int64 [num_trees, 2 + max_depth]: accepted nodes, tail, path; see the op."""
    offsets = row_offsets.tolist()
    walks = []
    for begin, end in itertools.pairwise(offsets):
        drawn, carried = draws[begin:end].tolist(), token_ids[begin:end].tolist()
        above = parents[begin:end].tolist()
        node, path = 0, list[int]()
        while len(path) < max_depth:
            children = (at for at in range(node + 1, end - begin) if above[at] == node)
            found = next((at for at in children if carried[at] == drawn[node]), None)
            if found is None:
                break
            path.append(found)
            node = found
        walks.append([len(path), drawn[node], *path, *[-1] * (max_depth - len(path))])
    result = torch.tensor(walks, dtype=torch.int64, device=draws.device)
    return result.view(len(offsets) - 1, 2 + max_depth)
