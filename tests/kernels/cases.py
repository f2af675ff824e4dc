"""Small sessions for the attention tests: nodes with their own query, key and value, laid out at
random in a paged cache, and the bits that each row must have whatever its surroundings."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from specinfer_kernels import AttentionLayout, tree_attention, write_kv

WORD_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Geometry:
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 24
    block_size: int = 8
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Nodes:
    """Token nodes: query [n, num_heads, head_dim], key and value [n, num_kv_heads, head_dim]."""

    query: Tensor
    key: Tensor
    value: Tensor

    def __len__(self) -> int:
        return self.query.shape[0]

    def __getitem__(self, index: "slice | list[int]") -> "Nodes":
        return Nodes(self.query[index], self.key[index], self.value[index])


@dataclass(frozen=True)
class Session:
    """`context` is in the cache; `rows` are computed in this pass, row i under row parents[i]
    (-1: under the last context token)."""

    context: Nodes
    rows: Nodes
    parents: list[int]


class Attention(Protocol):
    def __call__(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        layout: AttentionLayout,
        *,
        scale: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor: ...


def random_nodes(count: int, geometry: Geometry, seed: int) -> Nodes:
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int) -> Tensor:
        values = torch.randn(count, heads, geometry.head_dim, generator=generator)
        return values.to(geometry.dtype)

    kv_heads = geometry.num_kv_heads
    return Nodes(draw(geometry.num_heads), draw(kv_heads), draw(kv_heads))


def join(first: Nodes, second: Nodes) -> Nodes:
    return Nodes(
        torch.cat((first.query, second.query)),
        torch.cat((first.key, second.key)),
        torch.cat((first.value, second.value)),
    )


def chain(count: int) -> list[int]:
    return list(range(-1, count - 1))


def ancestor_masks(parents: list[int]) -> list[int]:
    masks: list[int] = []
    for index, parent in enumerate(parents):
        masks.append((masks[parent] if parent >= 0 else 0) | (1 << index))
    return masks


def ancestor_words(masks: list[int], num_words: int) -> list[list[int]]:
    """Signed 64-bit words, lowest first."""
    rows = []
    for mask in masks:
        words = [(mask >> (64 * word)) & WORD_MASK for word in range(num_words)]
        rows.append([word - (1 << 64) if word >> 63 else word for word in words])
    return rows


@dataclass(frozen=True)
class Batch:
    """The arguments of one call of the op."""

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    layout: AttentionLayout


def lay_out(sessions: list[Session], geometry: Geometry, seed: int, spare: int = 0) -> Batch:
    """Sessions in one ragged batch over shuffled pages; unused slots hold NaN, `spare` unused
    columns of the block table hold -1."""
    generator = torch.Generator().manual_seed(seed)
    size = geometry.block_size
    needed = [-(-(len(s.context) + len(s.rows)) // size) for s in sessions]
    order = torch.randperm(sum(needed) + 3, generator=generator).int()
    tables = torch.full((len(sessions), max(needed) + spare), -1, dtype=torch.int32)
    shape = (len(order), size, geometry.num_kv_heads, geometry.head_dim)
    key_cache = torch.full(shape, torch.nan, dtype=geometry.dtype)
    value_cache = key_cache.clone()
    most_rows = max(len(session.rows) for session in sessions)
    num_words = -(-most_rows // 64) or 1
    offsets, words, taken = [0], [], 0
    for index, session in enumerate(sessions):
        tables[index, : needed[index]] = order[taken : taken + needed[index]]
        taken += needed[index]
        nodes = join(session.context, session.rows)
        logical = torch.arange(len(nodes))
        slots = tables[index].long()[logical // size] * size + logical % size
        write_kv(nodes.key, nodes.value, key_cache, value_cache, slots)
        offsets.append(offsets[-1] + len(session.rows))
        words += ancestor_words(ancestor_masks(session.parents), num_words)
    layout = AttentionLayout(
        row_offsets=torch.tensor(offsets, dtype=torch.int32),
        context_lens=torch.tensor([len(s.context) for s in sessions], dtype=torch.int32),
        block_tables=tables,
        ancestors=torch.tensor(words, dtype=torch.int64).view(-1, num_words),
    )
    query = torch.cat([session.rows.query for session in sessions])
    return Batch(query, key_cache, value_cache, layout)


def attend(
    sessions: list[Session],
    geometry: Geometry,
    attention: Attention = tree_attention,
    *,
    seed: int = 0,
    spare: int = 0,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> list[Tensor]:
    """Outputs of each session, [num_rows, num_heads, head_dim]."""
    batch = lay_out(sessions, geometry, seed, spare)
    output = attention(
        batch.query,
        batch.key_cache,
        batch.value_cache,
        batch.layout,
        scale=geometry.head_dim**-0.5,
        sliding_window=sliding_window,
        softcap=softcap,
    )
    return list(output.split([len(session.rows) for session in sessions]))


def random_tree(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    parents = [-1]
    for index in range(1, count):
        lowest = max(-1, index - 5)
        parents.append(int(torch.randint(lowest, index, (1,), generator=generator)))
    return parents


def path_in_tree(path_length: int, others: int, seed: int) -> tuple[list[int], list[int]]:
    """A tree that holds a chain among `others` distracting nodes, in a random topological order:
    the parents, and the places of the chain's nodes."""
    generator = torch.Generator().manual_seed(seed)
    on_path = torch.zeros(path_length + others, dtype=torch.bool)
    on_path[torch.randperm(path_length + others, generator=generator)[:path_length]] = True
    parents: list[int] = []
    places: list[int] = []
    for index, chosen in enumerate(on_path.tolist()):
        if chosen:
            parents.append(places[-1] if places else -1)
            places.append(index)
        else:
            parents.append(int(torch.randint(-1, index, (1,), generator=generator)))
    return parents, places


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Equality of bits: tells -0 from 0, and NaN equals itself."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    kind = kinds[first.element_size()]
    return first.shape == second.shape and torch.equal(
        first.contiguous().view(kind), second.contiguous().view(kind)
    )


