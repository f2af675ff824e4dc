"""Paged tree attention over a ragged batch: prefill, plain decoding and token trees in one op.

A row sees the committed keys of its sequence and, among the sequence's rows of the same pass,
those whose bit is set in its ancestor words. It takes them in position order, so its bits depend
neither on the slots its ancestors sit in nor on the rows that share the pass. Knows no model and
no scheduler.
"""

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specinfer_kernels import native, reference
from specinfer_kernels.backends import Backend, choose_backend
from specinfer_kernels.errors import KernelInputError
from specinfer_kernels.kv_cache import check_scales
from specinfer_kernels.triton.runtime import DTYPES as TRITON_DTYPES

if TYPE_CHECKING:
    from specinfer_kernels.triton.attention import AttentionPlan


@dataclass(frozen=True)
class AttentionLayout:
    """Where the rows of one pass belong and what each may see. All on the device of the caches.

    row_offsets: int32 [num_sequences + 1]; rows of sequence s are row_offsets[s]..row_offsets[s+1].
    context_lens: int32 [num_sequences]; keys of the sequence in the cache before this pass (L).
    block_tables: int32 [num_sequences, max_blocks]; physical block of each logical block.
    ancestors: int64 [num_rows, num_words]; bit j of a row's 64-bit words is set when the row sees
        the j-th row of its sequence in this pass, itself included. The key and value of that j-th
        row lie at logical slot L + j. Parents come before children.

    Shapes and dtypes are checked here, once for all layers of a pass: KernelInputError.
    """

    row_offsets: Tensor
    context_lens: Tensor
    block_tables: Tensor
    ancestors: Tensor

    def __post_init__(self) -> None:
        num_sequences = self.context_lens.numel()
        expected = (
            ("row_offsets", torch.int32, (num_sequences + 1,)),
            ("context_lens", torch.int32, (num_sequences,)),
            ("block_tables", torch.int32, (num_sequences, None)),
            ("ancestors", torch.int64, (None, None)),
        )
        for name, dtype, shape in expected:
            _check_tensor(name, getattr(self, name), dtype, shape)
        if self.ancestors.shape[1] == 0:
            raise KernelInputError("ancestors must have at least one word a row")
        if len({getattr(self, name).device for name, _, _ in expected}) > 1:
            raise KernelInputError("the tensors of a layout are on different devices")

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Where the rows and their keys lie; what each row sees is not among them."""
        return self.row_offsets, self.context_lens, self.block_tables

    @cached_property
    def triton_plan(self) -> "AttentionPlan":
        """What the Triton kernels read of the layout, made at the first layer of a pass.

        Whoever writes other rows into the same tensors makes a new AttentionLayout of them.
        """
        from specinfer_kernels.triton.attention import plan_attention

        return plan_attention(self.row_offsets, self.context_lens, self.ancestors)


def _check_tensor(
    name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int | None, ...]
) -> None:
    if tensor.dtype != dtype or not tensor.is_contiguous():
        raise KernelInputError(f"{name} must be a contiguous {dtype}, got {tensor.dtype}")
    if tensor.dim() != len(shape) or any(
        wanted is not None and wanted != size
        for wanted, size in zip(shape, tensor.shape, strict=True)
    ):
        raise KernelInputError(f"{name} must be {shape}, got {list(tensor.shape)}")


def tree_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    layout: AttentionLayout,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
    backend: Backend | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v of every row over its own keys, in position order.

    query: [num_rows, num_heads, head_dim], last dimension contiguous. key_cache, value_cache:
    [num_blocks, block_size, num_kv_heads, head_dim], contiguous, of query's dtype, already holding
    the keys and values of this pass. Returns a contiguous [num_rows, num_heads, head_dim] of
    query's dtype; sums are taken in float32 (float64 for float64).

    The k-th key of a row's list has position k, the row's own position is the last. With
    `sliding_window` w only keys with row_position - k < w are seen; `softcap` c turns a scaled
    score s into c * tanh(s / c). Caches of float8_e4m3fn hold keys over key_scale and values over
    value_scale, as `write_kv` puts them there, for queries of float16, bfloat16 or float32; the C++
    kernel reads a copy of the blocks in the queries' dtype, which holds them exactly.

    Raises KernelInputError on a wrong shape, stride, dtype, scale or range,
    BackendUnavailableError when `backend` is named and cannot serve.
    """
    _check(query, key_cache, value_cache, layout)
    check_scales(query.dtype, key_cache.dtype, key_scale, value_scale)
    if sliding_window is not None and sliding_window < 1:
        raise KernelInputError(f"sliding_window must be at least 1, got {sliding_window}")
    if softcap is not None and not softcap > 0:
        raise KernelInputError(f"softcap must be positive, got {softcap}")
    chosen = choose_backend(query.device, backend, query.dtype, native.DTYPE_CODES, TRITON_DTYPES)
    is_float8 = key_cache.dtype == reference.FLOAT8
    if query.device.type == "cpu" and (is_float8 or chosen != "native"):
        _check_values(layout, query.shape[0], key_cache, sliding_window)
    tensors = (query, key_cache, value_cache, *layout.tensors)
    numbers: dict[str, Any] = {
        "scale": scale,
        "sliding_window": sliding_window,
        "softcap": softcap,
    }
    if chosen == "native" and is_float8:
        tensors = (query, *_widened(query.dtype, key_cache, value_cache, layout))
        numbers["scale"] = scale * key_scale
        return native.tree_attention(*tensors, layout.ancestors, **numbers).mul_(value_scale)
    if chosen == "native":
        return native.tree_attention(*tensors, layout.ancestors, **numbers)
    numbers |= {"key_scale": key_scale, "value_scale": value_scale}
    if chosen == "triton":
        # Imported here: Triton is heavy and not everywhere.
        from specinfer_kernels.triton import attention

        return attention.tree_attention(*tensors, layout.triton_plan, **numbers)
    return reference.tree_attention(*tensors, layout.ancestors, **numbers)


