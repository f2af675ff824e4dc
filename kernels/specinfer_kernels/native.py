"""The C++ library behind the `native` backend: loading, argument types, and calls on tensors.

Tensors are trusted to have the shapes and strides that the ops checked; values that would make
the library read or write outside its tensors (blocks, slots, ancestor bits) it checks itself, and
its status becomes a KernelInputError here. Knows CPU tensors only.
"""

import ctypes
import os
from functools import cache

import torch
from torch import Tensor

from specinfer_kernels.errors import BackendUnavailableError, KernelInputError

# Variable that turns the library off, to see what the other backends do on a machine that has it.
SWITCH = "SPECINFER_NATIVE_KERNELS"
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
_NO_MEMORY = 5
_MESSAGES = {
    1: "row_offsets must rise from 0 to num_rows and context_lens must not be negative",
    2: "a sequence has more keys than its row of block_tables has room for",
    3: "block_tables names a block outside the cache",
    4: "each row's own bit must be set in ancestors and be its last (parents come before children)",
    6: "slot_mapping names a slot outside the cache",
    7: "the native kernel does not take this dtype",
    8: "positions names a position outside the tables",
    9: "the native kernel does not take heads this large",
    10: "token_ids names a token outside the embedding",
    11: "wanted names a row outside the pass",
}
_POINTER, _LONG, _DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class AttentionArguments(ctypes.Structure):
    """The C struct of the same name in csrc/attention.h, field by field."""

    _fields_ = (
        *((name, _POINTER) for name in ("query", "key_cache", "value_cache", "output")),
        *((name, _POINTER) for name in ("row_offsets", "context_lens", "block_tables")),
        ("ancestors", _POINTER),
        *((name, _LONG) for name in ("query_row_stride", "query_head_stride")),
        *((name, _LONG) for name in ("num_rows", "num_sequences", "max_blocks", "num_words")),
        *((name, _LONG) for name in ("num_blocks", "block_size", "num_heads", "num_kv_heads")),
        *((name, _LONG) for name in ("head_dim", "sliding_window")),
        *((name, _DOUBLE) for name in ("scale", "softcap")),
        *((name, _LONG) for name in ("dtype", "num_threads")),
    )


@cache
def _load() -> ctypes.CDLL | str:
    """The library, built first if need be, or why there is none. Decided once a process.

    One that came with the package goes first: in an image every machine has the same.
    """
    # Here and not above: `python -m specinfer_kernels.build` must find its module unimported.
    from specinfer_kernels.build import BuildError, build
    from specinfer_kernels.prebuilt import find_prebuilt

    if os.environ.get(SWITCH, "on").lower() in ("off", "0", "false", "no"):
        return f"{SWITCH} has turned the native kernels off"
    try:
        library = ctypes.CDLL(str(find_prebuilt() or build()))
    except (BuildError, OSError) as error:
        return str(error)
    library.specinfer_tree_attention.argtypes = [ctypes.POINTER(AttentionArguments)]
    library.specinfer_write_kv.argtypes = [_POINTER] * 5 + [_LONG] * 8
    library.specinfer_rms_norm.argtypes = [_POINTER] * 4 + [_LONG] * 4 + [_DOUBLE] + [_LONG] * 2
    library.specinfer_silu_multiply.argtypes = [_POINTER] + [_LONG] * 3 + [_POINTER] + [_LONG] * 2
    rotate = [_POINTER] * 10 + [_LONG] * 7 + [_DOUBLE] + [_LONG] * 2
    library.specinfer_rotate_and_write_kv.argtypes = rotate
    library.specinfer_decoder_logits.argtypes = [_POINTER]
    library.specinfer_gumbel_noise.argtypes = [_POINTER] * 2 + [_LONG] * 2 + [_POINTER, _LONG]
    library.specinfer_gumbel_noise.restype = None
    library.specinfer_sample_gumbel.argtypes = [_POINTER] + [_LONG] * 4 + [_POINTER] * 4 + [_LONG]
    library.specinfer_draw_row.argtypes = [_POINTER] + [_LONG] * 5
    library.specinfer_draw_row.restype = _LONG
    rank = [_POINTER] + [_LONG] * 4 + [ctypes.c_float] + [_POINTER] * 2 + [_LONG]
    library.specinfer_rank_tokens.argtypes = rank
    library.specinfer_rank_tokens.restype = None
    library.specinfer_linear.argtypes = [_POINTER] * 2 + [_LONG] * 2 + [_POINTER, _LONG]
    library.specinfer_linear_serves.argtypes = [_LONG]
    return library


