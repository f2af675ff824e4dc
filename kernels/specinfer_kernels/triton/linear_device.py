"""Device code of linear layers: tiles of y^T = W x^T, and the sum of their splits.

The weight is the left operand, so that int8 becomes a float in registers on its way to the tensor
cores. Knows pointers and sizes only; `linear` chooses the sizes. The order in which an element is
summed is a fixed function of SHAPE's inputs: blocks of block_inputs from the first to the last of
a split, then splits from left to right, whichever program takes them. Nothing is compiled for a
number of rows.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl


@dataclass(frozen=True)
class Shape:
    """What a compiled kernel is compiled for."""

    in_features: int
    out_features: int
    block_outputs: int
    block_rows: int
    block_inputs: int
    split_inputs: int  # a multiple of block_inputs
    serial: bool  # a program takes all splits of its tile in turn, instead of one
    has_scale: bool
    has_bias: bool
    widen: bool  # see `dot`

    @property
    def num_splits(self) -> int:
        """Parts of the inputs that are summed by themselves."""
        return -(-self.in_features // self.split_inputs)


class Layer(NamedTuple):
    """Pointers: a weight [out, in], and a scale and a bias [out] or whatever else."""

    weight: Any
    scale: Any
    bias: Any


@triton.jit
def dot(left, right, start, WIDEN: tl.constexpr):
    """left @ right + start in float32. The interpreter multiplies no bfloat16: WIDEN it."""
    if WIDEN:
        right = right.to(tl.float32)
    return tl.dot(left.to(right.dtype), right, start, input_precision="ieee")


@triton.jit
def multiply_split(layer, x, outputs, rows, num_rows, split, SHAPE: tl.constexpr):
    """float32 [block_outputs, block_rows]: the sum over the inputs of one split."""
    INPUTS: tl.constexpr = SHAPE.in_features
    OUTPUTS: tl.constexpr = SHAPE.block_outputs
    ROWS: tl.constexpr = SHAPE.block_rows
    total = tl.zeros((OUTPUTS, ROWS), tl.float32)
    lanes = tl.arange(0, SHAPE.block_inputs)
    weights = layer.weight + outputs.to(tl.int64)[:, None] * INPUTS
    values = x + rows.to(tl.int64)[:, None] * INPUTS
    output_mask = (outputs < SHAPE.out_features)[:, None]
    row_mask = (rows < num_rows)[:, None]
    first = split * SHAPE.split_inputs
    for begin in range(first, tl.minimum(first + SHAPE.split_inputs, INPUTS), SHAPE.block_inputs):
        inputs = (begin + lanes)[None, :]
        # Rows and outputs that are not there cost no memory traffic; their sums are not stored.
        weight = tl.load(weights + inputs, mask=output_mask & (inputs < INPUTS), other=0)
        value = tl.load(values + inputs, mask=row_mask & (inputs < INPUTS), other=0)
        total = dot(weight, tl.trans(value), total, SHAPE.widen)
    return total


@triton.jit
def finished(total, layer, outputs, SHAPE: tl.constexpr):
    """Times the scale, plus the bias; `outputs` are the columns of `total`, in its shape."""
    there = outputs < SHAPE.out_features
    if SHAPE.has_scale:
        total = total * tl.load(layer.scale + outputs, mask=there, other=0.0)
    if SHAPE.has_bias:
        total = total + tl.load(layer.bias + outputs, mask=there, other=0.0).to(tl.float32)
    return total


@triton.jit(do_not_specialize=["num_rows"])
def linear_kernel(layer, x, sums, output, num_rows, SHAPE: tl.constexpr):
    """One tile of outputs and rows: into `output`, or one split of it into `sums`.

    x [num_rows, in], sums float32 [num_splits, num_rows, out], output [num_rows, out].
    """
    NUM_SPLITS: tl.constexpr = SHAPE.num_splits
    OUTPUTS: tl.constexpr = SHAPE.block_outputs
    ROWS: tl.constexpr = SHAPE.block_rows
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    outputs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    mask = (outputs < SHAPE.out_features)[:, None] & (rows < num_rows)[None, :]
    places = rows.to(tl.int64)[None, :] * SHAPE.out_features + outputs[:, None]
    if SHAPE.serial:
        total = tl.zeros((OUTPUTS, ROWS), tl.float32)
        for split in range(NUM_SPLITS):
            total += multiply_split(layer, x, outputs, rows, num_rows, split, SHAPE)
        total = finished(total, layer, outputs[:, None], SHAPE)
        tl.store(output + places, total.to(output.dtype.element_ty), mask=mask)
    else:
        split = tl.program_id(2)
        total = multiply_split(layer, x, outputs, rows, num_rows, split, SHAPE)
        sums += split.to(tl.int64) * num_rows * SHAPE.out_features
        tl.store(sums + places, total, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def fold_kernel(layer, sums, output, num_rows, SHAPE: tl.constexpr, BLOCK: tl.constexpr):
    """Some outputs of one row: their splits from left to right, as a serial program adds them."""
    NUM_SPLITS: tl.constexpr = SHAPE.num_splits
    row = tl.program_id(0).to(tl.int64)
    outputs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = outputs < SHAPE.out_features
    places = row * SHAPE.out_features + outputs
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(NUM_SPLITS):
        stride = num_rows.to(tl.int64) * SHAPE.out_features
        total += tl.load(sums + split * stride + places, mask=mask, other=0.0)
    total = finished(total, layer, outputs, SHAPE)
    tl.store(output + places, total.to(output.dtype.element_ty), mask=mask)