def split_length(device: torch.device, dtype: torch.dtype, head_dim: int) -> int | None:
    """Keys after which attention takes the next split of a row's, or None where there is one.

    For queries of a device, dtype and head size. Longer rows are summed in several states that are
    folded afterwards (flash-decoding), which what looks at short rows never sees.
    """
    if choose_backend(device, None, dtype, native.DTYPE_CODES, TRITON_DTYPES) != "triton":
        return None
    from specinfer_kernels.triton import attention

    return attention.tile_sizes(dtype, head_dim).split_keys


def _widened(
    dtype: torch.dtype, key_cache: Tensor, value_cache: Tensor, layout: AttentionLayout
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Caches of a dtype with the blocks that the layout names, and the layout over them.

    A block behind a window may name anything; it is not read.
    """
    named = layout.block_tables.clamp(0, key_cache.shape[0] - 1)
    blocks, tables = torch.unique(named, return_inverse=True)
    keys, values = key_cache[blocks].to(dtype), value_cache[blocks].to(dtype)
    return keys, values, layout.row_offsets, layout.context_lens, tables.int()


def _check(query: Tensor, key_cache: Tensor, value_cache: Tensor, layout: AttentionLayout) -> None:
    if query.dim() != 3 or key_cache.dim() != 4:
        raise KernelInputError(
            "query must be [num_rows, num_heads, head_dim] and the caches "
            "[num_blocks, block_size, num_kv_heads, head_dim], got "
            f"{list(query.shape)} and {list(key_cache.shape)}"
        )
    if value_cache.shape != key_cache.shape:
        raise KernelInputError(
            f"key and value caches differ: {list(key_cache.shape)}, {list(value_cache.shape)}"
        )
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads = key_cache.shape[2]
    if 0 in query.shape[1:] or 0 in key_cache.shape[1:]:
        raise KernelInputError(
            f"heads, head size and block size are at least 1, got query {list(query.shape)} and "
            f"cache {list(key_cache.shape)}"
        )
    if head_dim != key_cache.shape[3] or num_heads % num_kv_heads:
        raise KernelInputError(
            f"{num_heads} heads of {head_dim} cannot read {num_kv_heads} kv heads of "
            f"{key_cache.shape[3]}"
        )
    if key_cache.dtype != value_cache.dtype:
        raise KernelInputError(f"caches differ: {key_cache.dtype}, {value_cache.dtype}")
    if not query.device == key_cache.device == value_cache.device:
        raise KernelInputError("query and caches are on different devices")
    if not (key_cache.is_contiguous() and value_cache.is_contiguous()):
        raise KernelInputError("the caches must be contiguous")
    if query.stride(2) != 1 and head_dim > 1:
        raise KernelInputError("the last dimension of query must be contiguous")
    if layout.ancestors.shape[0] != num_rows or layout.ancestors.device != query.device:
        raise KernelInputError(
            f"ancestors are of {layout.ancestors.shape[0]} rows on {layout.ancestors.device}, "
            f"query of {num_rows} on {query.device}"
        )


def _check_values(
    layout: AttentionLayout, num_rows: int, key_cache: Tensor, sliding_window: int | None
) -> None:
    """What the native kernel checks by itself: contents that would read outside the cache."""
    offsets = [int(offset) for offset in layout.row_offsets]
    if offsets[0] != 0 or offsets[-1] != num_rows or offsets != sorted(offsets):
        raise KernelInputError("row_offsets must rise from 0 to num_rows")
    num_blocks, block_size = key_cache.shape[:2]
    for sequence, (begin, end) in enumerate(itertools.pairwise(offsets)):
        context = int(layout.context_lens[sequence])
        if context < 0:
            raise KernelInputError("context_lens must not be negative")
        if begin == end:
            continue
        words = layout.ancestors[begin:end].tolist()
        masks = [reference.join_words(row) for row in words]
        first = masks[0].bit_length()
        if first == 0 or any(
            mask.bit_length() != first + index for index, mask in enumerate(masks)
        ):
            raise KernelInputError("each row's own bit must be set in ancestors and be its last")
        num_slots = context + first - 1 + end - begin
        if num_slots > layout.block_tables.shape[1] * block_size:
            raise KernelInputError("a sequence has more keys than block_tables has room for")
        lowest = 0
        if sliding_window is not None:
            least = min(context + mask.bit_count() for mask in masks)
            lowest = max(0, least - sliding_window)
        blocks = layout.block_tables[sequence]
        used = blocks[min(lowest, context) // block_size : (num_slots - 1) // block_size + 1]
        if bool(((used < 0) | (used >= num_blocks)).any()):
            raise KernelInputError("block_tables names a block outside the cache")