@dataclass(frozen=True)
class Form:
    """One way to compute the tokens from `start` on of a path: the session at `index` holds them
    at its rows `places`."""

    name: str
    sessions: list[Session]
    index: int
    places: list[int]
    start: int
    seed: int = 3
    spare: int = 0


def _prefill(name: str, path: Nodes, start: int, seed: int = 3, spare: int = 0) -> Form:
    count = len(path) - start
    session = Session(path[:start], path[start:], chain(count))
    return Form(name, [session], 0, list(range(count)), start, seed, spare)


def _tree(path: Nodes, back: int, others: int, geometry: Geometry, seed: int) -> Session:
    """The last `back` tokens of the path in a tree with `others` more nodes."""
    parents, places = path_in_tree(back, others, seed)
    rows = random_nodes(len(parents), geometry, seed=5)
    rows.query[places] = path.query[-back:]
    rows.key[places] = path.key[-back:]
    rows.value[places] = path.value[-back:]
    return Session(path[: len(path) - back], rows, parents)


def all_forms(path: Nodes, geometry: Geometry) -> list[Form]:
    length = len(path)
    noise = random_nodes(60, geometry, seed=2)
    other = Session(noise[:13], noise[13:40], random_tree(27, seed=6))
    long_other = Session(noise[:0], noise, chain(60))
    forms = [
        _prefill("prefill", path, 0),
        _prefill("shuffled pages", path, 0, seed=99),
        _prefill("longer block table", path, 5, spare=7),
    ]
    for start in (1, 20, length // 2, length - 7):
        form = _prefill(f"prefill from {start}", path, start)
        forms.append(form)
        sessions = [other, *form.sessions, long_other]
        forms.append(Form(f"ragged batch from {start}", sessions, 1, form.places, start))
    for seed, (back, others) in enumerate([(9, 4), (9, 40), (30, 30), (length, 70)]):
        session = _tree(path, back, others, geometry, seed)
        places = path_in_tree(back, others, seed)[1]
        name = f"tree of {back} + {others}"
        forms.append(Form(name, [other, session], 1, places, length - back, seed))
    return forms


def differing_forms(
    attention: Attention,
    geometry: Geometry,
    *,
    length: int,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> list[str]:
    """Names of the forms in which some row of a sequence of `length` tokens has other bits than
    in plain decoding, where it is alone in its pass. Empty for a row-invariant op."""
    path = random_nodes(length, geometry, seed=1)

    def run(sessions: list[Session], seed: int, spare: int = 0) -> list[Tensor]:
        return attend(
            sessions,
            geometry,
            attention,
            seed=seed,
            spare=spare,
            sliding_window=sliding_window,
            softcap=softcap,
        )

    plain = torch.cat(
        [run([Session(path[:t], path[t : t + 1], [-1])], seed=t)[0] for t in range(length)]
    )
    failed = []
    for form in all_forms(path, geometry):
        got = run(form.sessions, form.seed, form.spare)[form.index][form.places]
        if not same_bits(got, plain[form.start :]):
            failed.append(form.name)
    return failed