def native_failure() -> str | None:
    """Why the native library cannot be used, or None when it can."""
    library = _load()
    return library if isinstance(library, str) else None


def _library() -> ctypes.CDLL:
    library = _load()
    if isinstance(library, str):
        raise BackendUnavailableError(library)
    return library


def native_library() -> ctypes.CDLL:
    """The loaded library, for modules with entry points of their own.

    Raises BackendUnavailableError when there is none.
    """
    return _library()


def raise_for(status: int) -> None:
    """Turn an entry point's status into MemoryError or KernelInputError; 0 is fine."""
    _raise_for(status)


def _raise_for(status: int) -> None:
    if status == _NO_MEMORY:
        raise MemoryError("the native kernel could not allocate its scratch memory")
    if status:
        raise KernelInputError(_MESSAGES.get(status, f"unknown status {status}"))


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
) -> Tensor:
    """As reference.tree_attention, in csrc/attention.h."""
    num_rows, num_heads, head_dim = query.shape
    output = query.new_empty(query.shape)
    query_row_stride, query_head_stride, _ = query.stride()
    num_blocks, block_size, num_kv_heads, _ = key_cache.shape
    arguments = AttentionArguments(
        query.data_ptr(),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        output.data_ptr(),
        row_offsets.data_ptr(),
        context_lens.data_ptr(),
        block_tables.data_ptr(),
        ancestors.data_ptr(),
        query_row_stride,
        query_head_stride,
        num_rows,
        context_lens.shape[0],
        block_tables.shape[1],
        ancestors.shape[1],
        num_blocks,
        block_size,
        num_heads,
        num_kv_heads,
        head_dim,
        sliding_window or 0,
        scale,
        softcap or 0.0,
        DTYPE_CODES[query.dtype],
        torch.get_num_threads(),
    )
    _raise_for(_library().specinfer_tree_attention(ctypes.byref(arguments)))
    return output


def write_kv(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """As reference.write_kv; slots are checked before anything is written."""
    num_blocks, block_size, num_kv_heads, head_dim = key_cache.shape
    size = key.element_size()
    status = _library().specinfer_write_kv(
        key.data_ptr(),
        value.data_ptr(),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        slot_mapping.data_ptr(),
        key.shape[0],
        num_blocks * block_size,
        num_kv_heads,
        head_dim * size,
        key.stride(0) * size,
        key.stride(1) * size,
        value.stride(0) * size,
        value.stride(1) * size,
    )
    _raise_for(status)


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """As reference.gumbel_from_words of the counter hash for purpose TARGET, to the bit."""
    noise = torch.empty(seeds.shape[0], vocab_size, dtype=torch.float64, device="cpu")
    _library().specinfer_gumbel_noise(
        seeds.data_ptr(),
        positions.data_ptr(),
        seeds.shape[0],
        vocab_size,
        noise.data_ptr(),
        torch.get_num_threads(),
    )
    return noise


def sample_gumbel(logits: Tensor, seeds: Tensor, positions: Tensor, greedy: Tensor) -> Tensor:
    """As reference.sample_gumbel, without making noise for tokens that cannot win."""
    tokens = torch.empty(logits.shape[0], dtype=torch.int64, device="cpu")
    status = _library().specinfer_sample_gumbel(
        logits.data_ptr(),
        DTYPE_CODES[logits.dtype],
        logits.stride(0),
        logits.shape[0],
        logits.shape[1],
        seeds.data_ptr(),
        positions.data_ptr(),
        greedy.data_ptr(),
        tokens.data_ptr(),
        torch.get_num_threads(),
    )
    _raise_for(status)
    return tokens


def draw_row(law: Tensor, seed: int, position: int, greedy: bool) -> int | None:
    """As reference.draw_row, for a contiguous row."""
    token = _library().specinfer_draw_row(
        law.data_ptr(), DTYPE_CODES[law.dtype], law.shape[0], seed, position, greedy
    )
    return None if token < 0 else int(token)


def rank_tokens(z: Tensor, count: int, spread: float) -> Tensor:
    """As reference.rank_tokens; of equal tokens the lower ones, in their order."""
    num_rows, vocab_size = z.shape
    found = torch.empty(2, num_rows, count, dtype=torch.float64, device="cpu")
    _library().specinfer_rank_tokens(
        z.data_ptr(),
        z.stride(0),
        num_rows,
        vocab_size,
        count,
        spread,
        found.data_ptr(),
        found.data_ptr() + 8 * num_rows * count,
        torch.get_num_threads(),
    )
    return found
