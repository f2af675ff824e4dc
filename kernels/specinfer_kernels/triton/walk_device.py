"""Device code of the MATCH walk. Knows pointers and sizes only."""

import triton
import triton.language as tl

_NONE = tl.constexpr(2147483647)


@triton.jit
def first_child(parents, token_ids, begin, size, node, token, BLOCK: tl.constexpr):
    """The first child of a node that carries the token, or _NONE; children come after parents."""
    found = tl.full((), _NONE, tl.int32)
    for start in range(node + 1, size, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < size
        parent = tl.load(parents + begin + place, mask=inside, other=-2)
        carried = tl.load(token_ids + begin + place, mask=inside, other=-1)
        fits = inside & (parent == node) & (carried == token)
        found = tl.minimum(found, tl.min(tl.where(fits, place, _NONE), 0))
    return found


@triton.jit
def walk_kernel(draws, token_ids, parents, row_offsets, walks, max_depth, BLOCK: tl.constexpr):
    """One program a tree: down from the root as long as the draw was guessed."""
    tree = tl.program_id(0)
    begin = tl.load(row_offsets + tree)
    size = tl.load(row_offsets + tree + 1) - begin
    walk = walks + tree.to(tl.int64) * (2 + max_depth)
    node = tl.full((), 0, tl.int32)
    length = tl.full((), 0, tl.int32)
    token = tl.load(draws + begin)
    for depth in range(max_depth):
        # Once nothing was found, `node` is _NONE and no row lies behind it.
        child = first_child(parents, token_ids, begin, size, node, token, BLOCK)
        going = (child != _NONE) & (length == depth)
        tl.store(walk + 2 + depth, tl.where(going, child, -1).to(tl.int64))
        length += going.to(tl.int32)
        node = tl.where(going, child, size)
        token = tl.load(draws + begin + child, mask=going, other=token)
    tl.store(walk, length.to(tl.int64))
    tl.store(walk + 1, token)
