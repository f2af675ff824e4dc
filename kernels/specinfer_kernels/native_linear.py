"""The C++ product of packed weights: packing, and calls on tensors.

A weight [out, in] is stored as panels of 32 outputs, [out / 32][steps][2][16][inputs of a word]: a
step is one 32-bit word of each output, which holds one float32, two bfloat16 of neighbouring inputs
or as many int8. Missing outputs and inputs are zeros. Knows no layer and makes no choice of layout.
"""

import contextlib
import ctypes
import mmap
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from specinfer_kernels.errors import KernelInputError
from specinfer_kernels.native import native_failure, native_library, raise_for

_PANEL = 32
_LANES = 16
_LARGE_PAGE = 2 << 20
# Kinds of csrc/linear_plan.h and inputs of a word, by dtype of rows and whether weights are int8.
_KINDS = {
    (torch.float32, False): (0, 1),
    (torch.bfloat16, False): (1, 2),
    (torch.float32, True): (2, 1),
    (torch.bfloat16, True): (3, 2),
}


# In the order of the enum of that name in csrc/linear_plan.h.
BFloat16Products = Literal["none", "halves", "pairs", "matrices"]
_PRODUCTS: tuple[BFloat16Products, ...] = ("none", "halves", "pairs", "matrices")


class LinearWeight(ctypes.Structure):
    """The C struct of the same name in csrc/linear_plan.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("panels", "scale", "bias")),
        *((name, ctypes.c_int64) for name in ("in_features", "out_features", "kind")),
    )


@dataclass(frozen=True)
class NativeWeight:
    """A packed weight and what the library is told of it.

    Attributes:
        tensors: panels, scale and bias, which `arguments` points into.
        dtype: of rows and outputs.
        in_features, out_features: as before packing.
        struct: the C struct, which a decoder's layers point to.
        arguments: reference to it, made once.
        entry: the library's function.
    """

    tensors: tuple[Tensor | None, ...]
    dtype: torch.dtype
    in_features: int
    out_features: int
    struct: LinearWeight
    arguments: Any
    entry: Any


def native_linear_serves(dtype: torch.dtype, int8: bool = False) -> bool:
    """Whether this machine multiplies rows of `dtype` by weights of `dtype`, or by int8 ones."""
    if (dtype, int8) not in _KINDS or native_failure():
        return False
    return bool(native_library().specinfer_linear_serves(_KINDS[dtype, int8][0]))


def bfloat16_products() -> BFloat16Products:
    """What multiplies bfloat16 here; two answers are two kinds of bits.

    It is the processor, the system, which may keep a matrix unit from a process, and the compiler
    that decide.
    """
    if native_failure():
        return "none"
    which: int = native_library().specinfer_bfloat16_products()
    return _PRODUCTS[which]


def pack_native(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype, scale: Tensor | None = None
) -> NativeWeight:
    """Lay a weight out for `multiply_native`.

    weight: [out, in] of `dtype`, or int8 with its `scale`, float32 [out]; bias: [out] or None.
    """
    library = native_library()
    kind, inputs = _KINDS[dtype, weight.dtype == torch.int8]
    out_features, in_features = weight.shape
    panels = -(-out_features // _PANEL)
    padding = (0, -in_features % inputs, 0, panels * _PANEL - out_features)
    padded = functional.pad(weight.detach(), padding) if any(padding) else weight.detach()
    ordered = padded.reshape(panels, 2, _LANES, -1, inputs).permute(0, 3, 1, 2, 4)
    packed = _large_pages(ordered.numel() * weight.element_size()).view(weight.dtype)
    packed = packed.view(ordered.shape).copy_(ordered)
    outer = tuple(
        None
        if values is None
        else functional.pad(values.detach().float(), padding[2:]).contiguous()
        for values in (scale, bias)
    )
    pointers = (None if values is None else values.data_ptr() for values in outer)
    struct = LinearWeight(packed.data_ptr(), *pointers, in_features, out_features, kind)
    return NativeWeight(
        (packed, *outer),
        dtype,
        in_features,
        out_features,
        struct,
        ctypes.byref(struct),
        library.specinfer_linear,
    )


def _large_pages(num_bytes: int) -> Tensor:
    """Memory for a weight, uint8 [num_bytes], in large pages as far as the system gives them.

    Fresh from the system, since memory that was used before keeps its small pages, and from where a
    large page starts: in small pages a weight streams up to a third slower. The last page is large
    if it is at least half full.
    """
    whole, rest = divmod(num_bytes, _LARGE_PAGE)
    whole += rest * 2 >= _LARGE_PAGE
    if not whole or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(num_bytes, dtype=torch.uint8, device="cpu")
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    mapping = mmap.mmap(-1, num_bytes + 2 * _LARGE_PAGE, flags=flags)
    memory = torch.frombuffer(mapping, dtype=torch.uint8)
    start = -memory.data_ptr() % _LARGE_PAGE
    with contextlib.suppress(OSError):  # a kernel without large pages
        mapping.madvise(mmap.MADV_HUGEPAGE, start, whole * _LARGE_PAGE)
    return memory[start : start + num_bytes]


def multiply_native(weight: NativeWeight, x: Tensor) -> Tensor:
    """x [..., in_features] of the weight's dtype to [..., out_features].

    Raises KernelInputError for rows of another dtype, width or device.
    """
    shape = x.shape
    if x.dtype != weight.dtype or shape[-1] != weight.in_features or not x.is_cpu:
        raise KernelInputError(
            f"linear takes {weight.dtype} [..., {weight.in_features}] on cpu, "
            f"got {x.dtype} {list(shape)} on {x.device}"
        )
    rows = x if len(shape) == 2 else x.reshape(-1, weight.in_features)
    row_stride, stride = rows.stride()
    if stride != 1:
        rows = rows.contiguous()
        row_stride = weight.in_features
    num_rows = rows.shape[0]
    output = torch.empty((num_rows, weight.out_features), dtype=weight.dtype, device="cpu")
    status = weight.entry(
        weight.arguments,
        rows.data_ptr(),
        row_stride,
        num_rows,
        output.data_ptr(),
        torch.get_num_threads(),
    )
    if status:
        raise_for(status)
    return output if len(shape) == 2 else output.view(*shape[:-1], weight.out_features)
