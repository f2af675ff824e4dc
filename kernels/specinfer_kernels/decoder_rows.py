"""What a decoder layer does to its rows between the products: norms, gates, rotary positions.

Each is one pass over memory where plain torch makes five to ten. Values are rounded to their dtype
where the stock modules of `transformers` round them, sums are taken in float32, and a
row's bits depend on that row alone. Knows no model: a layer is its weights.
"""

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from specinfer_kernels import native_rows, reference
from specinfer_kernels.backends import Backend, choose_backend
from specinfer_kernels.errors import KernelInputError
from specinfer_kernels.kv_cache import check_indices, check_scales
from specinfer_kernels.triton.runtime import DTYPES as TRITON_DTYPES


@dataclass(frozen=True)
class RotaryPlaces:
    """Where the rows of one pass stand, for all layers. All on the device of the caches.

    positions: int64 [num_rows]. slot_mapping: int64 [num_rows], distinct slots of the pool.
    cosines, sines: [num_positions, head_dim], one row a position; both halves of a row count.

    Shapes and dtypes are checked here, once for all layers of a pass: KernelInputError.
    """

    positions: Tensor
    slot_mapping: Tensor
    cosines: Tensor
    sines: Tensor

    def __post_init__(self) -> None:
        for name in ("positions", "slot_mapping"):
            tensor = getattr(self, name)
            if tensor.dtype != torch.int64 or tensor.dim() != 1 or not tensor.is_contiguous():
                raise KernelInputError(
                    f"{name} must be a flat int64, got {tensor.dtype} {list(tensor.shape)}"
                )
        if self.positions.shape != self.slot_mapping.shape:
            raise KernelInputError("positions and slot_mapping differ in their number of rows")
        tables = (self.cosines, self.sines)
        if self.cosines.shape != self.sines.shape or self.cosines.dim() != 2:
            raise KernelInputError("cosines and sines must be of one shape [positions, head_dim]")
        if self.cosines.dtype != self.sines.dtype or self.cosines.shape[1] % 2:
            raise KernelInputError("cosines and sines must have one dtype and an even head_dim")
        if not all(table.is_contiguous() for table in tables):
            raise KernelInputError("cosines and sines must be contiguous")
        devices = {tensor.device for tensor in (self.positions, self.slot_mapping, *tables)}
        if len(devices) > 1:
            raise KernelInputError("the places of a pass are on different devices")


@dataclass(frozen=True)
class HeadNorms:
    """Norms of each head before it is turned (Qwen 3): weights [head_dim] of the rows' dtype."""

    query: Tensor
    key: Tensor
    epsilon: float


def rms_norm(
    values: Tensor, weight: Tensor, epsilon: float, *, backend: Backend | None = None
) -> Tensor:
    """weight * values / root mean square of each row (Zhang and Sennrich, 2019).

    values: [num_rows, width], last dimension contiguous; weight: [width] of the same dtype. Returns
    a contiguous [num_rows, width]. Raises KernelInputError on a wrong shape, stride or dtype.
    """
    chosen = _norm_backend(values, weight, backend)
    if chosen == "native":
        return native_rows.rms_norm(values, None, weight, epsilon)
    if chosen == "triton":
        result: Tensor = _triton().rms_norm(values, None, weight, epsilon)
        return result
    return reference.rms_norm(values, weight, epsilon)


