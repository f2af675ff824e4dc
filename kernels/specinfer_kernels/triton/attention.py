"""Tree attention on a GPU: what to launch for a pass. `attention_device` computes.

**What is promised.** The bits of a row's output depend on its query and on its keys and values in
position order, on the dtypes and on the constants here, and on nothing else: not on the other rows
or their number, the sequences of the pass, the slots and pages that hold the keys, how many of
them were in the context before the pass, nor on the GPU's number of multiprocessors. A node of a
tree has the bits that it has in a chain, in a prefill and in plain decoding.

**How.** Position p lies at place p % block_keys of tile p // block_keys, whichever slot holds its
key; tiles belong to splits of split_keys positions. Full tiles of keys that all rows see alike are
taken by tiles of (row, head) pairs (`shared_kernel`). From the first tile on that touches keys of
this pass, a row gathers its own ancestors, so that each stands at its place, and goes on from the
float32 state that the shared tiles left (`finish_kernel`). Both take a tile by one function on
tensors of one shape with the same number of warps and without fused multiply-adds; that an element
of a matrix product does not depend on its row in the tile is the hardware's part. Splits fold from
left to right, either in one program or after all of them: launches differ, the operations do not.

A weight of zero does not keep out a value that is not finite. So such a value can reach a row that
does not see it where the row shares its tile of keys: among rows of a chain longer than block_keys
(a prefill), and from just behind a row's window. From nodes that are not its ancestors nothing
reaches a row of a tree or of a short chain, and nothing ever reaches another sequence. No select
mends it: the rows of a tile share one matrix of values, so a value that is put to zero for the row
that does not see it is lost for those that do, whose sums must stay not finite. A select for each
row and value would take the product off the tensor cores, a look for such values costs every tile
a reduction. The C++ kernel and the reference add no value that a row does not see.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from specinfer_kernels.triton import attention_device as device
from specinfer_kernels.triton.runtime import device_of, is_interpreting

# From this number of programs on a GPU is full without the splits of a sequence side by side.
SERIAL_PROGRAMS = 512
# Bytes of states of splits; beyond it the splits of a sequence are taken one after another.
STATE_BYTES = 256 << 20
_LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class TileSizes:
    """The sizes on which the order of a row's sums depends, or that hold rows. Powers of two."""

    block_rows: int = 64
    block_keys: int = 64
    split_keys: int = 512


@dataclass(frozen=True)
class AttentionPlan:
    """What the kernels need to know of the rows of a pass, once for all layers.

    sequences, num_keys, identity: int32 [num_rows]; order: int32 [num_rows, num_words * 64]; see
    `attention_device.Plan`.
    """

    sequences: Tensor
    num_keys: Tensor
    identity: Tensor
    order: Tensor


def plan_attention(row_offsets: Tensor, context_lens: Tensor, ancestors: Tensor) -> AttentionPlan:
    """The plan of a layout, made on its device without waiting for it."""
    num_rows, num_words = ancestors.shape
    plan = AttentionPlan(
        sequences=row_offsets.new_empty(num_rows),
        num_keys=row_offsets.new_empty(num_rows),
        identity=row_offsets.new_empty(num_rows),
        order=row_offsets.new_empty(num_rows, num_words * 64),
    )
    if num_rows:
        pointers = device.Plan(plan.sequences, plan.num_keys, plan.identity, plan.order)
        with device_of(ancestors):
            device.plan_kernel[(num_rows,)](
                row_offsets,
                context_lens,
                ancestors,
                pointers,
                context_lens.numel(),
                num_words,
                enable_fp_fusion=False,
            )
    return plan


def tile_sizes(dtype: torch.dtype, head_dim: int) -> TileSizes:
    """The sizes for queries of this dtype and head size: what fits the memory of an H100's SM."""
    if dtype == torch.float32:  # no tensor core takes it in full precision
        return TileSizes(block_rows=16, block_keys=32)
    return TileSizes(block_keys=32) if head_dim > 128 else TileSizes()


def tree_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    row_offsets: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    plan: AttentionPlan,
    *,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
    sizes: TileSizes | None = None,
    serial: bool | None = None,
) -> Tensor:
    """As the op. `sizes` and `serial` are chosen here unless given; `serial` changes no bit."""
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    num_rows, num_heads, _ = query.shape
    if num_rows == 0:
        return output
    inputs = device.Inputs(query, key_cache, value_cache, row_offsets, context_lens, block_tables)
    shape = compiled_shape(inputs, sizes or tile_sizes(query.dtype, query.shape[2]))
    shape = replace(shape, has_window=sliding_window is not None, has_softcap=softcap is not None)
    num_tiles = num_rows // (shape.block_rows // shape.chunk) + context_lens.numel()
    num_columns = shape.num_kv_heads * shape.num_chunks
    num_slots = max(1, -(-block_tables.shape[1] * shape.block_size // shape.split_keys))
    if serial is None:
        state_bytes = num_slots * num_rows * num_heads * shape.block_dim * 4
        serial = num_tiles * num_columns >= SERIAL_PROGRAMS or state_bytes > STATE_BYTES
    shape = replace(shape, serial=serial)
    states = _states(query, 2 if serial else num_slots, shape)
    rows = device.Plan(plan.sequences, plan.num_keys, plan.identity, plan.order)
    numbers = device.Numbers(
        num_sequences=context_lens.numel(),
        num_rows=num_rows,
        row_stride=query.stride(0),
        head_stride=query.stride(1),
        table_stride=block_tables.stride(0),
        order_stride=plan.order.stride(0),
        window=sliding_window or 0,
        inner=scale * key_scale * (_LOG2_E if softcap is None else 1 / softcap),
        outer=0.0 if softcap is None else softcap * _LOG2_E,
        value_scale=value_scale,
    )
    grid = (num_tiles, 1 if serial else num_slots, num_columns)
    options = launch_options(shape)
    with device_of(query):
        device.shared_kernel[grid](inputs, rows, states, numbers, shape, **options)
        finish = device.finish_kernel[(num_rows, num_columns)]
        finish(inputs, rows, states, output, numbers, shape, **options)
    return output


def compiled_shape(inputs: device.Inputs, sizes: TileSizes) -> device.Shape:
    """What the kernels are compiled for, as far as tensors and sizes say it."""
    _, num_heads, head_dim = inputs.query.shape
    _, block_size, num_kv_heads, _ = inputs.key_cache.shape
    return device.Shape(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        chunk=min(num_heads // num_kv_heads, sizes.block_rows),
        block_rows=sizes.block_rows,
        block_keys=sizes.block_keys,
        split_keys=sizes.split_keys,
        block_dim=max(16, 1 << (head_dim - 1).bit_length()),
        serial=False,
        has_window=False,
        has_softcap=False,
        widen=is_interpreting() and inputs.query.dtype == torch.bfloat16,
    )


def _states(query: Tensor, num_slots: int, shape: device.Shape) -> device.States:
    places = (num_slots, query.shape[0], shape.num_heads)
    tops = query.new_empty(places, dtype=torch.float32)
    results = query.new_empty((*places, shape.block_dim), dtype=torch.float32)
    return device.States(tops, torch.empty_like(tops), results)


def launch_options(shape: device.Shape) -> dict[str, Any]:
    """Launch options; the same for both kernels, since a row's sums must be."""
    return {
        "num_warps": 8 if shape.block_dim > 128 else 4,
        "num_stages": 3,
        "enable_fp_fusion": False,
    }
