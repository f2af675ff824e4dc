"""A whole decoder on the path of a GPU, through Triton's interpreter: tokens computed one by one,
as a prompt, and in a tree beside another session have logits of the same bits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from specinfer_kernels import (
    AttentionLayout,
    DecoderLayer,
    DecoderRows,
    DecoderStack,
    HeadNorms,
    LayerCaches,
    RowNorm,
    decoder_logits,
    pack_linear,
)
from tests.kernels.cases import ancestor_masks, ancestor_words, chain, path_in_tree, same_bits
from tests.kit.triton_interpreter import take_triton

pytest.importorskip("triton")

from specinfer_kernels.triton import linear as launcher
from specinfer_kernels.triton.runtime import is_interpreting

pytestmark = pytest.mark.skipif(not is_interpreting(), reason="Triton compiles in this process")

WIDTH, INNER, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 48, 80, 2, 1, 16
NUM_BLOCKS, BLOCK_SIZE, VOCABULARY = 12, 4, 64
LENGTH, PREFILLED = 5, 2


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every op take Triton by itself where it has a kernel, as it does on CUDA."""
    take_triton(monkeypatch)


def random_stack(dtype: torch.dtype) -> DecoderStack:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def linear(inputs: int, outputs: int) -> Any:
        weight = (draw(outputs, inputs) * inputs**-0.5).to(dtype)
        return pack_linear(weight, draw(outputs).to(dtype), layout="triton")

    def norm() -> RowNorm:
        return RowNorm((1 + draw(WIDTH) / 4).to(dtype), 1e-5)

    layers = [
        DecoderLayer(
            attention_norm=norm(),
            head_norms=HeadNorms(draw(HEAD_DIM).to(dtype), draw(HEAD_DIM).to(dtype), 1e-6),
            query_key_value=linear(WIDTH, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM),
            output=linear(NUM_HEADS * HEAD_DIM, WIDTH),
            mlp_norm=norm(),
            gate_up=linear(WIDTH, 2 * INNER),
            down=linear(INNER, WIDTH),
            scale=HEAD_DIM**-0.5,
        )
        for _ in range(2)
    ]
    angles = torch.arange(32)[:, None] * 0.5 ** torch.arange(HEAD_DIM // 2)
    angles = torch.cat((angles, angles), 1)
    return DecoderStack(
        draw(VOCABULARY, WIDTH).to(dtype),
        angles.cos().to(dtype),
        angles.sin().to(dtype),
        tuple(layers),
        norm(),
        linear(WIDTH, VOCABULARY),
        NUM_HEADS,
        NUM_KV_HEADS,
        HEAD_DIM,
    )


def random_tokens(count: int, seed: int) -> Tensor:
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Part:
    """One session's rows of a pass: its blocks, its context, their tokens and parents."""

    table: tuple[int, ...]
    context: int
    token_ids: Tensor
    parents: list[int]


TABLE, OTHER_TABLE = (5, 2, 9, 0), (1, 11)


def compute(stack: DecoderStack, caches: LayerCaches, parts: list[Part]) -> list[Tensor]:
    """The logits of each part's rows; keys and values are in the caches then."""
    words, positions, slots, offsets = [], [], [], [0]
    tables = torch.zeros(len(parts), len(TABLE), dtype=torch.int32)
    for index, part in enumerate(parts):
        masks = ancestor_masks(part.parents)
        words += ancestor_words(masks, 1)
        positions += [part.context + mask.bit_count() - 1 for mask in masks]
        for place in range(part.context, part.context + len(masks)):
            slots.append(part.table[place // BLOCK_SIZE] * BLOCK_SIZE + place % BLOCK_SIZE)
        offsets.append(offsets[-1] + len(masks))
        tables[index, : len(part.table)] = torch.tensor(part.table)
    layout = AttentionLayout(
        torch.tensor(offsets, dtype=torch.int32),
        torch.tensor([part.context for part in parts], dtype=torch.int32),
        tables,
        torch.tensor(words),
    )
    rows = DecoderRows(
        torch.cat([part.token_ids for part in parts]),
        torch.tensor(positions),
        torch.tensor(slots),
        torch.arange(len(slots)),
        layout,
    )
    result = decoder_logits(rows, stack, caches)
    return list(result.split([len(part.parents) for part in parts]))


def empty_caches(dtype: torch.dtype) -> LayerCaches:
    shape = (NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    return LayerCaches(
        tuple((torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for _ in range(2))
    )


def forms(stack: DecoderStack) -> dict[str, Tensor]:
    """Logits of the same tokens, [LENGTH, VOCABULARY], computed in three ways."""
    dtype = stack.dtype
    path = random_tokens(LENGTH, seed=1)
    caches = empty_caches(dtype)
    alone = [
        compute(stack, caches, [Part(TABLE, index, path[index : index + 1], [-1])])[0]
        for index in range(LENGTH)
    ]
    whole = compute(stack, empty_caches(dtype), [Part(TABLE, 0, path, chain(LENGTH))])[0]
    caches = empty_caches(dtype)
    start = compute(stack, caches, [Part(TABLE, 0, path[:PREFILLED], chain(PREFILLED))])[0]
    parents, places = path_in_tree(LENGTH - PREFILLED, 3, seed=2)
    nodes = random_tokens(len(parents), seed=4)
    nodes[places] = path[PREFILLED:]
    other = Part(OTHER_TABLE, 0, random_tokens(2, seed=5), chain(2))
    tree = compute(stack, caches, [other, Part(TABLE, PREFILLED, nodes, parents)])[1]
    return {
        "one by one": torch.cat(alone),
        "as a prompt": whole,
        "in a tree": torch.cat((start, tree[places])),
    }


def all_alike(found: dict[str, Tensor]) -> bool:
    first, *others = found.values()
    return all(same_bits(first, other) for other in others)


def test_tokens_have_the_same_bits_however_computed() -> None:
    found = forms(random_stack(torch.bfloat16))
    assert all_alike(found)
    assert found["in a tree"].isfinite().all()


def test_negative_control_a_product_that_follows_the_row_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    honest = launcher.compiled_shape

    def planted(packed: Any, num_rows: int) -> Any:
        return replace(honest(packed, num_rows), block_inputs=16 if num_rows < 4 else 32)

    monkeypatch.setattr(launcher, "compiled_shape", planted)
    assert not all_alike(forms(random_stack(torch.float32)))
