"""Linear layers on a GPU whose row bits do not depend on the number of rows: what to launch.

**What is promised.** The bits of a row's output depend on the row, the weight, the dtypes and the
constants here: not on the other rows or their number, nor on the GPU's number of multiprocessors.
cuBLAS takes another kernel, and with it another order of summing, for another number of rows.

**How.** Every element is summed over blocks of block_inputs in order; a weight with few outputs
has its inputs in splits, at places that only its shape decides, so that few rows fill a GPU.
Few rows take narrow tiles and splits side by side, whose sums `fold_kernel` adds from left to
right; many rows take tiles of more outputs, each program adding its splits in that order. Both
tiles use one tensor-core instruction (64 outputs by 64 rows by 16 inputs; `test_triton_compile`
holds them to it), with the same operands in the same order for an element; that it computes an
element alike wherever in the tile that stands is the hardware's part. float32 uses no tensor core
(none takes it in full precision), and there too a sum is taken block by block in order.

**The price.** A tile always computes 64 rows, so one row costs the arithmetic of 64: less time than
reading the weight takes, which the tile does once. Splits write and read rows * out_features
float32 each. Instructions of 64 rows reuse less than the 128 and 256 that cuBLAS takes for a long
prompt. `bench/kernels/gpu_linear.py` measures it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specinfer_kernels.triton import linear_device as device
from specinfer_kernels.triton.runtime import device_of, is_interpreting

# Programs that few rows are given by splits: about two for each multiprocessor of an H200. It is a
# constant and no question to the device, since where splits lie decides a row's bits.
PROGRAMS = 256
LEAST_SPLIT = 512
FOLD_BLOCK = 1024


@dataclass(frozen=True)
class TileSizes:
    """Powers of two. Only block_inputs decides bits; the instruction is that of block_rows rows."""

    few_outputs: int = 64
    many_outputs: int = 256
    block_rows: int = 64
    block_inputs: int = 64
    few_rows: int = 128  # up to this number splits lie side by side


@dataclass(frozen=True)
class TritonWeight:
    """A weight and what its sums are divided into.

    Attributes:
        weight: contiguous [out, in], of `dtype` or int8.
        scale: float32 [out] of an int8 weight, or None.
        bias: [out], or None.
        dtype: of rows and outputs.
        sizes: of tiles.
        split_inputs: inputs of a split.
    """

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None
    dtype: torch.dtype
    sizes: TileSizes
    split_inputs: int

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.weight, self.scale, self.bias


def pack_triton(
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    scale: Tensor | None = None,
    *,
    sizes: TileSizes | None = None,
    split_inputs: int | None = None,
) -> TritonWeight:
    """Choose the sizes for a weight [out, in] of `dtype`, or int8 with its scale.

    A weight that lies in order is not copied. Tests give sizes of their own.
    """
    sizes = sizes or tile_sizes(dtype)
    return TritonWeight(
        weight.detach().contiguous(),
        scale,
        None if bias is None else bias.detach().clone(),
        dtype,
        sizes,
        split_inputs or _split_inputs(weight, sizes),
    )


def tile_sizes(dtype: torch.dtype) -> TileSizes:
    """The sizes for rows of this dtype."""
    if dtype == torch.float32:
        return TileSizes(few_outputs=64, many_outputs=64, block_rows=16, block_inputs=32)
    return TileSizes()


def _split_inputs(weight: Tensor, sizes: TileSizes) -> int:
    out_features, in_features = weight.shape
    tiles = -(-out_features // sizes.few_outputs)
    splits = max(1, min(-(-PROGRAMS // tiles), in_features // LEAST_SPLIT))
    blocks = -(-in_features // sizes.block_inputs)
    return -(-blocks // splits) * sizes.block_inputs


def multiply_triton(packed: TritonWeight, rows: Tensor) -> Tensor:
    """rows [num_rows, in] of the packed dtype to [num_rows, out]."""
    num_rows, out_features = rows.shape[0], packed.weight.shape[0]
    output = rows.new_empty(num_rows, out_features)
    if num_rows == 0:
        return output
    rows = rows.contiguous()
    shape = compiled_shape(packed, num_rows)
    layer = device.Layer(
        packed.weight,
        packed.weight if packed.scale is None else packed.scale,
        packed.weight if packed.bias is None else packed.bias,
    )
    row_tiles = -(-num_rows // shape.block_rows)
    grid = (row_tiles, -(-out_features // shape.block_outputs), 1)
    options = launch_options(shape)
    with device_of(rows):
        if shape.serial:
            device.linear_kernel[grid](layer, rows, output, output, num_rows, shape, **options)
            return output
        sums = rows.new_empty(shape.num_splits, num_rows, out_features, dtype=torch.float32)
        grid = (*grid[:2], shape.num_splits)
        device.linear_kernel[grid](layer, rows, sums, output, num_rows, shape, **options)
        fold = device.fold_kernel[(num_rows, -(-out_features // FOLD_BLOCK))]
        fold(layer, sums, output, num_rows, shape, BLOCK=FOLD_BLOCK, enable_fp_fusion=False)
    return output


def compiled_shape(packed: TritonWeight, num_rows: int) -> device.Shape:
    """What the kernels are compiled for: one of two tiles, which sum alike."""
    sizes = packed.sizes
    out_features, in_features = packed.weight.shape
    few = num_rows <= sizes.few_rows
    return device.Shape(
        in_features=in_features,
        out_features=out_features,
        block_outputs=sizes.few_outputs if few else sizes.many_outputs,
        block_rows=sizes.block_rows,
        block_inputs=sizes.block_inputs,
        split_inputs=packed.split_inputs,
        serial=not few or packed.split_inputs >= in_features,
        has_scale=packed.scale is not None,
        has_bias=packed.bias is not None,
        widen=is_interpreting() and packed.dtype == torch.bfloat16,
    )


def launch_options(shape: device.Shape) -> dict[str, Any]:
    """Four warps take 64 outputs together with one instruction, eight take 64 twice."""
    wide = shape.block_outputs > 64
    return {
        "num_warps": 8 if wide else 4,
        "num_stages": 3 if wide else 4,
        "enable_fp_fusion": False,
    }