def add_rms_norm(
    hidden: Tensor,
    update: Tensor,
    weight: Tensor,
    epsilon: float,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Add `update` to `hidden` in place, as a residual stream does, and return its rms_norm.

    hidden, update: [num_rows, width], last dimension contiguous, one dtype. Returns and raises as
    rms_norm does.
    """
    if update.shape != hidden.shape or update.dtype != hidden.dtype:
        raise KernelInputError(
            f"update must be {hidden.dtype} {list(hidden.shape)}, "
            f"got {update.dtype} {list(update.shape)}"
        )
    if update.stride(-1) != 1 or update.device != hidden.device:
        raise KernelInputError("update must lie as hidden does, on its device")
    chosen = _norm_backend(hidden, weight, backend)
    if chosen == "native":
        return native_rows.rms_norm(hidden, update, weight, epsilon)
    if chosen == "triton":
        result: Tensor = _triton().rms_norm(hidden, update, weight, epsilon)
        return result
    return reference.add_rms_norm(hidden, update, weight, epsilon)


def silu_multiply(gate_up: Tensor, *, backend: Backend | None = None) -> Tensor:
    """silu(gate) * up of rows that hold both side by side (SwiGLU, Shazeer, 2020).

    gate_up: [num_rows, 2 * width], last dimension contiguous. Returns a contiguous
    [num_rows, width]. Raises KernelInputError on a wrong shape or stride.
    """
    if gate_up.dim() != 2 or gate_up.shape[1] % 2 or gate_up.stride(1) != 1:
        raise KernelInputError(
            f"gate_up must be [num_rows, 2 * width] without gaps, got {list(gate_up.shape)}"
        )
    chosen = _backend(gate_up, backend)
    if chosen == "native":
        return native_rows.silu_multiply(gate_up)
    if chosen == "triton":
        result: Tensor = _triton().silu_multiply(gate_up)
        return result
    return reference.silu_multiply(gate_up)


def rotate_and_write_kv(
    mixed: Tensor,
    places: RotaryPlaces,
    key_cache: Tensor,
    value_cache: Tensor,
    norms: HeadNorms | None = None,
    *,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
    backend: Backend | None = None,
) -> Tensor:
    """Turn queries and keys to their positions and put keys and values into their slots, in place.

    Rotary positions as in Su et al. (2021), halves of a head swapping places. mixed:
    [num_rows, (num_heads + 2 * num_kv_heads) * head_dim], queries, keys and values of a row side by
    side. key_cache, value_cache: contiguous [num_blocks, block_size, num_kv_heads, head_dim].
    Returns the queries, contiguous [num_rows, num_heads, head_dim]; keys never exist outside the
    cache. Caches of float8_e4m3fn take keys and values over their scales, as `write_kv` does.
    Raises KernelInputError on a wrong shape, dtype, scale, device or (on a CPU) slot or position.
    """
    _check_rotation(mixed, places, key_cache, value_cache, norms)
    check_scales(mixed.dtype, key_cache.dtype, key_scale, value_scale)
    by_triton = (*TRITON_DTYPES, reference.FLOAT8)
    chosen = choose_backend(
        mixed.device, backend, key_cache.dtype, native_rows.DTYPE_CODES, by_triton
    )
    weights = (None, None, 0.0) if norms is None else (norms.query, norms.key, norms.epsilon)
    tables = (places.positions, places.slot_mapping, places.cosines, places.sines)
    if chosen == "native":
        return native_rows.rotate_and_write_kv(mixed, *tables, key_cache, value_cache, *weights)
    if chosen == "triton":
        rotate = _triton().rotate_and_write_kv
    else:
        check_indices("slot_mapping", places.slot_mapping, key_cache.shape[0] * key_cache.shape[1])
        check_indices("positions", places.positions, places.cosines.shape[0])
        rotate = reference.rotate_and_write_kv
    scales = (key_scale, value_scale)
    query: Tensor = rotate(mixed, *tables, key_cache, value_cache, *weights, *scales)
    return query


def _norm_backend(values: Tensor, weight: Tensor, backend: Backend | None) -> Backend:
    """The backend of a norm; the checks of both norms."""
    if values.dim() != 2 or weight.shape != values.shape[1:] or weight.dtype != values.dtype:
        raise KernelInputError(
            f"rows [num_rows, width] and a weight [width] of one dtype, got {values.dtype} "
            f"{list(values.shape)} and {weight.dtype} {list(weight.shape)}"
        )
    if values.stride(1) != 1 or not weight.is_contiguous() or weight.device != values.device:
        raise KernelInputError("rows and weight must be without gaps and on one device")
    return _backend(values, backend)


def _backend(values: Tensor, backend: Backend | None) -> Backend:
    return choose_backend(
        values.device, backend, values.dtype, native_rows.DTYPE_CODES, TRITON_DTYPES
    )


def _triton() -> ModuleType:
    """The launchers; Triton is imported when it is first needed, which takes a second."""
    from specinfer_kernels.triton import decoder_rows

    return decoder_rows


def _check_rotation(
    mixed: Tensor,
    places: RotaryPlaces,
    key_cache: Tensor,
    value_cache: Tensor,
    norms: HeadNorms | None,
) -> None:
    if key_cache.dim() != 4 or value_cache.shape != key_cache.shape:
        raise KernelInputError(
            f"caches must have one 4-dimensional shape, got {list(key_cache.shape)} "
            f"and {list(value_cache.shape)}"
        )
    _, _, num_kv_heads, head_dim = key_cache.shape
    rows, width = places.positions.shape[0], mixed.shape[-1]
    whole = width % head_dim == 0 and width >= (2 * num_kv_heads + 1) * head_dim
    if mixed.dim() != 2 or mixed.shape[0] != rows or not whole or mixed.stride(1) != 1:
        raise KernelInputError(
            f"mixed must be {rows} rows of queries and {num_kv_heads} keys and values of "
            f"{head_dim}, got {list(mixed.shape)}"
        )
    if places.cosines.shape[1] != head_dim:
        raise KernelInputError(
            f"cosines are of {places.cosines.shape[1]} dimensions, heads of {head_dim}"
        )
    if value_cache.dtype != key_cache.dtype:
        raise KernelInputError(f"caches differ: {key_cache.dtype}, {value_cache.dtype}")
    tensors = [mixed, places.cosines]
    if norms is not None:
        tensors += [norms.query, norms.key]
        if not norms.query.shape == norms.key.shape == (head_dim,):
            raise KernelInputError(f"norms must be of [{head_dim}]")
    if len({tensor.dtype for tensor in tensors}) > 1:
        raise KernelInputError(f"dtypes differ: {[str(tensor.dtype) for tensor in tensors]}")
    if len({tensor.device for tensor in (*tensors, key_cache, value_cache)}) > 1:
        raise KernelInputError("rows, tables and caches are on different devices")
    if not (key_cache.is_contiguous() and value_cache.is_contiguous()):
        raise KernelInputError("the caches must be contiguous")
