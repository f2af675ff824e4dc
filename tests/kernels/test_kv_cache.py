"""KV moves: writes by slot, compaction of an accepted path with overlaps, copy of blocks."""

import itertools

import pytest
import torch
from torch import Tensor

from specinfer_kernels import (
    Backend,
    KernelInputError,
    available_backends,
    compact_kv,
    copy_blocks,
    write_kv,
)

BACKENDS = available_backends()


def make_pool(dtype: torch.dtype = torch.float32) -> Tensor:
    """[3 layers, 2, 4 blocks, 5 slots, 2 heads, 3]: every value tells where it was."""
    return torch.arange(3 * 2 * 4 * 5 * 2 * 3).to(dtype).view(3, 2, 4, 5, 2, 3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_write_kv(backend: Backend, dtype: torch.dtype) -> None:
    pool = torch.zeros(1, 2, 4, 5, 2, 3, dtype=dtype)
    key, value = torch.randn(2, 4, 2, 3).to(dtype)
    slots = torch.tensor([19, 0, 7, 6])
    # As attention modules hand them over: heads first, seen through a transpose.
    turned = key.transpose(0, 1).contiguous().transpose(0, 1)
    write_kv(turned, value, pool[0, 0], pool[0, 1], slots, backend=backend)
    expected = torch.zeros(1, 2, 20, 2, 3, dtype=dtype)
    for row, slot in enumerate(slots.tolist()):
        expected[0, 0, slot], expected[0, 1, slot] = key[row], value[row]
    assert torch.equal(pool.flatten(2, 3), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("slot", [-1, 20])
def test_write_kv_refuses_a_slot_outside_and_writes_nothing(backend: Backend, slot: int) -> None:
    pool = torch.zeros(1, 2, 4, 5, 2, 3)
    rows = torch.ones(2, 2, 3)
    with pytest.raises(KernelInputError, match="slot"):
        write_kv(rows, rows, pool[0, 0], pool[0, 1], torch.tensor([3, slot]), backend=backend)
    assert not pool.any()


def test_write_kv_refuses_bad_tensors() -> None:
    pool, rows, slots = torch.zeros(1, 2, 4, 5, 2, 3), torch.ones(2, 2, 3), torch.tensor([0, 1])
    keys, values = pool[0, 0], pool[0, 1]
    for key, cache, mapping in (
        (rows[:1], keys, slots),
        (rows.double(), keys, slots),
        (rows, keys[:, :4], slots),
        (rows, keys, slots.int()),
        (rows[:, :1], keys, slots),
    ):
        with pytest.raises(KernelInputError):
            write_kv(key, rows, cache, values, mapping)


@pytest.mark.parametrize("elsewhere", range(5))
def test_write_kv_refuses_tensors_on_several_devices(elsewhere: int) -> None:
    cache, rows, slots = torch.zeros(4, 5, 2, 3), torch.ones(2, 2, 3), torch.tensor([0, 1])
    tensors = [rows, rows, cache, cache.clone(), slots]
    tensors[elsewhere] = tensors[elsewhere].to("meta")
    with pytest.raises(KernelInputError, match="different devices"):
        write_kv(*tensors)


def accepted_paths() -> list[tuple[list[int], list[int]]]:
    """Every accepted path of up to 5 of 8 nodes under the root: slot L + a_j moves to L + j."""
    length = 6
    return [
        ([length + node for node in nodes], [length + 1 + depth for depth in range(len(nodes))])
        for count in range(6)
        for nodes in itertools.combinations(range(1, 9), count)
    ]


def test_compaction_of_every_accepted_path() -> None:
    for sources, targets in accepted_paths():
        pool = make_pool()
        before = pool.clone().flatten(2, 3)
        compact_kv(pool, torch.tensor(sources).long(), torch.tensor(targets).long())
        expected = before.clone()
        for source, target in zip(sources, targets, strict=True):
            expected[:, :, target] = before[:, :, source]
        assert torch.equal(pool.flatten(2, 3), expected)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
def test_compaction_reads_all_before_it_writes(order: list[int]) -> None:
    # 7 -> 6, 8 -> 7, 9 -> 8: in the wrong order a copy one by one smears slot 9 over all.
    sources = torch.tensor([7, 8, 9])[order]
    targets = torch.tensor([6, 7, 8])[order]
    pool = make_pool()
    before = pool.clone().flatten(2, 3)
    compact_kv(pool, sources, targets)
    assert torch.equal(pool.flatten(2, 3)[:, :, 6:9], before[:, :, 7:10])


def test_negative_control_copies_one_by_one_are_detected() -> None:
    pool = make_pool().flatten(2, 3)
    before = pool.clone()
    for source, target in ((9, 8), (8, 7), (7, 6)):
        pool[:, :, target] = pool[:, :, source]
    assert not torch.equal(pool[:, :, 6:9], before[:, :, 7:10])


def test_copy_blocks() -> None:
    pool = make_pool(torch.bfloat16)
    before = pool.clone()
    copy_blocks(pool, torch.tensor([0, 2]), torch.tensor([2, 3]))
    assert torch.equal(pool[:, :, 2], before[:, :, 0])
    assert torch.equal(pool[:, :, 3], before[:, :, 2])
    assert torch.equal(pool[:, :, :2], before[:, :, :2])


def test_moves_refuse_what_lies_outside() -> None:
    pool, good = make_pool(), torch.tensor([1])
    for sources, targets in (
        (torch.tensor([20]), good),
        (good, torch.tensor([-1])),
        (torch.tensor([1, 2]), good),
        (good.int(), good),
    ):
        with pytest.raises(KernelInputError):
            compact_kv(pool, sources, targets)
    with pytest.raises(KernelInputError, match=r"targets must lie in 0\.\.3"):
        copy_blocks(pool, good, torch.tensor([4]))
    with pytest.raises(KernelInputError, match="pool"):
        compact_kv(pool[0], good, good)
